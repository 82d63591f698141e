"""What a run runs on."""

import platform
import sys

import torch


def device_name() -> str:
    """Return the accelerator's name, or the kind of processor."""
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def peak_memory_bytes() -> int | None:
    """Return the most memory used so far: of the accelerator where there is one, else of this process.

    None where the operating system does not tell.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB on Linux
