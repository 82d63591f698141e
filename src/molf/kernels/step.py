"""The whole step by kernels: products, moments, decision, winners, merged weights. The host only launches.

Whether the step is taken at all (finite gradients), the clipping factor, the step counts and the decision stay on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from molf.kernels.merged_update import update_merged_weights_
from molf.kernels.moments import Scalars, update_moments_
from molf.kernels.plan import StepPlan
from molf.kernels.products import pair_gradients
from molf.kernels.quantized import score_quantized
from molf.kernels.requantize import requantize_
from molf.kernels.tables import Tables
from molf.kernels.winners import move_winners_
from molf.layers.base import RoutedLayer, level_gradients_
from molf.numerics.context import StepContext
from molf.numerics.gradients import norm_over_shards, total_norm
from molf.routing import Outcome, Routing, choose
from molf.scores import Evidence

__all__ = ["FusedStep"]


class FusedStep:
    """The kernels with their tables, which are kept from step to step.

    Args:
        device: The model's.
    """

    def __init__(self, device: torch.device):
        self._tables = Tables(device)

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self._tables.device

    def step(
        self, layers: Sequence[RoutedLayer], ordinary: Sequence[dict[str, Any]], context: StepContext, seed: int
    ) -> Outcome:
        """Take the step of all layers and ordinary parameters that have gradients.

        Args:
            layers: The L routed layers, all with the same E experts, betas and eps. All gradients pass ``check_gradients``.
            ordinary: Groups of parameters that take plain AdamW.
            context: Of the step.
            seed: For stochastic rounding, equal at every step.
        """
        level_gradients_(layers)
        tables = self._tables
        # Triton launches on the current device, wherever the tensors are. On a CPU this does nothing.
        with torch.cuda.device_of(tables.buffer):  # type: ignore[no-untyped-call]
            plan = StepPlan(layers, ordinary, context, tables.device)
            tables.buffer = plan.buffer.memory
            if not plan.entries:
                return Outcome(None, torch.zeros((), device=tables.device), taken=True)
            group = layers[0].group if layers else ordinary[0]
            betas, eps = group["betas"], group["eps"]
            pair_gradients(plan.products, tables)
            norm, scalars = _prepare(plan, context)
            torch._foreach_add_(plan.counts, [scalars.go] * len(plan.counts))
            pfn, quantized = context.score.name == "pfn", plan.quantized_steps()
            totals = update_moments_(plan.moments(), plan.experts, betas, eps, pfn, scalars, tables)
            if quantized:
                moments = [step.quantized for step in quantized]
                totals += score_quantized(moments, plan.experts, betas, eps, pfn, scalars, tables)
            routing = self._decide(plan, layers, totals, context, scalars) if layers else None
            won = torch.ones(plan.experts, dtype=torch.int8, device=tables.device)
            if routing is not None:
                won[: plan.routed] = routing.chosen.flatten()
            steps = torch.stack(plan.counts)
            # A layer may have missed steps, but the largest count is new at every step.
            corrections, noise = _corrections(steps, betas), steps.max().long() + seed % 2**31
            for name, derived in (("pairs", True), ("rest", False)):
                move_winners_(name, plan.steps(derived), won, corrections, eps, scalars, tables, noise)
            update_merged_weights_(plan.effective, won, corrections, betas, eps, scalars, tables, noise)
            requantize_(quantized, won, corrections, betas, eps, scalars, tables, noise)
            _count_updates(plan, won, scalars)
            tables.buffer = tables.buffer.new_empty(0)
            return Outcome(routing, norm, scalars.go.bool())

    def _decide(
        self, plan: StepPlan, layers: Sequence[RoutedLayer], totals: Tensor, context: StepContext, scalars: Scalars
    ) -> Routing:
        shape = (len(layers), len(layers[0].experts))
        totals = totals[: plan.routed]
        if context.ranks.shards is not None:
            context.ranks.sum_(totals)
        n = self._tables.numbers("scores.n", plan.sizes[: plan.routed], torch.float64)
        lr = self._tables.rates("scores.lr", plan.rates, torch.float64)
        names = tuple(layer.name for layer in layers)
        total = totals.view(shape)
        descent = total if context.score.sums_descent else torch.full_like(total, torch.nan)  # not asked for
        steps = torch.stack(plan.counts[: len(layers)]).double()
        scores = context.score.scores(Evidence(names, total, n.view(shape), lr.view(shape), descent, steps))
        chosen = context.ranks.broadcast_decision(choose(scores, context.top_k), self._tables.device)
        return Routing(names, layers[0].experts, scores, chosen, scalars.go.bool())


def _prepare(plan: StepPlan, context: StepContext) -> tuple[Tensor, Scalars]:
    """Return the gradient norm after unscaling and the kernels' scalars; sum the gradients of A over the shards."""
    max_norm, found_inf = context.max_grad_norm, context.found_inf
    own, whole = (plan.gradients(max_norm is not None, sharded) for sharded in (True, False))
    if context.ranks.shards is None:
        norm = total_norm(whole)
    else:
        norm = norm_over_shards(own, whole, found_inf, plan.buffer.reduced, plan.buffer.norms, context.ranks)
    factor = torch.ones_like(norm) if context.grad_scale is None else context.grad_scale.double().reciprocal()
    norm = norm * factor
    go = norm.isfinite()
    if found_inf is not None:
        go = go & (found_inf == 0)
    if max_norm is not None:
        factor = factor * (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return norm, Scalars(go.float().view(()), factor.float().view(()))


def _corrections(steps: Tensor, betas: tuple[float, float]) -> Tensor:
    t = steps.double()
    return torch.stack([1 - betas[0] ** t, (1 - betas[1] ** t).sqrt()], dim=1).float()


def _count_updates(plan: StepPlan, won: Tensor, scalars: Scalars) -> None:
    """Count the updates of the pairs, which tell whether B is nonzero."""
    if plan.update_counts:
        counts, experts = zip(*plan.update_counts, strict=True)
        updated = won.float() * scalars.go
        torch._foreach_add_(list(counts), [updated[expert] for expert in experts])
