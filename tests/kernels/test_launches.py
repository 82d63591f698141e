"""Blocks of work: all of them, each once, in whatever order, on whatever was in memory before."""

import pytest
import torch

from fused import DEVICE, quantizable
from molf import MoLF
from molf.kernels import launches
from molf.kernels.layout import Layout
from molf.kernels.tables import blocks_of
from small import differing, mlp, snapshot


def test_blocks_cover_every_tensor_once_and_leave_empty_ones_out():
    assert blocks_of([(3, 2, 4), (1, 0, 6), (5, 1, 0)], 10).tolist() == [[3, 0, 4], [3, 10, 5], [5, 0, 0]]
    assert blocks_of([(0, 0, 0)], 4).shape == (0, 3)


def test_tensors_in_a_buffer_are_aligned_and_disjoint(device):
    layout = Layout(device)
    places = [layout.place(key, shape) for key, shape in enumerate(((3, 5), (0,), (4, 4), (1, 1)))]
    views = layout.views(torch.zeros(layout.numel, device=device))
    for value, first in enumerate(places):
        views[value].fill_(value)
        assert first % 16 == 0
    assert [views[i].unique().tolist() for i in range(4)] == [[0.0], [], [2.0], [3.0]]
    assert [tuple(views[i].shape) for i in range(4)] == [(3, 5), (0,), (4, 4), (1, 1)]


@pytest.mark.parametrize(
    ("make", "dtype", "options"),
    [(mlp, torch.float32, {}), (mlp, torch.bfloat16, {}), (quantizable, torch.bfloat16, {"optim_bits": 8})],
    ids=["float32", "bf16", "8 bits"],
)
def test_neither_the_order_of_programs_nor_old_memory_matters(make, dtype, options, monkeypatch):
    ends, in_order = [], launches.blocks_of

    def shuffled(*args):
        blocks = in_order(*args)
        return blocks[torch.randperm(len(blocks))]

    for other in (False, True):
        if other:
            monkeypatch.setattr(launches, "blocks_of", shuffled)
        torch.use_deterministic_algorithms(other, warn_only=True)  # fills new memory with NaN
        try:
            model = make(dtype).to(DEVICE)
            torch.manual_seed(1)
            optimizer = MoLF(model, ranks=(2, 4), lr=1e-2, lora_lr=2e-2, fused=True, **options)
            for t in range(2):
                generator = torch.Generator().manual_seed(t)
                for p in model.parameters():
                    p.grad = torch.randn(p.shape, generator=generator).to(p)
                optimizer.step()
        finally:
            torch.use_deterministic_algorithms(False)
        ends.append((snapshot(model, optimizer), optimizer.routing.scores))
    assert not differing(ends[0][0], ends[1][0]) and torch.equal(ends[0][1], ends[1][1])
