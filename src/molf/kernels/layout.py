"""Many matrices in one buffer, each aligned to 64 bytes: as wide as rows of 8-bit codes are read."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

__all__ = ["Layout"]

_MULTIPLE = 16


class Layout:
    """Places of float32 tensors in a flat buffer, one behind the other; gaps have arbitrary content.

    Args:
        device: Of the buffer.

    Attributes:
        numel: Elements of the buffer.
    """

    def __init__(self, device: torch.device):
        self.numel, self._one = 0, torch.empty((), device=device)
        self._keys: list[Hashable] = []
        self._shapes: list[Tensor] = []

    def place(self, key: Hashable, shape: Sequence[int]) -> int:
        """Add a tensor and return its first element."""
        first = self.numel
        self._add(key, shape)
        if gap := -self.numel % _MULTIPLE:
            self._add(None, (gap,))
        return first

    def _add(self, key: Hashable, shape: Sequence[int]) -> None:
        self._keys.append(key)
        self._shapes.append(self._one.expand(tuple(shape)))  # costs no memory
        self.numel += self._shapes[-1].numel()

    def views(self, buffer: Tensor) -> dict[Hashable, Tensor]:
        """Return all tensors by key, in a buffer of ``numel`` elements; one call for all of them."""
        return dict(zip(self._keys, torch._C._nn.unflatten_dense_tensors(buffer, self._shapes), strict=True))
