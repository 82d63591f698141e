"""The hardware, libraries and source that a run uses."""

import importlib.metadata
import platform
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import torch

import molf


def device_name() -> str:
    """Return the name of the accelerator, or of the processor's architecture."""
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def peak_memory_bytes() -> int:
    """Return the peak memory so far: allocated on the accelerator if there is one, else resident in this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB on Linux


def library_versions() -> dict[str, str]:
    """Return the versions of molf and of the libraries that the numbers of a run depend on."""
    libraries = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
    return {"molf": molf.__version__} | {name: importlib.metadata.version(name) for name in libraries}


def source_commit() -> str | None:
    """Return the git commit of this package's source, with ``-dirty`` after local changes; None outside a checkout."""
    if (git := shutil.which("git")) is None:
        return None
    here = Path(__file__)

    def ask(*arguments: str) -> str | None:
        answer = subprocess.run([git, "-C", str(here.parent), *arguments], capture_output=True, text=True)
        return answer.stdout.strip() if answer.returncode == 0 else None

    # Installed inside another repository, the package is not part of it.
    if ask("ls-files", "--error-unmatch", here.name) is None:
        return None
    return ask("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
