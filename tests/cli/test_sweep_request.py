import shlex
from pathlib import Path

import pytest
import yaml

from molf.cli.sweep_request import parse_sweep
from molf.errors import UsageError

CONFIGS = Path(__file__).parents[2] / "configs" / "sweep"


def parse(line):
    return parse_sweep(shlex.split(line))


def names(line):
    return [spec.name for spec in parse(line).specs]


def test_several_values_are_an_axis():
    assert names("--method fft --learning_rate 1e-4 5e-5 --seed 1 2") == [
        "fft-lr0.0001-s1", "fft-lr0.0001-s2", "fft-lr5e-05-s1", "fft-lr5e-05-s2"
    ]  # fmt: skip
    request = parse("--methods fft lora --learning_rate 1e-4 --output-root out")
    assert [spec.name for spec in request.specs] == ["fft", "lora"]
    assert request.specs[0].folder == Path("out/fft")
    assert names("--method fft lora") == ["fft", "lora"] and names("--limit 3") == ["molf"]


def test_a_file(tmp_path):
    path = tmp_path / "s.yaml"
    content = {
        "model_name_or_path": ["org/a", "bundled:b"],
        "ranks": [2, 4],
        "learning-rate": [1e-4],
        "methods": {"small": {"method": "molf", "ranks": [[2], [2, 4]]}, "fft": None},
        "slurm": {"partition": "gpu", "time": 30, "setup": ["module load cuda"], "sbatch": {"nice": 5}},
        "jobs": 3,
    }
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    request = parse(f"{path} --engine slurm --time 20")
    assert [spec.name for spec in request.specs] == [
        "small-a-r2-lr0.0001", "small-a-r2_4-lr0.0001", "small-b-r2-lr0.0001", "small-b-r2_4-lr0.0001",
        "fft-a-lr0.0001", "fft-b-lr0.0001",
    ]  # fmt: skip
    assert request.specs[1].config.method.ranks == [2, 4] and request.specs[4].config.method.ranks == [2, 4]
    assert (request.slurm.partition, request.slurm.time, request.own["jobs"]) == ("gpu", 20, 3)
    assert (request.slurm.setup, request.slurm.sbatch) == (["module load cuda"], {"nice": 5})
    # One value for an axis of the file takes part of the grid, under the same names.
    assert names(f"--config {path} --model_name_or_path org/a --methods fft") == ["fft-a-lr0.0001"]


@pytest.mark.parametrize(("file", "number"), [("fft-med.yaml", 18), ("lora-med.yaml", 12)])
def test_the_published_searches(file, number):
    request = parse(f"{CONFIGS / file} --engine slurm --partition gpu")
    assert len({spec.name for spec in request.specs}) == len(request.specs) == number
    first = request.specs[0].config
    assert (first.task.task, first.train["per_device_train_batch_size"], first.train["num_train_epochs"]) == (
        "med",
        8,
        2,
    )
    assert (request.slurm.partition, request.slurm.gpus_per_node) == ("gpu", 1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--learning_rte 1 2", "unknown setting 'learning_rte'; did you mean 'learning_rate'"),
        ("--partitoin x", "did you mean 'partition'"),
        ("--partition x", "partition is a setting of SLURM jobs; add --engine slurm"),
        ("--engine cloud", "engine is local or slurm, not 'cloud'"),
        ("--engine slurm --time soon", "time cannot be 'soon'"),
        ("--engine slurm --time 0", "time=0 must be at least 1"),
        ("--engine slurm --setup x", "setup is a list, given in a file under slurm, not 'x'"),
        ("--jobs many", "jobs is a number, 1 or more, not 'many'"),
        ("--nproc_per_node 0", "nproc_per_node is a number, 1 or more, not '0'"),
        ("--retry maybe", "retry is true or false"),
        ("--output_dir x", "output_dir is set for every run by the sweep"),
        ("--methods ffft", "invalid choice"),
    ],
)
def test_mistakes(line, message):
    with pytest.raises(UsageError, match=message):
        parse(line)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("slurm: {partitoin: x}", "unknown setting 'partitoin' under slurm.*did you mean 'partition'"),
        ("slurm: gpu", "slurm in .* must be a mapping"),
        ("methods: {a: {lerning_rate: 1}}", "did you mean 'learning_rate'"),
    ],
)
def test_mistakes_in_a_file(content, message, tmp_path):
    (tmp_path / "s.yaml").write_text(content)
    with pytest.raises(UsageError, match=message):
        parse(str(tmp_path / "s.yaml"))
