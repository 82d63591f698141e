"""The branched form: every expert is made of real parameters, LoRA experts are adapter layers in the model.

Used where the base is frozen (MoLF-Efficient), quantised, or LoRA has dropout. The adapters are PEFT's; here they are known
by their parameters alone, so this module needs torch only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from molf.layers.base import Pair, RoutedLayer, in_8_bits, init_moments, init_step
from molf.numerics.adamw import Rates, Slot
from molf.numerics.distributed import like_rows, part_of

__all__ = ["BranchedLayer"]


class BranchedLayer(RoutedLayer):
    """A layer whose group lists all experts' parameters: weight and bias if they train, then A and B of every LoRA expert."""

    @staticmethod
    def init_state(group: dict[str, Any], state: dict[Any, dict[str, Any]], keep_low: bool, optim_bits: int) -> None:
        """Create AdamW's usual entries for every parameter, and one step count for the layer."""
        init_step(state[group["params"][0]])
        for p, packed in zip(group["params"], in_8_bits(group, optim_bits), strict=True):
            init_moments(p, state[p], keep_low, packed)

    @property
    def base(self) -> list[Tensor]:
        """The base weight and bias, where the ``fft`` expert exists."""
        return list(self.group["params"][: -2 * len(self.group["ranks"])])

    @property
    def pairs(self) -> list[Pair]:
        """The adapters' live parameters, in their order."""
        lora = [p.detach() for p in self.group["params"][len(self.base) :]]
        return [Pair(A, B, s) for A, B, s in zip(lora[::2], lora[1::2], self.group["scales"], strict=True)]

    def base_weight(self) -> Tensor:
        """Return ``W`` itself, or its float32 value where it is bf16."""
        return like_rows(self._full(self.base[0]), self.base[0])

    def set_base_weight(self, value: Tensor) -> None:
        """Set ``W``."""
        self._write(self.base[0], part_of(value, self.base[0]))

    def set_pair(self, i: int, A: Tensor, B: Tensor) -> None:  # noqa: N803 - the paper's letters
        """Set a pair."""
        start = len(self.base) + 2 * i
        for p, value in zip(self.group["params"][start : start + 2], (A, B), strict=True):
            self._write(p, part_of(value, p))

    def _find_slots(self, i: int) -> list[Slot]:
        if self.experts[i] == "fft":
            own = self.base
        else:
            start = len(self.base) + 2 * (i - (1 if self.base else 0))
            own = self.group["params"][start : start + 2]
        return [self._slot(p) for p in own if p.grad is not None]

    def begin_update(self, winners: Sequence[int]) -> list[tuple[Rates, Slot]]:
        """Return the winners' parameters; a bias is not decayed."""
        return [(self._rates(i, decayed=slot.param.ndim > 1), slot) for i in winners for slot in self.slots(i)]

    def finish_update(self) -> None:
        """Nothing is left: the parameters are the experts."""
