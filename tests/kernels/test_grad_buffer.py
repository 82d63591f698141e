import pytest
import torch
from molf.layers.forms import LAYER_TYPES

from molf import MoLF
from molf.kernels.grad_buffer import GradBuffer
from molf.kernels.plan import StepPlan
from molf.numerics.distributed import Ranks
from small import loss_of, mlp

CPU = torch.device("cpu")


def stepped(ranks):
    """The layers of a small model that has taken a step, with the state of its optimizer."""
    model = mlp(torch.float32)
    optimizer = MoLF(model, ranks=ranks)
    loss_of(model, 0).backward()
    optimizer.step()
    groups = [group for group in optimizer.param_groups if "module" in group]
    return [LAYER_TYPES["merged"](group, optimizer.state, None) for group in groups], optimizer.state


@pytest.mark.parametrize("ranks", [(1, 3), (2, 3)])
def test_gradients_of_pairs_begin_where_they_can_be_read_at_once(ranks):
    """Whatever the sizes of those before them; and none reaches into another."""
    layers, state = stepped(ranks)
    work = StepPlan(layers, [], state, Ranks(), CPU)
    lent = [x for product in work.products for x in (product.dA, product.dB)]
    starts = sorted((x.data_ptr() - work.room.memory.data_ptr(), x.nbytes) for x in lent)
    assert all(start % 16 == 0 for start, _ in starts)
    assert all(start + n <= after for (start, n), (after, _) in zip(starts, starts[1:], strict=False))
    assert starts[-1][0] + starts[-1][1] <= work.room.memory.nbytes


def test_what_is_summed_is_one_piece_of_all_gradients_of_A_and_the_norms():
    layers, _ = stepped((4,))
    room = GradBuffer(layers, 3, CPU)
    room.memory[:] = 0
    for layer in layers:
        for pair in layer.pairs:
            room.lend(pair.A, shared=True).fill_(1)
            room.lend(pair.B, shared=False).fill_(2)
    room.norms.fill_(3)
    elements = sum(pair.A.numel() for layer in layers for pair in layer.pairs)
    assert room.shared.tolist() == [1.0] * elements + [3.0] * 3
    assert (room.memory == 2).sum() == sum(pair.B.numel() for layer in layers for pair in layer.pairs)
