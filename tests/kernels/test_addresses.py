import torch

from molf.kernels.addresses import aligned


def test_aligned_if_sizes_and_addresses_are():
    x = torch.zeros(64)
    assert aligned([16, 32], [x, x[4:]], [x[32:]])
    assert not aligned([16, 24], [x]) and not aligned([16], [x], [x[1:]]) and not aligned([16], [x[2:]])
    assert aligned([])
