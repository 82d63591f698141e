import csv
import json

import pytest
from pyarrow import parquet

from fake_runs import RESULT
from molf.study.results.gather import gather


def leave(folder, **config):
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps({**RESULT, "config": config}))


@pytest.fixture
def runs(tmp_path):
    """Three runs at two depths, and two files that are none."""
    leave(tmp_path / "b", method="fft", warmup_steps=0.1, seed=1)
    leave(tmp_path / "a" / "deep", method="lora", warmup_steps=5, seed="two")
    leave(tmp_path / "c", method="molf", warmup_steps=None, ranks=[4, 8])
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "result.json").write_text('{"config": {')
    (tmp_path / "older").mkdir()
    (tmp_path / "older" / "result.json").write_text("{}")
    return tmp_path


def test_results_are_found_at_any_depth_and_what_is_none_is_named(runs):
    found = gather([runs])
    assert list(found.results) == [str(runs / name) for name in ("a/deep", "b", "c")]
    assert set(found.unreadable) == {str(runs / name / "result.json") for name in ("torn", "older")}
    assert all("is not a result of this version" in reason for reason in found.unreadable.values())


def test_a_run_given_twice_counts_once(runs):
    assert list(gather([runs / "b", runs / "b" / "result.json", runs / "a"]).results) == [
        str(runs / name) for name in ("a/deep", "b")
    ]


def test_csv(runs, tmp_path):
    gather([runs]).write_csv(tmp_path / "new" / "all.csv")
    with (tmp_path / "new" / "all.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["lora", "fft", "molf"]
    assert [row["ranks"] for row in rows] == ["", "", "[4, 8]"]
    assert {row["metric/score"] for row in rows} == {"1.0"}


def test_parquet(runs, tmp_path):
    gather([runs]).write_parquet(tmp_path / "new" / "all.parquet")
    table = parquet.read_table(tmp_path / "new" / "all.parquet").to_pydict()
    assert table["folder"] == [str(runs / name) for name in ("a/deep", "b", "c")]
    assert table["warmup_steps"] == [5.0, 0.1, None]  # numbers stay numbers
    assert table["seed"] == ["two", "1", None]  # words and numbers become words
    assert table["metric/score"] == [1.0] * 3


def test_nothing_to_gather(tmp_path):
    with pytest.raises(ValueError, match=r"there is no result\.json in"):
        gather([tmp_path])
    with pytest.raises(ValueError, match="there is no .*nowhere"):
        gather([tmp_path / "nowhere"])
