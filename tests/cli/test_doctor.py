import importlib.metadata

import pytest

import molf
from molf.cli import main
from molf.study import doctor


@pytest.fixture
def only_torch(monkeypatch):
    """An environment without a package of the train extra."""
    version = importlib.metadata.version

    def found(name):
        if name != "torch":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", found)


def test_a_complete_environment(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "models", lambda: {"bundled:one": None, "bundled:two": "pip install two"})
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"molf {molf.__version__}, Python 3.")
    assert f"transformers     {importlib.metadata.version('transformers')}" in shown
    assert "bundled:one              here" in shown and "bundled:two              missing: pip install two" in shown
    assert "float32          Using " in shown and "bfloat16         Using " in shown
    assert shown.endswith("everything is there\n")


def test_missing_packages_are_named_with_the_command(only_torch, capsys):
    assert main(["doctor"]) == 1
    shown = capsys.readouterr()
    assert "transformers     missing" in shown.out and "everything is there" not in shown.out
    assert shown.err.startswith("molf doctor: not everything is there: accelerate, datasets, ")
    assert shown.err.endswith("trl: pip install 'molf[train]'\n") and "torch" not in shown.err


def test_a_step_that_fails_is_a_problem(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "step_path", lambda dtype: doctor.StepPath(dtype, "no driver", False))
    assert main(["doctor"]) == 1
    assert "not everything is there: steps in torch.float32: no driver; steps in torch.bf" in capsys.readouterr().err


def test_it_takes_no_settings(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["doctor", "--limit", "4"])
    assert "unrecognized arguments: --limit 4" in capsys.readouterr().err
