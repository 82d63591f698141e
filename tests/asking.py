"""On a CPU, where nothing would wait: what a step on a GPU would wait for is an error."""

import sys

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ASKING = {"item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__"}


def interpreting():
    """Whether Triton's interpreter is at work, which copies what it is given."""
    frame = sys._getframe(1)
    while frame is not None and "/triton/" not in frame.f_code.co_filename:
        frame = frame.f_back
    return frame is not None


class NoQuestions(TorchFunctionMode):
    """Every call that would wait on a GPU is an error."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func.__name__ not in ASKING or interpreting(), f"{func.__name__} waits for the device"
        return func(*args, **(kwargs or {}))


class NoScalars(TorchDispatchMode):
    """The same for what is asked inside PyTorch."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        asked = func is torch.ops.aten._local_scalar_dense.default
        assert not asked or interpreting(), "a value is asked for inside PyTorch"
        return func(*args, **(kwargs or {}))
