"""The step by PyTorch's own kernels: prepare the gradients, route the layers, move what is not routed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from molf.layers.base import RoutedLayer
from molf.numerics.adamw import Rates, Slot, adamw_
from molf.numerics.bf16 import Noise
from molf.numerics.distributed import Ranks
from molf.numerics.gradients import prepare_gradients
from molf.optimizer.router import route
from molf.routing import Outcome
from molf.scores import Score

__all__ = ["PlainStep"]


class PlainStep:
    """A step of given layers and ordinary parameters.

    Args:
        score: What ranks the experts of a layer.
        top_k: How many of them move.
        max_norm: Largest norm of all experts' gradients together to let through, None for any.
    """

    def __init__(self, score: Score, top_k: int, max_norm: float | None):
        self._score, self._top_k, self._max_norm = score, top_k, max_norm

    def take(
        self,
        layers: Sequence[RoutedLayer],
        ordinary: Sequence[dict[str, Any]],
        state: dict[Any, dict[str, Any]],
        scale: Tensor | None,
        overflow: Tensor | None,
        ranks: Ranks,
        noise: Noise | None,
    ) -> Outcome:
        """Take the step, or leave it out whole if a gradient is not finite.

        Args:
            layers: The routed layers that have gradients, all with the same experts.
            ordinary: Groups of parameters that take plain AdamW.
            state: The optimizer's, with the entries of all of them.
            scale: The loss scale to divide gradients by, from a GradScaler, or None.
            overflow: Not 0 if the GradScaler found a gradient that is not finite, or None.
            ranks: Those that train the model together.
            noise: For stochastic rounding, None where low parts are kept.
        """
        dense = [p.grad for group in ordinary for p in group["params"] if p.grad is not None]
        dense += [grad for layer in layers for grad in layer.gradients()]
        norm = prepare_gradients(dense, layers, self._max_norm, scale, overflow, ranks)
        if overflow or not norm.isfinite():
            return Outcome(None, norm, taken=False)
        routing = route(layers, self._score, self._top_k, noise, ranks) if layers else None
        for group in ordinary:
            _adamw(group, state, noise)
        return Outcome(routing, norm, taken=True)


def _adamw(group: dict[str, Any], state: dict[Any, dict[str, Any]], noise: Noise | None) -> None:
    by_step: dict[float, list[Slot]] = {}
    for p in group["params"]:
        if p.grad is not None:
            own = state[p]
            own["step"] += 1
            by_step.setdefault(float(own["step"]), []).append(Slot.of(p, own))
    for step, slots in by_step.items():
        adamw_(slots, Rates(float(group["lr"]), group["weight_decay"], group["betas"], group["eps"], step), noise)
