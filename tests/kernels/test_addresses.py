import pytest
import torch

from molf.kernels.addresses import aligned


def test_sizes_and_beginnings_decide():
    x = torch.zeros(64)
    assert aligned([16, 32], [x, x[4:]], [x[32:]])
    assert not aligned([16, 24], [x]) and not aligned([16], [x], [x[1:]]) and not aligned([16], [x[2:]])
    assert aligned([])


@pytest.mark.parametrize("offset", [0, 1])
def test_gradients_of_pairs_begin_where_they_can_be_read_at_once(offset):
    """Whatever the sizes of those before them."""
    from molf import MoLF
    from molf.forms import FORMS
    from molf.kernels.work import Work
    from small import loss_of, mlp

    model = mlp(torch.float32)
    optimizer = MoLF(model, ranks=(1 + offset, 3))
    loss_of(model, 0).backward()
    optimizer.step()
    layers = [FORMS["merged"](group, optimizer.state, None) for group in optimizer.param_groups if "module" in group]
    work = Work(layers, [], optimizer.state, torch.device("cpu"))
    lent = [x for product in work.products for x in (product.dA, product.dB)]
    starts = sorted((x.data_ptr() - work.room.data_ptr(), x.nbytes) for x in lent)
    assert all(start % 16 == 0 for start, _ in starts)
    assert all(start + n <= after for (start, n), (after, _) in zip(starts, starts[1:], strict=False))
    assert starts[-1][0] + starts[-1][1] <= work.room.nbytes
