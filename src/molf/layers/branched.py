"""The branched form: every expert consists of real parameters; LoRA experts are adapter layers in the model.

Used if the base is frozen (MoLF-Efficient) or quantised, or if LoRA has dropout. The adapters are PEFT's. This module sees only
their parameters, so it needs torch alone.

The model holds ``B`` under the adapter's scale ``s``. With matched LoRA rates the step is the one at the levelled scale ``s*``
(``level_scales``), under which the same product has ``B* = (s / s*) B``. With ``c = s* / s``, the gradient of ``B*`` is ``c dB``,
and a change of ``B*`` is ``c`` times as large in ``B``.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from torch import Tensor

from molf.errors import MolfError
from molf.layers.base import LoraPair, RoutedLayer, init_moments, init_step, quantized_params, winners_of
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

    def set_pair(self, i: int, A: Tensor | None, B: Tensor | None) -> None:  # noqa: N803 - the paper's letters
        """Set a pair."""
        start = len(self.base) + 2 * i
        for p, value in zip(self.group["params"][start : start + 2], (A, B), strict=True):
            if value is not None:  # the other one keeps its low part, too
                self._write(p, local_part(value, p))

    def check_experts(self) -> None:
        """Check that no expert is idle: PEFT's loading and ``set_adapter`` leave one adapter active, and freeze the others."""
        idle = [
            name
            for i, name in enumerate(self.experts)
            if not any(p.requires_grad and p.grad is not None for p in self._params_of(i))
        ]
        if idle:
            raise MolfError(
                f"of the experts of {self.name}, {', '.join(idle)} would never move: adapters that are not active, or frozen, "
                "have no gradient. Loading a checkpoint into a PeftModel and its set_adapter leave one adapter active: activate "
                "all with model.base_model.set_adapter([...]) before backward. In a Trainer, molf.use_in(trainer, ...) does it "
                "whenever one is loaded"
            )

    def unlevelled(self) -> list[tuple[Tensor, float]]:
        """Return every B whose gradient is not that of its ``B*``."""
        return [
            (p, factor)
            for p, factor in zip(self._b_params, self._b_factors, strict=True)
            if p.grad is not None and factor != 1
        ]

    def b_factor(self, p: Tensor) -> float:
        """Return ``c`` of a parameter: how many times as far it moves as in the units of levelled scales; 1 unless it is a B."""
        return next((c for q, c in zip(self._b_params, self._b_factors, strict=True) if q is p), 1.0)

    @property
    def _b_params(self) -> list[Tensor]:
        return list(self.group["params"][len(self.base) + 1 :: 2])

    @property
    def _b_factors(self) -> tuple[float, ...]:
        return tuple(self.group.get("b_factors", (1.0,) * len(self.group["ranks"])))

    def _expert_tensors(self, i: int) -> list[TensorState]:
        own = [self._tensor(p) for p in self._params_of(i) if p.grad is not None]
        levelled = self.levelled
        return [x._replace(grad=levelled[id(x.param)]) if id(x.param) in levelled else x for x in own]

    def _params_of(self, i: int) -> list[Tensor]:
        if self.experts[i] == "fft":
            return self.base
        start = len(self.base) + 2 * (i - (1 if self.base else 0))
        return list(self.group["params"][start : start + 2])

    def begin_update(self, chosen: Tensor) -> list[tuple[Rates, TensorState]]:
        """Return the winners' parameters; a bias is not decayed, and B moves ``c`` times as far as ``B*``."""
        work = []
        for i in winners_of(chosen):
            for x in self.tensors(i):
                rates, factor = self._rates(i, decayed=x.param.ndim > 1), self.b_factor(x.param)
                work.append((rates._replace(lr=rates.lr * factor, weight_decay=rates.weight_decay / factor), x))
        return work

    def finish_update(self) -> None:
        """Nothing is left to do: the parameters are the experts."""
