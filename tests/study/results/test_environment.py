import shutil
import subprocess

import pytest

from molf.study.results import environment
from molf.study.results.environment import library_versions, source_commit


def test_versions_are_all_known():
    versions = library_versions()
    assert {"molf", "torch", "transformers", "trl", "peft"} <= set(versions)
    assert all(versions.values())


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A git repository with this package's environment module in it."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    module = tmp_path / "environment.py"
    module.write_text("")
    for command in (
        ["init", "-q"],
        ["add", "environment.py"],
        ["-c", "user.name=x", "-c", "user.email=x@x", "commit", "-q", "-m", "x"],
    ):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    monkeypatch.setattr(environment, "__file__", str(module))
    return tmp_path


def test_the_commit_of_a_checkout(checkout, monkeypatch):
    head = subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert source_commit() == head
    (checkout / "environment.py").write_text("changed")
    assert source_commit() == f"{head}-dirty"
    (checkout / "site-packages.py").write_text("installed here, but not part of the repository")
    monkeypatch.setattr(environment, "__file__", str(checkout / "site-packages.py"))
    assert source_commit() is None


def test_no_commit_without_git(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert source_commit() is None
