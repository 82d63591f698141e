"""The whole step by kernels: products, moments, decision, winners, merged weights. The host only launches.

Whether the step is taken at all (finite gradients), the clipping factor, the step counts and the decision stay on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from molf.kernels.launches import Chunk
from molf.kernels.moments import COHERENCE, EPD, PFN
from molf.kernels.pairs import pair_gradients
from molf.kernels.prepared import Prepared
from molf.kernels.tables import GRAD, WON, Launch, launch
from molf.numerics.context import StepContext
from molf.numerics.gradients import norm_over_shards, total_norm
from molf.numerics.tf32 import tf32_products
from molf.routing import Outcome, Routing, choose
from molf.scores import Evidence

__all__ = ["FusedStep"]


class FusedStep:
    """The kernels with what is kept from step to step on a device."""

    def __init__(self, device: torch.device):
        self.device = device
        self._prepared: Prepared | None = None
        self._captured: list[Any] = []

    def prepare(self, groups: Sequence[dict[str, Any]], context: StepContext) -> None:
        """Look at what a step will work on, and make the tables that have changed.

        Raises:
            MolfError: If the kernels cannot take the step; nothing has changed then.
            RuntimeError: If a table has changed while a CUDA graph is being captured.
        """
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        made = self._prepared
        current = made is not None and made.is_current(groups, context) and not (made.refresh(groups) and capturing)
        if capturing and not current:
            raise RuntimeError(
                "a table has changed since the last step, which a CUDA graph cannot follow: before capturing, take two steps "
                "with the gradients in the tensors that will hold them at every replay, and let rates that change be tensors on "
                "the device"
            )
        if not current:
            self._prepared = None  # the old tables go first
            self._prepared = Prepared(groups, context, self.device)
        elif capturing and made is not None:
            # The graph reads these very tables at every replay, even after others have replaced them here.
            self._captured.append(dict(vars(made)))

    def step(self, context: StepContext, seed: int) -> Outcome:
        """Take the step that ``prepare`` looked at; ``seed`` is for stochastic rounding and equal at every step."""
        prepared = self._prepared
        assert prepared is not None, "prepare comes first"
        try:
            # Triton launches on the current device, wherever the tensors are. On a CPU this does nothing.
            with torch.cuda.device_of(prepared.one), tf32_products(self.device):  # type: ignore[no-untyped-call]
                return _Step(prepared, context, seed).take()
        finally:
            prepared.grads = prepared.unlevelled = []


class _Step:
    """One step: what its phases share."""

    def __init__(self, made: Prepared, context: StepContext, seed: int):
        self._made, self._plan, self._tables, self._context = made, made.plan, made.launches, context
        self._seed, self._device = seed, made.device
        self._kind = {"pfn": PFN, "coherence": COHERENCE}.get(context.score.name, EPD)

    def take(self) -> Outcome:
        plan = self._plan
        if not plan.counts:
            return Outcome(None, torch.zeros((), dtype=torch.float32, device=self._device), taken=True)
        if own := plan.levelled:
            grads = [self._made.grads[i] for i, _ in own]
            torch._foreach_copy_(grads, self._made.unlevelled)
            torch._foreach_mul_(grads, [factor for _, factor in own])
        buffer = torch.empty(plan.gradients.numel, dtype=torch.float32, device=self._device)
        norm = self._prepare_gradients(buffer)
        torch._foreach_add_(plan.counts, [self._go] * len(plan.counts))
        steps = torch.stack(plan.counts)
        sums = self._update_moments() if plan.entries else torch.empty(0)
        del buffer  # its memory serves as operands
        routing = self._decide(sums, steps) if plan.names else None
        self._move(routing, steps)
        if not self._has_norm:
            squares = sums[1].sum().sqrt()  # of the gradients that dB stood for
            norm = torch.where(self._taken, squares if norm is None else norm.hypot(squares), self._finite)
        return Outcome(routing, norm, self._taken)

    def _prepare_gradients(self, buffer: Tensor) -> Any:
        """Compute the gradients of pairs, decide whether the step is taken, and return the norm of the gradients.

        Without clipping, loss scales, shards and coherence, dB tells whether G is finite. The norm is then that of the other
        gradients, None without others, and ``update_moments`` adds what is missing.
        """
        made, plan, context = self._made, self._plan, self._context
        dAs, dBs, norms = plan.gradients.views(buffer)
        pair_gradients(plan.pairs, [made.grads[i] for i in made.owned], dAs, dBs)
        torch.add(made.grad_table, made.inside, alpha=buffer.data_ptr(), out=self._tables.rows[:, GRAD.value])
        clip, shards = context.max_grad_norm is not None, context.ranks.shards is not None
        scaled = context.found_inf is not None or context.grad_scale is not None
        self._has_norm = clip or shards or scaled or not plan.pairs or self._kind == COHERENCE
        dense = set() if self._has_norm else {made.owned[i] for i in plan.effective}
        parts = [(made.grads[i], made.is_sharded[i]) for i in made.moving if i not in dense]
        if clip:
            sharded = [plan.entries[A.weight].sharded for A, _ in plan.pairs]
            parts += [*zip(dBs, sharded, strict=True), *((dA, False) for dA in dAs)]
        if shards:
            own, whole = ([grad for grad, sharded in parts if sharded is wanted] for wanted in (True, False))
            reduced = buffer[: plan.gradients.reduced]
            norm: Any = norm_over_shards(own, whole, context.found_inf, reduced, norms.zero_(), context.ranks)
        else:
            norm = total_norm([grad for grad, _ in parts]) if parts else None
        self._finite = norm
        if not self._has_norm:
            found = total_norm(dBs)
            self._finite = found if norm is None else norm + found
        return self._set_scalars(norm)

    def _set_scalars(self, norm: Any) -> Any:
        """Say on the device whether the step is taken and what gradients are multiplied with; return the unscaled norm."""
        context, factor = self._context, self._made.one
        if context.grad_scale is not None:
            factor = context.grad_scale.double().reciprocal().view(())
            norm = self._finite = norm * factor
        self._taken = self._finite < torch.inf
        if context.found_inf is not None:
            self._taken = self._taken & (context.found_inf == 0).view(())
        if context.max_grad_norm is not None:
            factor = factor * (context.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        self._go = self._taken.float()
        self._scalars = torch.cat([self._go.view(1), factor.float().view(1), self._made.settings])
        return norm

    def _update_moments(self) -> Tensor:
        """Update all moments and return both sums of every routed expert, ``[2, L E]`` float64."""
        sums = torch.zeros(self._tables.slots, 2, dtype=torch.float32, device=self._device)
        for what in self._tables.moments:
            launch(what, self._tables.rows, sums, self._scalars, KIND=self._kind)
        totals = torch.empty(2, self._plan.routed, dtype=torch.float64, device=self._device)
        launch(self._tables.sums, sums, *totals.unbind())
        return totals

    def _decide(self, sums: Tensor, steps: Tensor) -> Routing:
        context, made, names, experts = self._context, self._made, self._plan.names, self._plan.expert_names
        if context.ranks.shards is not None:
            context.ranks.sum_(sums)
        (total, other), steps = sums.view(2, *made.n.shape).unbind(), steps[: len(names)].double()
        descent = made.unknown if self._kind == PFN else total  # PFN does not ask for it
        total = other if self._kind == COHERENCE else total
        scores = context.score.scores(Evidence(names, total, made.n, made.score_rates, descent, steps))
        chosen = context.ranks.broadcast_decision(choose(scores, context.top_k), self._device)
        return Routing(names, experts, scores, chosen, self._taken)

    def _move(self, routing: Routing | None, steps: Tensor) -> None:
        """Take the step of the winners and of ordinary parameters, and count what was updated."""
        made, plan, tables, go = self._made, self._plan, self._tables, self._go
        won = [made.always] if routing is None else [routing.chosen.view(-1), made.always]
        self._moves = tables.moves(won, 1 - made.powers.pow(steps.unsqueeze(1)), made.rates)
        # A layer may have missed steps, but the largest count is new at every step.
        self._noise = steps.max().long() + self._seed % 2**31 if made.draws else go
        self._move_ordinary()
        for what in tables.early:
            self._launch_winners(what, go)
        for chunk in tables.chunks:
            self._move_chunk(chunk)
        if plan.update_counts:
            updated = self._moves[plan.owned :: 2, WON.value] * go
            torch._foreach_add_(plan.update_counts, list(updated.unbind()))

    def _move_chunk(self, chunk: Chunk) -> None:
        """Move the pairs of some layers and add to the weights what that changes in them."""
        operands = torch.empty(chunk.operands.numel, dtype=torch.float32, device=self._device)
        for what in chunk.pairs:
            launch(what, self._tables.rows, self._moves, operands, self._scalars)
        views = chunk.operands.views(operands)
        for row, weight in chunk.weights.items():
            x, y = views[row, "X"], views[row, "Y"]
            if chunk.late:
                torch.mm(x, y, out=views[row, "XY"])
            else:
                weight.addmm_(x, y)
        for what in chunk.late:
            self._launch_winners(what, operands)

    def _launch_winners(self, what: Launch, products: Tensor) -> None:
        launch(what, self._tables.rows, self._moves, products, self._scalars, self._noise)

    def _move_ordinary(self) -> None:
        """Let PyTorch's fused AdamW move float32 parameters that are not routed; it skips the step itself."""
        made, scalars = self._made, self._scalars
        scaled = self._context.grad_scale is not None or self._context.max_grad_norm is not None
        for own in self._plan.ordinary:
            grads = [made.grads[i] for i in own.owners]
            torch._fused_adamw_(
                *(own.params, grads, own.exp_avgs, own.exp_avg_sqs, [], own.counts),
                **made.adamw,
                lr=made.lrs[own.group],
                weight_decay=own.decay,
                grad_scale=scalars[1].reciprocal() if scaled else None,
                found_inf=1 - self._go,
            )
