"""What ``molf doctor`` finds: versions, the device, which kernels take steps there and why, and what is missing.

It works beside torch alone, as it must where packages are missing.
"""

import importlib.metadata
import importlib.util
import logging
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import nn

import molf
from molf.integrations.bundled import MODELS, PREFIX, cache_dir
from molf.optimizer import MoLF, kernel_choice
from molf.study.results.environment import device_name

_REQUIREMENT = re.compile(r"([\w.-]+)\s*([^;]*?)\s*(?:;(.*))?$")
_EXTRA = re.compile(r"extra\s*==\s*['\"](\w+)['\"]")
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Package:
    """A library that molf requires.

    Attributes:
        name: Its name.
        wanted: The versions that molf allows, such as ``<3,>=2.8``.
        version: The one that is installed; None if there is none.
        fits: Whether that version is allowed. True where nothing can compare versions, which comes with the extras.
    """

    name: str
    wanted: str
    version: str | None
    fits: bool = True

    @property
    def problem(self) -> str | None:
        """What is wrong with it, or None."""
        if self.version is None:
            return "missing"
        return None if self.fits else f"{self.version}, but molf needs {self.wanted}"


@dataclass(frozen=True)
class StepPath:
    """Which kernels take steps.

    Attributes:
        dtype: Of the weights.
        reason: Which kernels, and why, in the words of the optimizer; the error if no step can be taken.
        works: Whether a step was taken, and no kernel failed its self-test.
    """

    dtype: torch.dtype
    reason: str
    works: bool


def packages(extra: str | None) -> list[Package]:
    """Return what molf requires for an extra; None for the optimizer itself."""
    found = []
    for line in importlib.metadata.requires("molf") or []:
        match = _REQUIREMENT.match(line)
        assert match is not None, line
        name, wanted, marker = match.groups()
        of = _EXTRA.search(marker or "")
        if (of[1] if of else None) == extra and _applies(marker, extra):
            version = None
            with suppress(importlib.metadata.PackageNotFoundError):
                version = importlib.metadata.version(name)
            found.append(Package(name, wanted, version, version is None or _fits(version, wanted)))
    return found


def _applies(marker: str | None, extra: str | None) -> bool:
    if marker is None or not importlib.util.find_spec("packaging"):
        return True
    from packaging.markers import Marker

    return Marker(marker).evaluate({"extra": extra or ""})


def _fits(version: str, wanted: str) -> bool:
    if not importlib.util.find_spec("packaging"):
        return True
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(wanted).contains(version, prereleases=True)


def models() -> dict[str, str | None]:
    """Return the bundled models, each with the command that installs it, or None if it is there."""
    there = {
        name
        for name, model in MODELS.items()
        if importlib.util.find_spec(model.module) or (cache_dir() / name).is_dir()
    }
    return {PREFIX + name: None if name in there else model.install for name, model in MODELS.items()}


def system() -> str:
    """Return the versions of molf and Python, and the system."""
    return f"molf {molf.__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"


def device() -> torch.device:
    """Return the device that a Trainer would train on."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def device_text() -> str:
    """Return the name of the device, and why it is no GPU if it is none."""
    where = device()
    if where.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        return f"{device_name()}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    if where.type != "cpu":
        return where.type
    built = f"PyTorch is built for CUDA {torch.version.cuda} but finds no GPU" if torch.version.cuda else "no GPU build"
    return f"{device_name()}; {built}"


def step_path(dtype: torch.dtype) -> StepPath:
    """Take a step on two small layers, and return which kernels took it and why."""
    where = device()
    with _listening() as heard, torch.random.fork_rng(devices=[]):
        try:
            model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).to(where, dtype)
            optimizer = MoLF(model, ranks=(4,))
            model(torch.randn(4, 64, device=where, dtype=dtype)).square().sum().backward()
            optimizer.step()
        # Drivers, compilers and torch raise anything, and the reader is here to see it.
        except Exception as error:
            return StepPath(dtype, f"no step can be taken: {type(error).__name__}: {error}", False)
    failed = any(record.levelno >= logging.WARNING for record in heard)
    return StepPath(dtype, "; ".join(record.getMessage() for record in heard), not failed)


class _Listener(logging.Handler):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(record)


@contextmanager
def _listening() -> Iterator[list[logging.LogRecord]]:
    """Collect what the optimizer says about its choice of kernels, which it then says nowhere else."""
    handler, logger = _Listener(), kernel_choice.logger
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        yield handler.heard
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
