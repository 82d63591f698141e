"""The whole step by kernels: products, moments, decision, winners, fold. The host only launches.

Whether the step is taken at all (finite gradients), the clipping factor, the step counts and the decision stay on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from molf.kernels.fold import fold_winners_
from molf.kernels.moments import Scalars, move_moments_
from molf.kernels.packed import observe_packed
from molf.kernels.products import pair_gradients
from molf.kernels.settle import settle_packed_
from molf.kernels.tables import Tables
from molf.kernels.winners import move_winners_
from molf.kernels.work import Work
from molf.layers.base import RoutedLayer
from molf.numerics.distributed import Ranks
from molf.numerics.gradients import norm_over_shards, total_norm
from molf.routing import Outcome, Routing, choose
from molf.scores import Score

__all__ = ["FusedStep", "Settings"]


class Settings(NamedTuple):
    """What an optimizer may change from step to step.

    Attributes:
        score: EPD or PFN.
        top_k: How many experts of a layer move.
        max_norm: Largest norm of all experts' gradients together to let through, None for any.
    """

    score: Score
    top_k: int
    max_norm: float | None


class FusedStep:
    """The kernels with the tables that they read, kept from step to step.

    Args:
        device: Where the model is.
    """

    def __init__(self, device: torch.device):
        self._tables = Tables(device)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._tables.device

    def take(
        self,
        layers: Sequence[RoutedLayer],
        ordinary: Sequence[dict[str, Any]],
        state: dict[Any, dict[str, Any]],
        settings: Settings,
        scale: Tensor | None,
        overflow: Tensor | None,
        ranks: Ranks,
        seed: int,
    ) -> Outcome:
        """Take the step of all layers and ordinary parameters that have gradients.

        Args:
            layers: The L routed layers, all with the same E experts and the same Adam. Their gradients, and those of ordinary
                parameters, are as ``check_gradients`` wants them.
            ordinary: Groups of parameters that take plain AdamW.
            state: The optimizer's, with the entries of all of them.
            settings: The optimizer's.
            scale: The loss scale to divide gradients by, from a GradScaler, or None.
            overflow: Not 0 if the GradScaler found a gradient that is not finite, or None.
            ranks: Those that train the model together: all take the first's decision.
            seed: Of stochastic rounding, the same at every step.
        """
        tables = self._tables
        # Triton launches on the current device, wherever the tensors are. On a CPU this does nothing.
        with torch.cuda.device_of(tables.room):  # type: ignore[no-untyped-call]
            work = Work(layers, ordinary, state, ranks, tables.device)
            tables.room = work.room.memory
            if not work.items:
                return Outcome(None, torch.zeros((), device=tables.device), taken=True)
            first = layers[0].group if layers else ordinary[0]
            betas, eps = first["betas"], first["eps"]
            pair_gradients(work.products, tables)
            norm, scalars = _prepare(work, settings.max_norm, scale, overflow, ranks)
            torch._foreach_add_(work.counts, [scalars.go] * len(work.counts))
            pfn, packed = settings.score.name == "pfn", work.packed_steps()
            totals = move_moments_(work.moments(), work.experts, betas, eps, pfn, scalars, tables)
            if packed:
                moments = [step.packed for step in packed]
                totals += observe_packed(moments, work.experts, betas, eps, pfn, scalars, tables)
            routing = self._decide(work, layers, totals, settings, scalars, ranks) if layers else None
            won = torch.ones(work.experts, dtype=torch.int8, device=tables.device)
            if routing is not None:
                won[: work.routed] = routing.chosen.flatten()
            steps = torch.stack(work.counts)
            # A layer may have missed steps: the most of all counts is what no step before had.
            corrections, noise = _corrections(steps, betas), steps.max().long() + seed % 2**31
            for name, derived in (("pairs", True), ("rest", False)):
                move_winners_(name, work.steps(derived), won, corrections, eps, scalars, tables, noise)
            fold_winners_(work.effective, won, corrections, betas, eps, scalars, tables, noise)
            settle_packed_(packed, won, corrections, betas, eps, scalars, tables, noise)
            _count_wins(work, won, scalars)
            tables.room = tables.room.new_empty(0)
            return Outcome(routing, norm, scalars.go.bool())

    def _decide(
        self,
        work: Work,
        layers: Sequence[RoutedLayer],
        totals: Tensor,
        settings: Settings,
        scalars: Scalars,
        ranks: Ranks,
    ) -> Routing:
        shape = (len(layers), len(layers[0].experts))
        totals = totals[: work.routed]
        if ranks.shards is not None:
            ranks.sum_(totals)
        n = self._tables.numbers("scores.n", work.sizes[: work.routed], torch.float64)
        lr = self._tables.rates("scores.lr", work.rates, torch.float64)
        scores = settings.score.finish(totals.view(shape), n.view(shape), lr.view(shape))
        chosen = ranks.agree(choose(scores, settings.top_k), self._tables.device)
        names = tuple(layer.name for layer in layers)
        return Routing(names, layers[0].experts, scores, chosen, scalars.go.bool())


def _prepare(
    work: Work, max_norm: float | None, scale: Tensor | None, overflow: Tensor | None, ranks: Ranks
) -> tuple[Tensor, Scalars]:
    """Return the norm of the gradients after unscaling, and what the kernels do about it; sum those of A over the shards."""
    own, whole = (work.gradients(max_norm is not None, sharded) for sharded in (True, False))
    if ranks.shards is None:
        norm = total_norm(whole)
    else:
        norm = norm_over_shards(own, whole, overflow, work.room.shared, work.room.norms, ranks)
    factor = torch.ones_like(norm) if scale is None else scale.double().reciprocal()
    norm = norm * factor
    go = norm.isfinite()
    if overflow is not None:
        go = go & (overflow == 0)
    if max_norm is not None:
        factor = factor * (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return norm, Scalars(go.float().view(()), factor.float().view(()))


def _corrections(steps: Tensor, betas: tuple[float, float]) -> Tensor:
    t = steps.double()
    return torch.stack([1 - betas[0] ** t, (1 - betas[1] ** t).sqrt()], dim=1).float()


def _count_wins(work: Work, won: Tensor, scalars: Scalars) -> None:
    """Count the moves of the pairs, which tell whether a B is still zero."""
    if work.wins:
        counts, experts = zip(*work.wins, strict=True)
        moved = won.float() * scalars.go
        torch._foreach_add_(list(counts), [moved[expert] for expert in experts])
