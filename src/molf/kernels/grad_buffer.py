"""One buffer for the gradients of the merged form's pairs, so that one all-reduce sums those of A."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from molf.kernels.addresses import ALIGNMENT
from molf.layers.merged import MergedLayer
from molf.numerics.distributed import is_sharded, local

__all__ = ["GradBuffer"]

_DTYPE = torch.float32


class GradBuffer:
    """The float32 memory of one step.

        | dA of sharded layers | a norm per shard | all dB, dA of whole layers |
        |-------- summed over the shards ---------|

    Each gradient is aligned to 16 bytes. Sizes that are no multiples of 4 leave gaps of arbitrary content.

    Args:
        layers: The merged form's; of B only this rank's rows have a gradient.
        shards: The number of shards, 0 if nothing is sharded.
        device: The model's.

    Attributes:
        memory: The whole buffer.
        reduced: The part that is summed over the shards.
        norms: One element for the norm of each shard, zeros.
    """

    def __init__(self, layers: Sequence[MergedLayer], shards: int, device: torch.device):
        sizes = {True: 0, False: 0}
        for layer in layers:
            rows, columns = local(layer.base[0]).shape
            for r in layer.group["ranks"]:
                sizes[is_sharded(layer.base[0])] += _aligned(r * columns)
                sizes[False] += _aligned(r * rows)
        self._next = {True: 0, False: _aligned(sizes[True] + shards)}
        self.memory = torch.empty(self._next[False] + sizes[False], dtype=_DTYPE, device=device)
        self.reduced = self.memory[: sizes[True] + shards]
        self.norms = self.reduced[sizes[True] :].zero_()

    def take(self, like: Tensor, reduced: bool) -> Tensor:
        """Return uninitialised memory for a gradient, to be summed over the shards or not."""
        first = self._next[reduced]
        self._next[reduced] += _aligned(like.numel())
        return self.memory[first : first + like.numel()].view_as(like)


def _aligned(elements: int) -> int:
    """Round a number of elements up so that the next tensor is aligned, too."""
    step = ALIGNMENT // _DTYPE.itemsize
    return -(-elements // step) * step
