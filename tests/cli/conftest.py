import pytest


@pytest.fixture
def model_folder(tiny_checkpoint, tmp_path, monkeypatch) -> str:
    """The folder of a tiny model; the current folder is an empty one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOG_FILE", raising=False)
    return tiny_checkpoint
