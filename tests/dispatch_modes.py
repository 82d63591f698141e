"""Dispatch modes: on a CPU, where nothing waits, an error for what would sync on a GPU; and a count of launches."""

import sys

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

SYNCING = {"item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__"}


def interpreting():
    """Whether Triton's interpreter is the caller, which copies its inputs."""
    frame = sys._getframe(1)
    while frame is not None and "/triton/" not in frame.f_code.co_filename:
        frame = frame.f_back
    return frame is not None


class NoSyncs(TorchFunctionMode):
    """Every call that would sync on a GPU is an error."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func.__name__ not in SYNCING or interpreting(), f"{func.__name__} waits for the device"
        return func(*args, **(kwargs or {}))


class NoScalarReads(TorchDispatchMode):
    """The same for calls inside PyTorch."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        reads = func is torch.ops.aten._local_scalar_dense.default
        assert not reads or interpreting(), "a value is read inside PyTorch"
        return func(*args, **(kwargs or {}))


class Launches(TorchDispatchMode):
    """Counts operations other than views: what PyTorch would launch on a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))
