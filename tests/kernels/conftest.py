"""Tests of the kernels: on a GPU if there is one, else in Triton's interpreter; skipped without Triton."""

import contextlib

import pytest
import torch

from emulated_tf32 import EmulatedTF32

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.fixture(params=["float32", "tf32"])
def tensor_cores(request):
    """Whether products have TF32's error, and a test a GPU's tolerance: once without it, once with it emulated."""
    on_gpu = torch.cuda.is_available()
    if on_gpu and request.param == "float32":
        pytest.skip("a GPU multiplies in TF32")
    with contextlib.nullcontext() if on_gpu or request.param == "float32" else EmulatedTF32():
        yield request.param == "tf32"


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
