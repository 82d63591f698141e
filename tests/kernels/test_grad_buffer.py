import pytest
import torch

from molf import MoLF
from molf.kernels.grad_buffer import GradBuffer
from molf.kernels.plan import StepPlan
from molf.layers.build import routed_layer
from molf.numerics.context import StepContext
from molf.numerics.distributed import Ranks
from small import mlp, train

CPU = torch.device("cpu")


def stepped(ranks):
    """The layers of a small model after a step, with its optimizer."""
    model = mlp(torch.float32)
    optimizer = MoLF(model, ranks=ranks)
    train(model, optimizer, 1)
    groups = [group for group in optimizer.param_groups if "module" in group]
    return [routed_layer(group, optimizer.state) for group in groups], optimizer


@pytest.mark.parametrize("ranks", [(1, 3), (2, 3)])
def test_gradients_of_pairs_are_aligned_and_disjoint(ranks):
    layers, optimizer = stepped(ranks)
    context = StepContext(optimizer.param_groups, optimizer.state, Ranks(), optimizer.score)
    plan = StepPlan(layers, [], context, CPU)
    gradients = [x for product in plan.products for x in (product.dA, product.dB)]
    starts = sorted((x.data_ptr() - plan.buffer.memory.data_ptr(), x.nbytes) for x in gradients)
    assert all(start % 16 == 0 for start, _ in starts)
    assert all(start + n <= after for (start, n), (after, _) in zip(starts, starts[1:], strict=False))
    assert starts[-1][0] + starts[-1][1] <= plan.buffer.memory.nbytes


def test_gradients_of_A_and_norms_are_reduced_in_one_piece(monkeypatch):
    monkeypatch.setattr("molf.kernels.grad_buffer.is_sharded", lambda _: True)
    layers, _ = stepped((4,))
    buffer = GradBuffer(layers, 3, CPU)
    buffer.memory[:] = 0
    for layer in layers:
        for pair in layer.pairs:
            buffer.take(pair.A, reduced=True).fill_(1)
            buffer.take(pair.B, reduced=False).fill_(2)
    buffer.norms.fill_(3)
    elements = sum(pair.A.numel() for layer in layers for pair in layer.pairs)
    assert buffer.reduced.tolist() == [1.0] * elements + [3.0] * 3
    assert (buffer.memory == 2).sum() == sum(pair.B.numel() for layer in layers for pair in layer.pairs)
