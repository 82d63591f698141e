"""Tests of the kernels: on a GPU if there is one, else in Triton's interpreter; skipped without Triton."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def tables():
    from molf.kernels.tables import Tables

    return Tables(DEVICE)


@pytest.fixture
def scalars():
    from molf.kernels.moments import Scalars

    return Scalars(go=torch.ones((), device=DEVICE), clip=torch.full((), 0.5, device=DEVICE))
