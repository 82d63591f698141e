from functools import partial

import torch

from kinds import branched, even, kind
from small import mlp


def test_equal_steps_are_of_one_kind():
    assert kind() == kind(make=partial(mlp, seed=4))


def test_steps_that_other_kernels_take_are_of_others():
    others = [
        kind(),
        kind(torch.bfloat16),
        kind(ranks=(2, 4)),
        kind(optim_bits=8),
        kind(score="pfn"),
        kind(bf16_update="stochastic"),
        kind(make=even),
        kind(make=branched, ranks=None),
    ]
    assert len(set(others)) == len(others)


def test_odd_sizes_are_a_kind_of_their_own():
    assert not kind(make=even, ranks=(16,)).odd
    assert kind(make=even, ranks=(2,)).odd and kind().odd
