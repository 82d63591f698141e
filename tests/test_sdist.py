"""A source distribution has every file of the checkout, so that its tests run as they do here."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BY_ITSELF = {"LICENSE", "NOTICE", "README.md", "pyproject.toml", "MANIFEST.in"}  # setuptools adds these


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a git checkout")
def test_the_manifest_lists_every_file(monkeypatch):
    egg_info = pytest.importorskip("setuptools.command.egg_info")
    monkeypatch.chdir(ROOT)
    listed = egg_info.FileList()
    for line in Path("MANIFEST.in").read_text().splitlines():
        if line and not line.startswith("#"):
            listed.process_template_line(line)
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True).stdout.split()
    assert set(tracked) - BY_ITSELF <= set(listed.files)
    assert not [name for name in listed.files if name.startswith(".venv") or name.endswith(".pyc")]
