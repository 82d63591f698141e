import dataclasses
import json
import shutil
import subprocess

import pytest

from molf.study.results import result as results
from molf.study.results.result import library_versions, read_result, source_commit, write_result
from molf.tasks.base import Metric
from small_runs import small_result


@pytest.fixture
def result():
    metrics = {"score": Metric(50.0, 12, 40.0, 60.5), "other": Metric(1.5, 4)}
    return small_result(
        config={"method": "molf", "ranks": [4, 8], "limit": None},
        metrics=metrics,
        routing={"fft": 0.25, "lora_r4": 0.75},
        seconds=1.5,
        peak_memory_bytes=None,
    )


def test_a_result_survives_its_file(result, tmp_path):
    path = write_result(tmp_path, result)
    assert path.name == "result.json"
    assert read_result(tmp_path) == read_result(path) == result
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_an_evaluation_has_no_training(result, tmp_path):
    evaluation = dataclasses.replace(result, training=None, routing=None, metrics_before=None)
    write_result(tmp_path, evaluation)
    assert read_result(tmp_path) == evaluation
    assert not [name for name in evaluation.row() if name.startswith(("training/", "routing/", "before/"))]


def test_a_row_is_flat(result):
    row = result.row()
    assert row["ranks"] == "[4, 8]"
    assert row["metric/score"] == 50.0
    assert row["metric/score/n"] == 12
    assert (row["metric/score/low"], row["metric/score/high"]) == (40.0, 60.5)
    assert "metric/other/low" not in row
    assert row["before/score"] == 25.0
    assert row["training/steps"] == 6
    assert row["routing/fft"] == 0.25
    assert not [value for value in row.values() if isinstance(value, list | dict)]


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"metrics": {}, "unknown": 1}'])
def test_what_is_no_result_is_refused(content, tmp_path):
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(ValueError, match="is not a result of this version"):
        read_result(tmp_path)


def test_an_unfinished_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no finished run"):
        read_result(tmp_path)


def test_versions_are_all_known():
    versions = library_versions()
    assert {"molf", "torch", "transformers", "trl", "peft"} <= set(versions)
    assert all(versions.values())


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A git repository with this package's results module in it."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    module = tmp_path / "results.py"
    module.write_text("")
    for command in (
        ["init", "-q"],
        ["add", "results.py"],
        ["-c", "user.name=x", "-c", "user.email=x@x", "commit", "-q", "-m", "x"],
    ):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    monkeypatch.setattr(results, "__file__", str(module))
    return tmp_path


def test_the_commit_of_a_checkout(checkout, monkeypatch):
    head = subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert source_commit() == head
    (checkout / "results.py").write_text("changed")
    assert source_commit() == f"{head}-dirty"
    (checkout / "site-packages.py").write_text("installed here, but not part of the repository")
    monkeypatch.setattr(results, "__file__", str(checkout / "site-packages.py"))
    assert source_commit() is None


def test_no_commit_without_git(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert source_commit() is None


def test_result_json_is_plain(result, tmp_path):
    content = json.loads(write_result(tmp_path, result).read_text())
    assert content["metrics"]["score"] == {"value": 50.0, "n": 12, "low": 40.0, "high": 60.5}
