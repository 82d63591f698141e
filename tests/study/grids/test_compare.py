import csv
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from molf.cli import main
from molf.study.config.run_config import RunConfig
from molf.study.grids import spec
from molf.study.grids.compare import Comparison, Contender, Outcome, best, compare
from molf.study.grids.compare_report import comparison_table, draw_bars, markdown, rows_of, verdict, write_comparison
from molf.study.grids.spec import Failure
from molf.study.results.result import Result, Training
from molf.tasks.base import Metric


@pytest.fixture
def settings(saved_model):
    return {
        "model_name_or_path": saved_model,
        "sample": True,
        "limit": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 1,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "lora_rank": 2,
    }


@pytest.fixture
def comparison(settings, tmp_path):
    """Two methods with two rates each."""
    candidates = {
        method: {
            f"lr{rate:g}": RunConfig.from_dict(settings | {"method": method, "learning_rate": rate}) for rate in rates
        }
        for method, rates in (("fft", (1e-4, 1e-3)), ("lora", (1e-3, 1e-2)))
    }
    return Comparison(candidates, (1, 2), 3, tmp_path / "out")


def start_with(monkeypatch, run):
    """Let a comparison, and nobody else, start its cells with ``run``."""
    monkeypatch.setattr(spec, "subprocess", SimpleNamespace(run=run, STDOUT=subprocess.STDOUT))


@pytest.fixture
def started(monkeypatch):
    """Run cells in this process, which is quicker, and record their configuration files."""
    files = []

    def run(command, stdout, stderr):
        assert command[:4] == [sys.executable, "-m", "molf", "train"] and command[4] == "--config"
        files.append(Path(command[5]))
        try:
            return subprocess.CompletedProcess(command, main(command[3:]))
        except RuntimeError as error:
            stdout.write(f"one line\n{error}\n")
            return subprocess.CompletedProcess(command, 1)

    start_with(monkeypatch, run)
    return files


def test_two_methods_at_two_rates(comparison, started, tmp_path):
    outcome = compare(comparison)
    assert [path.parent.name for path in started].count("selection") == 4
    assert len(started) == 4 + 2 * 2
    assert outcome.metric == "efficacy_score" and not outcome.failures
    for contender in outcome.contenders:
        assert contender.chosen == best(contender.selection)
        assert [result.config["seed"] for result in contender.results] == [1, 2]
        assert {f"lr{result.config['learning_rate']:g}" for result in contender.results} == {contender.chosen}
    assert not list(tmp_path.glob("out/**/*.safetensors"))
    assert list(tmp_path.glob("out/**/predictions.jsonl.gz"))


def test_an_interrupted_comparison_goes_on(comparison, started):
    first = compare(comparison)
    started.clear()
    assert compare(comparison) == first and not started
    lost = comparison.folder / f"lora-{first.contenders[1].chosen}-s2"
    (lost / "result.json").unlink()
    again = compare(comparison)
    assert [path.stem for path in started] == [lost.name]
    assert again.contenders[1].mean(first.metric) == first.contenders[1].mean(first.metric)


def test_selection_never_reads_rows_that_are_evaluated(comparison, started, monkeypatch):
    import molf.study.run.train as training

    seen = {}
    original = training.load_job

    def load_job(config):
        job = original(config)
        kind = "selection" if config.task.selection_limit else "final"
        seen.setdefault(kind, []).extend(row["case_id"] for row in job.split.train + job.split.eval)
        return job

    monkeypatch.setattr(training, "load_job", load_job)
    compare(comparison)
    assert len(set(seen["final"])) == 4 and len(set(seen["selection"])) == 3
    assert not set(seen["final"]) & set(seen["selection"])


def test_a_failed_cell_is_reported_and_the_rest_goes_on(comparison, started, monkeypatch):
    import molf.study.run.train as training

    original = training.load_job

    def load_job(config):
        if config.method.method == "lora" and config.train["seed"] == 2:
            raise RuntimeError("out of cheese")
        return original(config)

    monkeypatch.setattr(training, "load_job", load_job)
    told = []
    outcome = compare(comparison, told.append)
    (failure,) = outcome.failures
    assert failure.cell.startswith("lora-") and failure.cell.endswith("-s2") and failure.status == 1
    assert failure.tail == failure.log.read_text().strip() == "one line\nout of cheese"
    assert any("out of cheese" in line for line in told)
    assert [len(contender.results) for contender in outcome.contenders] == [2, 1]
    assert failure.cell in markdown(outcome)


def test_a_method_that_always_fails(comparison, monkeypatch):
    start_with(monkeypatch, lambda command, **_: subprocess.CompletedProcess(command, 9))
    outcome = compare(comparison)
    assert [contender.chosen for contender in outcome.contenders] == [None, None]
    assert len(outcome.failures) == 4
    assert rows_of(outcome)[0]["seeds"] == 0
    assert "failed" in markdown(outcome)
    write_comparison(outcome, comparison.folder)


def test_a_cell_of_other_settings_is_not_taken_for_this_one(comparison, started, settings, tmp_path):
    one = {"fft": {"lr": RunConfig.from_dict(settings | {"method": "fft"})}}
    compare(Comparison(one, (1,), 3, tmp_path / "out"))
    other = {"fft": {"lr": RunConfig.from_dict(settings | {"method": "fft", "limit": 2})}}
    with pytest.raises(ValueError, match="a run with another limit; remove it"):
        compare(Comparison(other, (1,), 3, tmp_path / "out"))


def test_one_candidate_needs_no_choice_and_all_rates_can_be_run(comparison, started, settings, tmp_path):
    one = {"fft": {"lr": RunConfig.from_dict(settings | {"method": "fft"})}}
    outcome = compare(Comparison(one, (1,), 3, tmp_path / "one", keep_models=True))
    assert len(started) == 1 and outcome.contenders[0].selection == {}
    assert list(tmp_path.glob("one/**/*.safetensors"))
    started.clear()
    two = {"fft": comparison.candidates["fft"]}
    (contender,) = compare(Comparison(two, (1,), 3, tmp_path / "two", all_rates=True)).contenders
    assert len(started) == 2 + 2
    assert {contender.chosen, *contender.others} == {"lr0.0001", "lr0.001"}


def test_a_cell_is_a_process_of_its_own(settings, tmp_path):
    bad = {"fft": {"lr": RunConfig.from_dict(settings | {"method": "fft", "model_name_or_path": "/no/such/model"})}}
    outcome = compare(Comparison(bad, (1,), 3, tmp_path / "out"))
    assert outcome.failures[0].status == 1
    assert "/no/such/model" in outcome.failures[0].tail
    assert outcome.contenders[0].results == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidates": {}}, "nothing to compare"),
        ({"seeds": ()}, "one or more different seeds"),
        ({"seeds": (1, 1)}, "one or more different seeds"),
        ({"selection_limit": 0}, "at least 1"),
    ],
)
def test_no_comparison(comparison, change, message):
    with pytest.raises(ValueError, match=message):
        Comparison(**{**vars(comparison), **change})


def test_different_tasks(settings, tmp_path):
    configs = {task: RunConfig.from_dict(settings | {"task": task}) for task in ("fact", "sql")}
    with pytest.raises(ValueError, match="different tasks"):
        compare(Comparison({"molf": configs}, (1,), 3, tmp_path))


def test_an_unknown_metric(comparison, started):
    with pytest.raises(ValueError, match="no metric 'nonsense'; it has efficacy_score"):
        compare(Comparison(**{**vars(comparison), "metric": "nonsense"}))


def test_the_best_of_some():
    assert best({"a": 1.0, "b": 2.0, "c": 2.0}) == "b"
    assert best({"a": float("nan"), "b": 0.0}) == "b"
    assert best({}) is None


def result(value, seconds=60.0):
    training = Training(6, 1.0, 2.5, 800, 801.0, 1000, 900, 64)
    metrics = {"score": Metric(value, 12), "other": Metric(value / 2, 12)}
    return Result({}, "score", metrics, None, "rows", "CPU", {"molf": "0.1.0"}, None, seconds, 2**30, training)


def contender(method, *values, name=None):
    return Contender(name or method, method, "lr1", {"lr1": 5.0, "lr2": 4.0}, [result(value) for value in values], {})


@pytest.fixture
def outcome():
    methods = [
        contender("fft", 80.0),
        contender("lora", 70.0, 74.0),
        contender("molf", 79.0),
        contender("molf_e", 71.0),
    ]
    return Outcome("score", [*methods, contender("dora", 69.0), contender("adalora", 71.0)], [])


def test_the_rows(outcome):
    fft, lora = rows_of(outcome)[:2]
    assert (lora["score"], lora["seeds"], lora["other"]) == (72.0, 2, 36.0)
    assert lora["score/spread"] == pytest.approx(2 * 2**0.5)
    assert (fft["score/spread"], fft["trainable_parameters"], fft["peak_memory_bytes"]) == (None, 964, 2**30)


def test_the_verdict(outcome):
    said = verdict(outcome)
    assert "MoLF is 1.00 points behind the better of full fine-tuning and LoRA (fft) in score, 79.00 to 80.00" in said
    assert "MoLF-Efficient is level with the best adaptive LoRA (adalora)" in said
    ahead = Outcome("score", [contender("fft", 1.0), contender("molf", 3.5, name="molf_r8")], [])
    assert verdict(ahead).startswith("MoLF (molf_r8) is 2.50 points ahead of the better")
    assert verdict(Outcome("score", [contender("fft", 1.0)], [])).startswith("Nothing to say")


def test_the_files(outcome, tmp_path):
    failed = Outcome(outcome.metric, outcome.contenders, [Failure("cell", 3, tmp_path / "cell.log", "the end")])
    files = write_comparison(failed, tmp_path / "out")
    assert [path.name for path in files] == [f"comparison.{suffix}" for suffix in ("csv", "json", "md", "png")]
    table, record, text, picture = files
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [row["name"] for row in rows] == ["fft", "lora", "molf", "molf_e", "dora", "adalora"]
    assert float(rows[1]["score"]) == 72.0
    content = json.loads(record.read_text())
    assert content["rows"] == rows_of(outcome) and content["verdict"] == verdict(outcome)
    assert Result.from_dict(content["runs"]["fft"]["lr1"][0]) == outcome.contenders[0].results[0]
    assert content["failures"][0]["tail"] == "the end"
    lines = text.read_text().splitlines()
    assert lines[3].startswith("| lora | lr1 | 72.00 ± 2.83 | 2 |")
    assert len({line.count("|") for line in lines[:8]}) == 1
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_table(outcome):
    table = comparison_table(outcome)
    assert table.row_count == 6
    assert [*table.columns[2].cells][1] == "72.00 ± 2.83"


def test_a_picture_of_nothing(tmp_path):
    draw_bars(Outcome("score", [Contender("fft", "fft", None, {}, [], {})], []), tmp_path / "none.png")
    assert (tmp_path / "none.png").is_file()
