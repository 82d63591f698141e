"""How many steps were left out because a gradient was not finite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["LeftOut"]


class LeftOut:
    """Counts steps in the groups, where checkpoints keep them; those of kernels are on the device until somebody asks."""

    def __init__(self) -> None:
        self._on_device: Tensor | None = None

    def note(self, taken: bool | Tensor, groups: Sequence[dict[str, Any]]) -> None:
        """Count a step that was left out, if it was.

        Args:
            taken: Whether it was taken; after a fused step a 0-dim tensor.
            groups: The optimizer's.
        """
        if isinstance(taken, Tensor):
            if self._on_device is None or self._on_device.device != taken.device:
                self.fetch(groups)
                self._on_device = torch.zeros((), dtype=torch.int64, device=taken.device)
            self._on_device += taken.logical_not()  # in place: a CUDA graph that holds this step goes on counting
        elif not taken:
            _count(groups, 1)

    def fetch(self, groups: Sequence[dict[str, Any]]) -> int:
        """Bring the count in the groups up to date and return it; this may wait for the device."""
        if self._on_device is not None:
            _count(groups, int(self._on_device))
            self._on_device.zero_()
        return int(groups[0]["skipped_steps"])


def _count(groups: Sequence[dict[str, Any]], steps: int) -> None:
    for group in groups:
        group["skipped_steps"] += steps
