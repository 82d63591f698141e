"""What the two merged forms share: the parameter is the effective weight, and the LoRA pairs are entries of its state."""

from __future__ import annotations

from torch import Tensor

from molf.layers.base import LoraPair, RoutedLayer
from molf.numerics.adamw import TensorState

__all__ = ["PairsInState"]


class PairsInState(RoutedLayer):
    """A layer, or a stack of matrices, whose pairs live in the state of its weight.

    State entries are flat tensors by name: ``lora_r8.A``, ``lora_r8.A.exp_avg``, ..., and ``lora_r8.wins``, how often a pair was
    updated.
    """

    @property
    def base(self) -> list[Tensor]:
        """The weight, which is ``W_eff``, and its bias if that trains."""
        return list(self.group["params"])

    @property
    def pairs(self) -> list[LoraPair]:
        """The live pairs in the order of the ranks."""
        entries, scales = self._state[self.base[0]], self.group["scales"]
        return [
            LoraPair(entries[f"{name}.A"], entries[f"{name}.B"], scale, b_is_nonzero=bool(entries[f"{name}.wins"]))
            for name, scale in zip(self.experts[1:], scales, strict=True)
        ]

    @property
    def active(self) -> bool:
        """Whether the weight has a gradient, from which all experts' gradients follow."""
        return self.base[0].grad is not None

    def derived_tensors(self) -> list[TensorState]:
        """Return A and B of all pairs."""
        return [tensor for i in range(1, len(self.experts)) for tensor in self.tensors(i)]

    def pair_tensor(self, i: int, key: str) -> TensorState:
        """Return A or B (``key``) of the i-th expert with its moments and without a gradient."""
        entries, name = self._state[self.base[0]], f"{self.experts[i]}.{key}"
        return TensorState(entries[name], None, entries[f"{name}.exp_avg"], entries[f"{name}.exp_avg_sq"])

    def _count_updates(self, i: int, count: int = 1) -> None:
        """Count updates of pairs. The count is on the host, so asking whether B is nonzero needs no sync."""
        self._state[self.base[0]][f"{self.experts[i]}.wins"] += count
