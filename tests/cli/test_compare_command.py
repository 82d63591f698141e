import shlex
import time
from pathlib import Path

import pytest
import yaml

from molf.cli import main
from molf.cli.compare import parse_comparison
from molf.errors import UsageError
from molf.study.faults.preemption import PREEMPTED
from molf.study.faults.run_lock import in_use
from molf.study.grids.attempt import Attempt
from molf.study.results.result import read_result
from served import start_command

CONFIGS = Path(__file__).parents[2] / "configs" / "compare"
SMALL = (
    "--sample --limit 4 --per_device_batch_size 4 --gradient_accumulation_steps 1 --num_train_epochs 1 "
    "--gradient_checkpointing False --disable_tqdm True"
)


def parse(line):
    return parse_comparison(shlex.split(line))[1]


def test_flags_alone():
    comparison = parse("--methods fft lora --learning_rate 1e-4 5e-5 --seeds 1,2 --model_name_or_path m --all-rates")
    assert {name: list(own) for name, own in comparison.candidates.items()} == {
        "fft": ["lr0.0001", "lr5e-05"],
        "lora": ["lr0.0001", "lr5e-05"],
    }
    assert comparison.candidates["lora"]["lr5e-05"].train["learning_rate"] == 5e-5
    assert (comparison.seeds, comparison.selection_limit, comparison.all_rates) == ((1, 2), 100, True)
    assert (comparison.folder, comparison.metric, comparison.processes) == (Path("runs/compare"), None, 1)


def test_a_method_has_its_own_settings_and_flags_choose_among_methods(tmp_path):
    path = tmp_path / "c.yaml"
    methods = {
        "fft": None,
        "small": {"method": "lora", "lora-rank": 4, "lr_scheduler_type": ["cosine", "linear"]},
        "molf": {"lora_learning_rate": ["1e-3", 2e-3], "molf_lora_ranks": [2, 4]},
    }
    path.write_text(yaml.safe_dump({"methods": methods, "learning_rate": 1e-4, "lora_rank": 8, "limit": 7}))
    candidates = parse(f"--config {path} --limit 5").candidates
    assert {name: list(own) for name, own in candidates.items()} == {
        "fft": ["lr0.0001"],
        "small": ["cosine", "linear"],
        "molf": ["lora0.001", "lora0.002"],
    }
    assert candidates["small"]["linear"].method.lora_rank == 4
    assert candidates["small"]["linear"].train["lr_scheduler_type"] == "linear"
    assert candidates["molf"]["lora0.002"].method.ranks == [2, 4]
    assert candidates["fft"]["lr0.0001"].task.limit == 5
    assert list(parse(f"--config {path} --methods molf lora").candidates) == ["molf", "lora"]


@pytest.mark.parametrize("rates", ["1e-4 1.0e-4", "1.0000001e-4 1e-4"])
def test_candidates_whose_names_would_be_equal(rates):
    with pytest.raises(UsageError, match=r"fft has two candidates called lr0\.0001: .* first six digits"):
        parse(f"--methods fft --learning_rate {rates} --model_name_or_path m")


def test_a_comparison_may_run_on_a_cluster():
    options, _ = parse_comparison(shlex.split("--methods fft --engine slurm --partition gpu --output_root out"))
    engine = options.make_engine(print)
    assert (engine.folder, engine.settings.partition, engine.wait) == (Path("out/jobs"), "gpu", True)


def test_the_files_that_come_with_the_package():
    small = parse(f"--config {CONFIGS / 'smollm2-fact.yaml'}")
    assert list(small.candidates) == ["fft", "lora", "adalora", "dora", "molf", "molf_e"]
    assert {len(own) for own in small.candidates.values()} == {2}
    assert small.metric == "score"
    paper = parse(f"--config {CONFIGS / 'paper.yaml'} --model_name_or_path google/gemma-3-1b-pt --task med")
    assert len(paper.candidates["fft"]) == 6
    assert len(paper.candidates["lora"]) == 4
    assert paper.task == "med"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_comparison_that_comes_with_it_can_be_read(path):
    assert parse(f"--config {path}").candidates


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "nothing to compare"),
        ("--methods fft --seed 1", "seed is set for every run"),
        ("--methods fft --output_dir here", "output_dir is set for every run"),
        ("--methods fft --seeds one", "argument --seeds: invalid int value"),
        ("--methods fft --seeds 1 1", "different seeds"),
        ("--methods fft --selection_limit 0", "at least 1"),
        ("--methods fft --all_rates maybe", "argument --all_rates.*: Truthy value expected: got maybe"),
        ("--methods fft --learning_rte 1", "did you mean 'learning_rate'"),
        ("--methods ffft", "invalid choice"),
        ("--methods fft --metric eficacy_score", "the task fact has no metric 'eficacy_score', only efficacy_score"),
    ],
)
def test_mistakes(line, message):
    with pytest.raises(UsageError, match=message):
        parse(line)


def test_a_dry_run_lists_and_starts_nothing(model_folder, tmp_path, capsys):
    line = f"compare --methods fft lora --learning_rate 1e-4 1e-3 --seeds 1 2 3 --model_name_or_path {model_folder} {SMALL}"
    assert main(shlex.split(f"{line} --output_root out --dry_run")) == 0
    shown = capsys.readouterr().out
    assert shown.count("new ") == 4 and "-m molf train --config out/selection/lora-lr0.001.yaml" in shown
    assert "4 runs, and 6 more with the settings that they choose" in shown
    assert main(shlex.split(f"{line} --output_root out --learning_rate 1e-4 --dry-run")) == 0
    shown = capsys.readouterr().out
    assert shown.count("new ") == 6 and "selection" not in shown and "6 runs, by" in shown
    assert main(shlex.split(f"{line} --output_root out --all_rates --dry-run")) == 0
    assert "16 runs, by" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_the_command(model_folder, in_process, capsys):
    line = f"compare --methods fft --learning_rate 1e-4 --model_name_or_path {model_folder} {SMALL} --output_root out"
    assert main(shlex.split(line)) == 0
    shown = capsys.readouterr().out
    assert "out/fft-lr0.0001-s42 finished" in shown
    assert "Nothing to say about MoLF" in shown
    assert not list(Path("out").rglob("*.safetensors"))
    assert {path.name for path in Path("out").glob("comparison.*")} == {
        f"comparison.{s}" for s in ("csv", "json", "md", "png")
    }
    assert main(shlex.split(line)) == 0
    assert "1 of 1 runs are finished; 0 to run" in capsys.readouterr().out


def test_a_failed_run_fails_the_command(model_folder, monkeypatch, capsys):
    monkeypatch.setattr(Attempt, "_run", lambda attempt, lock: attempt.spec.log_file.write_text("oh") and 3)
    line = f"compare --methods fft --learning_rate 1e-4 {SMALL} --output_root out --model_name_or_path m"
    assert main(shlex.split(line)) == 1
    captured = capsys.readouterr()
    assert "failed with status 3; the end of out/fft-lr0.0001-s42.log:\noh" in captured.out
    assert "1 runs failed: once the cause is gone, the same command runs them again" in captured.err


def test_a_comparison_that_is_stopped_stops_its_run_and_resumes(model_folder, in_process):
    """The first one starts its run as a process of its own; the second one carries it out here."""
    line = (
        f"compare --methods fft --learning_rate 1e-4 --model_name_or_path {model_folder} {SMALL} --output_root out "
        "--num_train_epochs 60 --save_strategy steps --save_steps 2 --save_total_limit 2"
    )
    name = "fft-lr0.0001-s42"
    process = start_command(shlex.split(line), "said.txt")
    while process.is_alive() and not list(Path("out").glob(f"{name}/checkpoint-*")):
        time.sleep(0.05)
    process.terminate()
    process.join(timeout=120)
    said = Path("said.txt").read_text()
    assert process.exitcode == PREEMPTED, said
    assert "the runs have saved what they could, and the same command continues" in said
    assert not in_use(Path("out") / name)
    assert main(shlex.split(line)) == 0
    assert "stopped by SIGTERM after step" in Path(f"out/{name}.log").read_text()
    assert read_result(Path("out") / name).training.steps == 60


def test_the_comparison_of_recipes_has_all_controls():
    found = parse(f"--config {CONFIGS / 'smollm2-recipe.yaml'}")
    assert list(found.candidates) == ["routing", "random_0", "random_1", "random_2", "kind", "uniform", "eva"]
    methods = [config.method for own in found.candidates.values() for config in own.values()]
    assert {method.method for method in methods} == {"static"} and len({method.allocation for method in methods}) == 7
    assert found.seeds == (42, 43, 44)


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        ("{a: {method: fft, task: med}, b: {method: fft}}", "the methods have different tasks, med, fact"),
        (
            "{a: {method: fft, learning_rate: [1, 2], lr_scheduler_type: [cosine, linear]}, "
            "a-lr1: {method: fft, lr_scheduler_type: [cosine, linear]}}",
            "two runs have the name a-lr1-cosine",
        ),
    ],
)
def test_a_dry_run_refuses_what_a_run_does(methods, words, model_folder, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(f"methods: {methods}")
    line = f"compare {tmp_path}/c.yaml --model_name_or_path {model_folder} --task fact --sample --all_rates --dry_run"
    assert main(shlex.split(line)) != 0
    assert words in capsys.readouterr().err
