import weakref

import pytest
import torch

from dispatch_modes import Launches
from molf.kernels.tables import Rate


def test_a_table_is_made_again_only_when_something_moved(tables):
    tensors = [torch.zeros(3, device=tables.device), torch.zeros(5, device=tables.device)]
    first = tables.pointers("grads", tensors)
    assert first.tolist() == [x.data_ptr() for x in tensors]
    assert tables.pointers("grads", tensors) is first
    moved = [tensors[0], torch.zeros(5, device=tables.device)]
    assert tables.pointers("grads", moved).tolist() == [x.data_ptr() for x in moved]


def test_a_new_buffer_needs_no_new_table(tables):
    kept, buffers, copied = torch.zeros(3, device=tables.device), [], []
    for _ in range(2):
        tables.buffer = torch.empty(16, device=tables.device)
        buffers.append(tables.buffer)
        tensors = [tables.buffer[4:8], kept, tables.buffer[:4], tables.buffer[16:]]
        assert tables.pointers("grads", tensors).tolist() == [x.data_ptr() for x in tensors]
        copied.append(tables._kept["grads"])
    assert buffers[0].data_ptr() != buffers[1].data_ptr() and copied[0] is copied[1]


def test_numbers_follow_their_values(tables):
    first = tables.numbers("rates", (0.1, 0.2), torch.float32)
    assert tables.numbers("rates", (0.1, 0.2), torch.float32) is first
    torch.testing.assert_close(tables.numbers("rates", (0.1, 0.3), torch.float32).cpu(), torch.tensor([0.1, 0.3]))


def test_tables_that_a_graph_reads_stay(tables, monkeypatch):
    read = weakref.ref(tables.numbers("rates", (0.1,), torch.float32))
    with monkeypatch.context() as capturing:
        capturing.setattr("molf.kernels.tables.is_capturing", lambda device: True)
        tables.numbers("rates", (0.1,), torch.float32)
        with pytest.raises(RuntimeError, match="rates has changed since the last step, which a CUDA graph cannot fo"):
            tables.numbers("rates", (0.3,), torch.float32)
    unread = weakref.ref(tables.numbers("rates", (0.3,), torch.float32))
    tables.numbers("rates", (0.4,), torch.float32)
    assert read() is not None and unread() is None


def test_rates_on_the_device_are_read_anew(tables):
    lr = torch.tensor([0.5], device=tables.device)
    rates = (0.25, Rate(lr, 3.0), Rate(lr.view(()), 1.0))
    assert tables.rates("rates", rates).tolist() == [0.25, 1.5, 0.5]
    lr.fill_(2.0)
    assert tables.rates("rates", rates).tolist() == [0.25, 6.0, 2.0]
    assert tables.rates("fixed", (0.25, 0.5), torch.float64).tolist() == [0.25, 0.5]


def test_rates_on_the_device_take_few_launches(tables):
    """As many for hundreds of tensors as for two."""
    lr, counts = torch.tensor(0.5, device=tables.device), []
    for n in (2, 200):
        rates = [Rate(lr, 1.0 + i) for i in range(n)]
        tables.rates("rates", rates)
        with Launches() as launches:
            tables.rates("rates", rates)
        counts.append(launches.count)
    assert counts[0] == counts[1]


def test_blocks_cover_every_tensor_once_and_leave_empty_ones_out(tables):
    assert tables.blocks("b", (5, 0, 4), 4).tolist() == [[0, 0], [0, 4], [2, 0]]
    assert tables.blocks("empty", (0,), 4).shape == (0, 2)


def test_tiles_cover_every_matrix_once(tables):
    tiles = [[0, 0, 0], [0, 0, 4], [0, 2, 0], [0, 2, 4], [1, 0, 0]]
    assert tables.tiles("t", ((3, 5), (1, 1)), (2, 4)).tolist() == tiles


def test_tensors_that_are_not_contiguous_are_refused(tables):
    with pytest.raises(ValueError, match=r"contiguous.*one of grads has strides \(1, 3\).*fused=False"):
        tables.pointers("grads", [torch.zeros(2, 3, device=tables.device).t()])
