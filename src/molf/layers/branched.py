"""The branched form: every expert consists of real parameters; LoRA experts are adapter layers in the model.

Used if the base is frozen (MoLF-Efficient) or quantised, or if LoRA has dropout. The adapters are PEFT's. This module sees only
their parameters, so it needs torch alone.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

from torch import Tensor

from molf.layers.base import LoraPair, RoutedLayer, init_moments, init_step, quantized_params
from molf.numerics.adamw import Rates, TensorState
from molf.numerics.distributed import local_part, shard_rows_like

__all__ = ["BranchedLayer"]


class BranchedLayer(RoutedLayer):
    """A layer whose group lists all experts' parameters: weight and bias if they train, then A and B of every LoRA expert."""

    @staticmethod
    def init_state(
        group: dict[str, Any], state: MutableMapping[Any, dict[str, Any]], keep_low: bool, optim_bits: int
    ) -> None:
        """Create AdamW's usual entries for every parameter, and one step count for the layer."""
        init_step(state[group["params"][0]])
        for p, quantized in zip(group["params"], quantized_params(group, optim_bits), strict=True):
            init_moments(p, state[p], keep_low, quantized)

    @property
    def base(self) -> list[Tensor]:
        """The base weight and bias, if the ``fft`` expert exists."""
        return list(self.group["params"][: -2 * len(self.group["ranks"])])

    @property
    def pairs(self) -> list[LoraPair]:
        """The adapters' live parameters in order."""
        lora = [p.detach() for p in self.group["params"][len(self.base) :]]
        return [LoraPair(A, B, s) for A, B, s in zip(lora[::2], lora[1::2], self.group["scales"], strict=True)]

    def base_weight(self) -> Tensor:
        """Return ``W`` itself, or the float32 value of a bf16 one."""
        return shard_rows_like(self._load(self.base[0]), self.base[0])

    def set_base_weight(self, value: Tensor) -> None:
        """Set ``W``."""
        self._write(self.base[0], local_part(value, self.base[0]))

    def set_pair(self, i: int, A: Tensor, B: Tensor) -> None:  # noqa: N803 - the paper's letters
        """Set a pair."""
        start = len(self.base) + 2 * i
        for p, value in zip(self.group["params"][start : start + 2], (A, B), strict=True):
            self._write(p, local_part(value, p))

    def _expert_tensors(self, i: int) -> list[TensorState]:
        if self.experts[i] == "fft":
            own = self.base
        else:
            start = len(self.base) + 2 * (i - (1 if self.base else 0))
            own = self.group["params"][start : start + 2]
        return [self._tensor(p) for p in own if p.grad is not None]

    def begin_update(self, winners: Sequence[int]) -> list[tuple[Rates, TensorState]]:
        """Return the winners' parameters; a bias is not decayed."""
        return [(self._rates(i, decayed=x.param.ndim > 1), x) for i in winners for x in self.tensors(i)]

    def finish_update(self) -> None:
        """Nothing is left to do: the parameters are the experts."""
