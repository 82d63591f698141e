"""Many matrices in one buffer, each aligned to 16 bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from molf.kernels.tables import ALIGNMENT

__all__ = ["Layout"]


class Layout:
    """Places of float32 tensors in a flat buffer, one behind the other; gaps have arbitrary content.

    Args:
        device: Of the buffer.
        multiple: Every tensor begins at a multiple of so many elements.

    Attributes:
        numel: Elements of the buffer.
    """

    def __init__(self, device: torch.device, multiple: int = ALIGNMENT // 4):
        self.numel, self._multiple = 0, multiple
        self._one = torch.empty((), device=device)
        self._shapes: list[Tensor] = []
        self._numbers: list[int] = []

    def place(self, shape: Sequence[int]) -> int:
        """Add a tensor and return its first element."""
        first = self.numel
        self._numbers.append(len(self._shapes))
        self._add(tuple(shape))
        if gap := -self.numel % self._multiple:
            self._add((gap,))
        return first

    def _add(self, shape: tuple[int, ...]) -> None:
        self._shapes.append(self._one.expand(shape))  # costs no memory
        self.numel += self._shapes[-1].numel()

    def views(self, buffer: Tensor) -> list[Tensor]:
        """Return all tensors, in the order of their places, in a buffer of ``numel`` elements; one call for all of them."""
        views = torch._C._nn.unflatten_dense_tensors(buffer, self._shapes)
        return [views[i] for i in self._numbers]
