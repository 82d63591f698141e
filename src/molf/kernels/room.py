"""One piece of memory for the gradients of the merged form's pairs; what has to be summed over shards is one piece of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from molf.kernels.addresses import ALIGNMENT
from molf.layers.merged import MergedLayer
from molf.numerics.distributed import local

__all__ = ["Room"]

_DTYPE = torch.float32


class Room:
    """Memory of one step, float32.

        | dA of every pair | a norm of each shard | dB of every pair |
        |-------- summed over the shards ---------|

    Each gradient begins where it can be read 16 bytes at once. Sizes that are no multiples of 4 leave gaps, of any content.

    Args:
        layers: The merged form's; of B only the rows that are here get a gradient.
        shards: The number of shards, 0 where nothing is sharded.
        device: Where the model is.

    Attributes:
        memory: All of it.
        shared: What is summed over the shards.
        norms: A place for the norm of each shard, zeros.
    """

    def __init__(self, layers: Sequence[MergedLayer], shards: int, device: torch.device):
        places = [
            [_place_of(r * n) for r in layer.group["ranks"] for n in local(layer.base[0]).shape] for layer in layers
        ]
        of_A, of_B = (sum(sum(own[side::2]) for own in places) for side in (1, 0))
        self._next = {True: 0, False: _place_of(of_A + shards)}
        self.memory = torch.empty(self._next[False] + of_B, dtype=_DTYPE, device=device)
        self.shared = self.memory[: of_A + shards]
        self.norms = self.shared[of_A:].zero_()

    def lend(self, like: Tensor, shared: bool) -> Tensor:
        """Return memory for the gradient of A (``shared``) or of what is here of B, of any content."""
        first = self._next[shared]
        self._next[shared] += _place_of(like.numel())
        return self.memory[first : first + like.numel()].view_as(like)


def _place_of(elements: int) -> int:
    """Return the elements that a tensor takes, so that the next one is aligned, too."""
    step = ALIGNMENT // _DTYPE.itemsize
    return -(-elements // step) * step
