"""What the host does in a fused step, in calls: it must stay ahead of the device. Launches of Triton itself are left out."""

import sys
from collections import Counter

import pytest
import torch
from torch import nn

from fused import DEVICE
from molf import MoLF
from molf.kernels import prepared, step

SIZE, BLOCKS = 16, 28


class Block(nn.Module):
    """The parameters of a Qwen block: seven linear layers, three of them with biases, and two norms."""

    def __init__(self):
        super().__init__()
        self.linear = nn.ModuleList(nn.Linear(SIZE, SIZE, bias=i < 3) for i in range(7))
        self.norm = nn.ModuleList(nn.LayerNorm(SIZE, bias=False) for _ in range(2))


class Calls:
    """Counts calls of Python and C functions, reads of addresses also where C code makes them."""

    def __init__(self, monkeypatch):
        self.made, self.addresses, data_ptr = Counter(), 0, torch.Tensor.data_ptr

        def counted(x):
            self.addresses += 1
            return data_ptr(x)

        self._counted, self._patch = counted, monkeypatch

    def __enter__(self):
        self._patch.setattr(torch.Tensor, "data_ptr", self._counted)
        sys.setprofile(lambda frame, event, _: self.made.update((event,)))
        return self

    def __exit__(self, *_):
        sys.setprofile(None)
        self._patch.undo()

    @property
    def count(self):
        return self.made["call"] + self.made["c_call"]


@pytest.fixture
def no_launches(monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "launch", lambda *args, **constants: None)
        yield


def give_gradients(model):
    for p in model.parameters():
        p.grad = torch.zeros_like(p)


def all_at(tensors, addresses, numbers, data_ptr=torch.Tensor.data_ptr):
    """What PyTorch's CUDA builds have: compares many addresses in one call."""
    return all(data_ptr(tensors[i]) == addresses[i] for i in numbers)


def test_calls_of_a_step(no_launches, monkeypatch):
    """Calls and addresses of 28 blocks with 338 parameters, of which 280 are in routed layers, as a CUDA build makes them."""
    if DEVICE == "cpu":
        monkeypatch.setattr(torch._C, "_tensors_data_ptrs_at_indices_equal", all_at, raising=False)
    model = nn.ModuleList([nn.Embedding(32, SIZE), *(Block() for _ in range(BLOCKS)), nn.LayerNorm(SIZE, bias=False)])
    optimizer = MoLF(model.to(DEVICE), ranks=(8,), fused=True)
    for _ in range(2):
        give_gradients(model)
        optimizer.step()
    give_gradients(model)
    with Calls(monkeypatch) as calls:
        optimizer.step()
    print(f"{calls.count} calls, {calls.addresses} addresses")
    assert len(list(model.parameters())) == 338
    assert calls.count - calls.addresses <= 10_000 and calls.addresses <= 400  # counting one takes a call more


@pytest.mark.parametrize("in_one_call", [False, True])
def test_a_tensor_that_moved_is_noticed(in_one_call, monkeypatch):
    if in_one_call and DEVICE == "cpu":
        monkeypatch.setattr(torch._C, "_tensors_data_ptrs_at_indices_equal", all_at, raising=False)
    tensors = [torch.zeros(3, device=DEVICE) for _ in range(3)]
    addresses = [x.data_ptr() for x in tensors]
    assert prepared.are_at(tensors, addresses) and prepared.are_at([], [])
    tensors[2].data = torch.ones(3, device=DEVICE)
    assert not prepared.are_at(tensors, addresses)


def test_calls_of_a_layer_that_moves_in_backward(no_launches, monkeypatch):
    """Those of autograd included."""
    model = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)).to(DEVICE)
    optimizer = MoLF(model, ranks=(8,), fused=True, optimizer_in_backward=True)
    x = torch.randn(2, SIZE, device=DEVICE)
    for _ in range(2):
        model(x).sum().backward()
        optimizer.step()
    loss = model(x).sum()
    with Calls(monkeypatch) as calls:
        loss.backward()
    print(f"{calls.count} calls of two layers")
    assert 0 < calls.count <= 2 * 400
