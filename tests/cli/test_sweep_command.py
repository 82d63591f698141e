import re
import shlex
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from conftest import TOLERANCE
from molf.cli import main
from molf.cli.compare import parse_comparison
from molf.cli.sweep import parse_sweep
from molf.errors import MolfError, UsageError
from molf.integrations.checkpoint_folder import checkpoints
from molf.study.faults.run_lock import in_use
from molf.study.grids.attempt import Attempt
from molf.study.grids.local import LocalEngine
from molf.study.grids.runner import checked_result, run_grid
from molf.study.results.result import read_result
from served import free_port, start_command
from small_runs import weights

CONFIGS = Path(__file__).parents[2] / "configs" / "sweep"
SMALL = (
    "--sample --limit 4 --eval_limit 2 --per_device_batch_size 4 --gradient_accumulation_steps 1 --num_train_epochs 1 "
    "--gradient_checkpointing False --disable_tqdm True"
)


def parse(line):
    return parse_sweep(shlex.split(line))


def names(line):
    return [spec.name for spec in parse(line)[1]]


def test_several_values_are_an_axis():
    assert names("--method fft --learning_rate 1e-4 5e-5 --seed 1 2") == [
        "fft-lr0.0001-s1", "fft-lr0.0001-s2", "fft-lr5e-05-s1", "fft-lr5e-05-s2"
    ]  # fmt: skip
    _, specs = parse("--methods fft lora --learning_rate 1e-4 --output-root out")
    assert [spec.name for spec in specs] == ["fft", "lora"]
    assert specs[0].folder == Path("out/fft")
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
    options, specs = parse(f"{path} --engine slurm --time 20")
    assert [spec.name for spec in specs] == [
        "small-a-r2-lr0.0001", "small-a-r2_4-lr0.0001", "small-b-r2-lr0.0001", "small-b-r2_4-lr0.0001",
        "fft-a-lr0.0001", "fft-b-lr0.0001",
    ]  # fmt: skip
    assert specs[1].config.method.ranks == [2, 4] and specs[4].config.method.ranks == [128], "fft does not read them"
    assert (options.partition, options.time, options.jobs) == ("gpu", 20, 3)
    assert (options.setup, options.sbatch) == (["module load cuda"], {"nice": 5})
    # One value for an axis of the file takes part of the grid, under the same names.
    assert names(f"--config {path} --model_name_or_path org/a --methods fft") == ["fft-a-lr0.0001"]


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ("--seed 1", {"molf-r8-s1": [8], "molf-r32-s1": [32]}),
        ("--ranks 8", {"molf-r8-s1": [8], "molf-r8-s2": [8]}),
        ("--ranks [32] --seed 2", {"molf-r32-s2": [32]}),
        ("--ranks 8,32 --seed 2", {"molf-r8_32-s2": [8, 32]}),
        ("--ranks 8 32 --seed 2", {"molf-r8_32-s2": [8, 32]}),
    ],
)
def test_one_value_for_an_axis_of_the_file_keeps_the_names(flags, found, tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text("{methods: [molf], ranks: [[8], [32]], seed: [1, 2]}")
    assert {spec.name: spec.config.method.ranks for spec in parse(f"{path} {flags}")[1]} == found


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "../out", "/abs", "a\nb"])
def test_a_name_that_leads_elsewhere_is_refused(name, tmp_path):
    """The trained weights of a run are removed at its end."""
    path = tmp_path / "s.yaml"
    for parsing in (parse_sweep, parse_comparison):
        path.write_text(yaml.safe_dump({"methods": {name: {"method": "fft"}}, "output_root": str(tmp_path / "out")}))
        with pytest.raises(MolfError, match=f"the name of a .*={re.escape(repr(name))} cannot name a folder"):
            parsing([str(path)])


@pytest.mark.parametrize(("file", "number"), [("fft-med.yaml", 18), ("lora-med.yaml", 12)])
def test_the_published_searches(file, number):
    options, specs = parse(f"{CONFIGS / file} --engine slurm --partition gpu")
    assert len({spec.name for spec in specs}) == len(specs) == number
    first = specs[0].config
    assert (first.task.task, first.train["per_device_train_batch_size"], first.train["num_train_epochs"]) == (
        "med",
        8,
        2,
    )
    assert (options.partition, options.gpus_per_node) == ("gpu", 1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--learning_rte 1 2", "unknown setting 'learning_rte'; did you mean 'learning_rate'"),
        ("--partitoin x", "did you mean 'partition'"),
        ("--partition x", "partition is a setting of SLURM jobs; add --engine slurm"),
        ("--engine cloud", "argument --engine: invalid choice: 'cloud'"),
        ("--engine slurm --time soon", "argument --time: invalid int value: 'soon'"),
        ("--engine slurm --time 0", "time=0 must be at least 1"),
        ("--engine slurm --sbatch x", "argument --sbatch: invalid"),
        ("--engine slurm --output_root 50% --dry_run", "SLURM's files cannot be in .*50%/jobs"),
        ("--engine slurm --partition 'a\nb'", "'partition': 'a.nb' for sbatch: a value is a number, printable text"),
        ("--jobs many", "argument --jobs: invalid int value: 'many'"),
        ("--nproc_per_node 0", "nproc_per_node=0 must be at least 1"),
        ("--retry maybe", "argument --retry: Truthy value expected: got maybe"),
        ("--output_dir x", "output_dir is set for every run by this command; leave it out"),
        ("--methods ffft", "invalid choice"),
    ],
)
def test_mistakes(line, message):
    with pytest.raises(UsageError, match=message):
        parse(line)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "slurm: {partitoin: x}",
            "slurm in .* must be a mapping with any of partition, time, .*, not {'partitoin': 'x'}",
        ),
        ("slurm: gpu", "slurm in .* must be a mapping"),
        ("methods: {a: {lerning_rate: 1}}", "did you mean 'learning_rate'"),
    ],
)
def test_mistakes_in_a_file(content, message, tmp_path):
    (tmp_path / "s.yaml").write_text(content)
    with pytest.raises(UsageError, match=message):
        parse(str(tmp_path / "s.yaml"))


def test_a_dry_run_lists_and_starts_nothing(model_folder, tmp_path, capsys):
    line = f"sweep --model_name_or_path {model_folder} --learning_rate 1e-4 1e-3 --output_root out --dry_run"
    assert main(shlex.split(line)) == 0
    shown = capsys.readouterr().out
    assert shown.count("new ") == 2 and "-m molf train --config out/molf-lr0.001.yaml" in shown
    assert not (tmp_path / "out").exists()


def test_real_runs_one_of_which_fails(model_folder, in_process, tmp_path, capsys):
    line = f"sweep --model_name_or_path {model_folder} /no/such/model {SMALL} --method fft --output_root out"
    assert main(shlex.split(line)) == 1
    captured = capsys.readouterr()
    assert "out/fft-model failed with status 1" in captured.out
    assert captured.out.count("the end of out/fft-model.log:") == 1 and "/no/such/model" in captured.out
    assert "1 runs failed: --retry runs them again" in captured.err
    assert read_result(tmp_path / "out" / "fft-tiny").training.steps == 1
    started = (tmp_path / "out" / "fft-tiny.log").stat().st_mtime_ns
    assert main(shlex.split(line)) == 1
    assert "1 of 2 runs are finished; 0 to run" in capsys.readouterr().out
    assert (tmp_path / "out" / "fft-tiny.log").stat().st_mtime_ns == started


def test_runs_on_two_processes_go_on_when_killed_and_equal_one_process(model_folder, monkeypatch):
    settings = (
        f"--model_name_or_path {model_folder} {SMALL} --method molf --ranks 4 --per_device_batch_size 1 --max_steps 10 "
        "--learning_rate 1e-2 --adam_epsilon 1e-3 --save_strategy steps --save_steps 1 --save_total_limit 2"
    )
    line = f"{settings} --nproc_per_node 2 --keep_models --output_root out"
    _, (spec,) = parse_sweep(shlex.split(line))
    spec.write_settings()

    attempt = Attempt(spec, keep_model=True)
    with ThreadPoolExecutor() as pool:
        status = pool.submit(attempt)
        while not status.done() and not checkpoints(spec.folder):
            time.sleep(0.02)
        attempt._process.kill()  # torchrun
    assert spec.state == "interrupted" and status.result() == -signal.SIGKILL, spec.log_file.read_text()
    with pytest.raises(MolfError, match=r"an unfinished run with nproc_per_node=2 \(here 1\)"):
        run_grid([replace(spec, processes=1)], LocalEngine())
    in_use_at_start = []

    def on_two_ranks(attempt, lock):
        """What torchrun does, without importing the libraries again."""
        in_use_at_start.append(in_use(spec.folder))
        _, *launcher, train, config, file = attempt.spec.command
        assert launcher == ["-m", "molf.study.torchrun", "--standalone", "--nproc_per_node=2", "-m", "molf"]
        where = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        where["MASTER_PORT"] = str(free_port())
        ranks = [
            start_command([train, config, file], spec.log_file, **where, RANK=str(rank), LOCAL_RANK=str(rank))
            for rank in range(2)
        ]
        for rank in ranks:
            rank.join()
        return max(rank.exitcode for rank in ranks)

    monkeypatch.setattr(Attempt, "_run", on_two_ranks)
    assert main(["sweep", *shlex.split(line)]) == 0, spec.log_file.read_text()
    assert in_use_at_start == [False]
    assert "stopped by the end of the process that launched it" in spec.log_file.read_text()
    result = read_result(spec.folder)
    assert (result.training.steps, result.training.processes) == (10, 2)
    with pytest.raises(MolfError, match=r"a run with nproc_per_node=2 \(here 1\)"):
        checked_result(replace(spec, processes=1))

    assert main(["train", *shlex.split(f"{settings} --gradient_accumulation_steps 2 --output_dir one")]) == 0
    two, one = weights(spec.folder), weights("one")
    for name, tensor in one.items():
        # As in one step, but ten times.
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=10 * TOLERANCE[torch.float32])
