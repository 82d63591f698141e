import csv
import json
from dataclasses import replace
from unittest import mock

import pytest
from matplotlib.axes import Axes

from molf.study.grids.compare import Contender, Outcome
from molf.study.grids.compare_report import comparison_table, draw_bars, rows_of, verdict, write_comparison
from molf.study.grids.spec import Failure
from molf.study.results.result import Result
from molf.tasks.base import Metric
from molf.tasks.retention import Retention
from small_runs import small_result


def result(value, seconds=60.0):
    return small_result(metrics={"score": Metric(value, 12), "other": Metric(value / 2, 12)}, seconds=seconds)


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
    return Outcome("score", [*methods, contender("dora", 69.0), contender("adalora", 71.0)], [], [])


def test_the_rows(outcome):
    fft, lora = rows_of(outcome)[:2]
    assert (lora["score"], lora["seeds"], lora["other"]) == (72.0, 2, 36.0)
    assert lora["score/spread"] == pytest.approx(2 * 2**0.5)
    assert (fft["score/spread"], fft["trainable_parameters"], fft["peak_memory_bytes"]) == (None, 964, 2**30)


def test_a_metric_that_some_runs_do_not_have(tmp_path):
    one, other = small_result(metrics={"other": Metric(3.0, 1)}), result(4.0)
    rows = rows_of(
        Outcome("score", [Contender("fft", "fft", "lr1", {}, [one, other], {}), contender("molf", 6.0, 8.0)], [], [])
    )
    assert [(row["seeds"], row["score"], row["other"]) for row in rows] == [(1, 4.0, 2.5), (2, 7.0, 3.5)]
    (row,) = rows_of(Outcome("other", [Contender("fft", "fft", "lr1", {}, [one, other], {})], [], []))
    assert (row["seeds"], row["other"], row["score"]) == (2, 2.5, 4.0)
    none = Outcome("score", [Contender("fft", "fft", "lr1", {}, [one], {})], [], [])
    assert (rows_of(none)[0]["seeds"], rows_of(none)[0]["score"]) == (0, None)
    with mock.patch.object(Axes, "bar", side_effect=AssertionError("a bar of 0 would be taken for a value")):
        draw_bars(none, tmp_path / "none.png")


def test_the_verdict(outcome):
    said = verdict(outcome)
    assert "MoLF is 1.00 points behind the better of full fine-tuning and LoRA (fft) in score, 79.00 to 80.00" in said
    assert "MoLF-Efficient is level with the best adaptive LoRA (adalora)" in said
    ahead = Outcome("score", [contender("fft", 1.0), contender("molf", 3.5, name="molf_r8")], [], [])
    assert verdict(ahead).startswith("MoLF (molf_r8) is 2.50 points ahead of the baseline (fft)")
    assert verdict(Outcome("score", [contender("fft", 1.0)], [], [])).startswith("Nothing to say")


def test_the_verdict_on_a_metric_of_which_less_is_better():
    methods = [contender("fft", 2.0), contender("lora", 1.5), contender("molf", 1.0)]
    said = verdict(Outcome("score", methods, [], [], less_is_better=True))
    assert said.startswith("MoLF is 0.50 ahead of the better of full fine-tuning and LoRA (lora)")
    assert said.endswith("in score (less is better), 1.00 to 1.50.")


def test_the_files(outcome, tmp_path):
    failed = Outcome(
        outcome.metric, outcome.contenders, [Failure("broken", 3, tmp_path / "broken.log", "the end")], ["killed"]
    )
    files = write_comparison(failed, tmp_path / "out")
    assert [path.name for path in files] == [f"comparison.{suffix}" for suffix in ("csv", "json", "md", "png")]
    table, record, text, picture = files
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [row["name"] for row in rows] == ["fft", "lora", "molf", "molf_e", "dora", "adalora"]
    assert float(rows[1]["score"]) == 72.0
    content = json.loads(record.read_text())
    assert content["rows"] == rows_of(outcome) and content["verdict"] == verdict(outcome)
    assert Result.from_dict(content["runs"]["fft"]["lr1"][0]) == outcome.contenders[0].results[0]
    assert content["failures"] == [
        {"cell": "broken", "status": 3, "log": str(tmp_path / "broken.log"), "tail": "the end"}
    ]
    assert "Failed:\n\n- broken: status 3, see" in text.read_text() and "Not finished:\n\n- killed" in text.read_text()
    lines = text.read_text().splitlines()
    assert lines[3].startswith("| lora | lr1 | 72.00 ± 2.83 | 2 |")
    assert len({line.count("|") for line in lines[:8]}) == 1
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_table(outcome):
    table = comparison_table(outcome)
    assert table.row_count == 6
    assert str([*table.columns[2].cells][1]) == "72.00 ± 2.83"
    titles = [str(column.header) for column in table.columns]
    assert titles == ["method", "chosen", "score", "n", "trainable M", "tok/s", "peak GiB", "min"]


def test_a_picture_of_nothing(tmp_path):
    draw_bars(Outcome("score", [Contender("fft", "fft", None, {}, [], {})], [], []), tmp_path / "none.png")
    assert (tmp_path / "none.png").is_file()


def test_forgetting_has_columns_and_a_picture_if_it_was_measured(outcome, tmp_path):
    losses = [Metric(value, 3) for value in (3.0, 3.5, 0.5)]
    lora = outcome.contenders[1]
    lora.results[0] = replace(lora.results[0], retention=Retention(*losses, Metric(0.25, 2), "here", 1.0))
    lora.results[1] = replace(lora.results[1], retention=Retention(*losses[:2], Metric(1.5, 3), None, "here", 1.0))
    row = rows_of(outcome)[1]
    assert (row["retention/loss_rise"], row["retention/kl"]) == (1.0, 0.25)
    files = write_comparison(outcome, tmp_path)
    assert files[-1].name == "comparison-forgetting.png" and files[-1].read_bytes().startswith(b"\x89PNG")
    header, _, fft, lora, *_ = files[2].read_text().splitlines()
    assert "| forgotten | retention/kl |" in header and "| 1.00 | 0.25 |" in lora
    assert fft.count("|") == header.count("|")
    again = Result.from_dict(json.loads(files[1].read_text())["runs"]["lora"]["lr1"][0])
    assert again == outcome.contenders[1].results[0]
