"""Inputs that the kernels cannot take are refused with the reason, before anything has changed."""

import pytest
import torch
from torch import nn

from fused import DEVICE
from molf import MoLF
from molf.kernels.checks import check_groups, check_options
from molf.scores import EPD
from small import Prefer, differing, mlp, snapshot, train


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda grad: grad.t().contiguous().t(), r"fused=True: .*strides \(1, 13\).*contiguous.*fused=False"),
        (lambda grad: grad.to_sparse(), r"the gradient of 1\.weight is sparse, which is not supported"),
    ],
    ids=["not contiguous", "sparse"],
)
def test_gradients_that_kernels_cannot_read(change, message):
    model = mlp(torch.float32).to(DEVICE)
    optimizer = MoLF(model, ranks=(2,), fused=True)
    train(model, optimizer, 1)
    before = snapshot(model, optimizer)
    model[1].weight.grad = change(model[1].weight.grad)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert not differing(before, snapshot(model, optimizer))


def test_dtypes_and_scores_are_refused_at_once():
    with pytest.raises(ValueError, match=r"fused=True: the kernels need weights.*float64.*use fused=False"):
        MoLF(mlp(torch.float64), ranks=(2,), fused=True)
    with pytest.raises(
        ValueError, match="the kernels know the scores epd, pfn, descent, random, coherence, shuffled, not Prefer"
    ):
        MoLF(mlp(torch.float32), ranks=(2,), score=Prefer(0), fused=True)
    model = mlp(torch.float32)
    model[1].bias = nn.Parameter(model[1].bias.detach().bfloat16())
    with pytest.raises(ValueError, match="one dtype in each expert, and the tensors of 1 are torch.float32, torch.bfl"):
        MoLF(model, ranks=(2,), fused=True)


def test_a_score_that_comes_later_is_refused():
    model = mlp(torch.float32).to(DEVICE)
    optimizer = MoLF(model, ranks=(2,), fused=True)
    train(model, optimizer, 1)
    optimizer.score, before = Prefer(0), snapshot(model, optimizer)
    with pytest.raises(ValueError, match="not Prefer"):
        optimizer.step()
    assert not differing(before, snapshot(model, optimizer))


def groups_on(device, **options):
    params = [nn.Parameter(torch.zeros(2, 2, device=device))]
    return [{"params": params, "betas": (0.9, 0.999), "eps": 1e-8, **options}]


def test_devices(monkeypatch):
    with pytest.raises(ValueError, match="the kernels run on CUDA devices, and the parameters are on meta"):
        check_groups(groups_on("meta"), EPD())
    with pytest.raises(ValueError, match="on one device, and the parameters are on cpu, meta"):
        check_groups([*groups_on("meta"), *groups_on("cpu")], EPD())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="the parameters are on cpu"):
        check_groups(groups_on("cpu"), EPD())
    check_options(groups_on("cpu"), EPD())


def test_groups_of_two_settings():
    check_groups([*groups_on(DEVICE), *groups_on(DEVICE, betas=[0.9, 0.999])], EPD())
    with pytest.raises(ValueError, match="one setting of betas and eps"):
        check_groups([*groups_on(DEVICE), *groups_on(DEVICE, eps=1e-6)], EPD())
