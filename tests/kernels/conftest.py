"""Tests of the kernels: on a GPU if there is one, else in Triton's interpreter; skipped without Triton."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
