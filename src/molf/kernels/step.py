"""The whole step by kernels: products, moments, decision, winners, merged weights. The host only launches.

Whether the step is taken at all (finite gradients), the clipping factor, the step counts and the decision stay on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from molf.kernels.launches import Chunk
from molf.kernels.moments import sum_per_expert, update_moments
from molf.kernels.pairs import move_pairs, pair_gradients
from molf.kernels.prepared import Prepared
from molf.kernels.quantized import nearest, requantize, score_quantized, values
from molf.kernels.tables import Launch, launch
from molf.kernels.winners import move_winners
from molf.numerics.context import StepContext
from molf.numerics.gradients import norm_over_shards, total_norm
from molf.numerics.tf32 import tf32_products
from molf.routing import Outcome, Routing, choose
from molf.scores import Evidence

__all__ = ["FusedStep"]


class FusedStep:
    """The kernels with what is kept from step to step.

    Args:
        device: The model's.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._place = torch.empty(0, device=device)
        self._prepared: Prepared | None = None
        self._captured: list[Any] = []

    def prepare(self, groups: Sequence[dict[str, Any]], context: StepContext) -> None:
        """Look at what a step will work on, and make the tables that have changed.

        Raises:
            MolfError: If the kernels cannot take the step; nothing has changed then.
            RuntimeError: If a table has changed while a CUDA graph is being captured.
        """
        capturing = is_capturing(self.device)
        if self._prepared is None or not self._prepared.is_current(groups, context):
            _check_capture(capturing)
            self._prepared = None  # the old tables go first
            self._prepared = Prepared(groups, context, self.device)
        elif self._prepared.refresh(groups):
            _check_capture(capturing)
        if capturing:  # the graph reads these very tables at every replay, even after others have replaced them here
            self._captured += [self._prepared, *self._prepared.changing]

    def step(self, context: StepContext, seed: int) -> Outcome:
        """Take the step of all layers and ordinary parameters that have gradients, after ``prepare``.

        Args:
            context: Of the step.
            seed: For stochastic rounding, equal at every step.
        """
        prepared = self._prepared
        assert prepared is not None, "prepare comes first"
        try:
            # Triton launches on the current device, wherever the tensors are. On a CPU this does nothing.
            with torch.cuda.device_of(self._place), tf32_products(self.device):  # type: ignore[no-untyped-call]
                return _Step(prepared, context, seed).take()
        finally:
            prepared.grads = []


def is_capturing(device: torch.device) -> bool:
    """Return whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _check_capture(capturing: bool) -> None:
    if capturing:
        raise RuntimeError(
            "a table has changed since the last step, which a CUDA graph cannot follow: before capturing, take two steps with "
            "the gradients in the tensors that will hold them at every replay, and let rates that change be tensors on the device"
        )


class _Step:
    """One step: what its phases share."""

    def __init__(self, made: Prepared, context: StepContext, seed: int):
        self._made, self._plan, self._tables, self._context = made, made.plan, made.launches, context
        self._seed, self._device = seed, made.device

    def take(self) -> Outcome:
        plan = self._plan
        if not plan.counts:
            return Outcome(None, torch.zeros((), device=self._device), taken=True)
        self._made.level_gradients_()
        buffer = torch.empty(plan.gradients.numel, device=self._device)
        norm = self._prepare_gradients(buffer)
        torch._foreach_add_(plan.counts, [self._scalars[0]] * len(plan.counts))
        steps = torch.stack(plan.counts)
        if plan.entries:
            total, squares = self._update_moments(buffer)
        else:
            total = squares = torch.zeros_like(norm)
        del buffer  # its memory serves as operands
        routing = self._decide(total, steps) if plan.names else None
        self._move(routing, steps)
        if not self._has_norm:
            norm = torch.where(self._taken, (norm.square() + squares).sqrt(), self._finite)
        return Outcome(routing, norm, self._taken)

    def _prepare_gradients(self, buffer: Tensor) -> Tensor:
        """Compute the gradients of pairs, decide whether the step is taken, and return the norm of the gradients.

        Without clipping and loss scales, dB tells whether G is finite. The norm is then that of the other gradients, and
        ``update_moments`` adds what is missing.
        """
        made, plan, context = self._made, self._plan, self._context
        dAs, dBs, norms = plan.gradients.views(buffer)
        dense = [made.grads[made.owned[i]] for i in plan.effective]
        pair_gradients(plan.pairs, dense, dAs, dBs)
        clip = context.max_grad_norm is not None
        self._has_norm = clip or context.found_inf is not None or context.grad_scale is not None or not plan.pairs
        self._has_norm |= context.ranks.shards is not None
        skipped = set() if self._has_norm else {made.owned[i] for i in plan.effective}
        left = [
            (i, grad) for i, grad in enumerate(made.grads) if grad is not None and i not in skipped and made.moves[i]
        ]
        if context.ranks.shards is not None:
            parts = [(grad, made.is_sharded[i]) for i, grad in left]
            if clip:
                sharded = [plan.entries[plan.effective[pair.layer]].sharded for pair in plan.pairs]
                parts += [*((dB, own) for dB, own in zip(dBs, sharded, strict=True)), *((dA, False) for dA in dAs)]
            own, whole = ([grad for grad, sharded in parts if sharded is wanted] for wanted in (True, False))
            reduced = buffer[: plan.gradients.reduced]
            norm = norm_over_shards(own, whole, context.found_inf, reduced, norms.zero_(), context.ranks)
        else:
            every = [grad for _, grad in left] + ([*dAs, *dBs] if clip else [])
            norm = total_norm(every) if every else torch.zeros((), dtype=torch.float64, device=self._device)
        self._set_scalars(norm, dBs)
        return norm * self._factor if self._has_norm else norm

    def _set_scalars(self, norm: Tensor, dBs: Sequence[Tensor]) -> None:
        context = self._context
        self._finite = norm if self._has_norm else norm + total_norm(dBs)
        factor = self._made.one.double() if context.grad_scale is None else context.grad_scale.double().reciprocal()
        self._factor = factor
        if self._has_norm:
            self._finite = norm * factor
        self._taken = self._finite.isfinite()
        if context.found_inf is not None:
            self._taken = self._taken & (context.found_inf == 0).view(())
        if context.max_grad_norm is not None:
            factor = factor * (context.max_grad_norm / (self._finite + 1e-6)).clamp(max=1.0)
        self._taken = self._taken.view(())
        own = torch.stack([self._taken.float(), factor.float().view(())])
        self._scalars = torch.cat([own, self._made.settings])

    def _update_moments(self, buffer: Tensor) -> tuple[Tensor, Tensor]:
        """Update all moments; return the sum of every routed expert, and the squared norm of the gradients that dB stood for."""
        made, tables = self._made, self._tables
        self._grads = made.grad_table(buffer)
        sums = torch.zeros(2, -(-tables.slots // 4) * 4, device=self._device)
        args = (tables.addresses, self._grads, tables.sizes, *sums, self._scalars)
        pfn = self._context.score.name == "pfn"
        for what in tables.moments:
            if what.quantized:
                launch(score_quantized, what, *args, values(self._device), PFN=pfn)
            else:
                launch(update_moments, what, *args, PFN=pfn)
        totals = torch.zeros(self._plan.routed, dtype=torch.float64, device=self._device)
        launch(sum_per_expert, tables.sums, sums[0], totals)
        return totals, sums[1].double().sum()

    def _decide(self, total: Tensor, steps: Tensor) -> Routing:
        context, names, experts = self._context, self._plan.names, self._plan.expert_names
        if context.ranks.shards is not None:
            context.ranks.sum_(total)
        shape = (len(names), len(experts))
        total, n, lr = total.view(shape), self._made.n.view(shape), self._made.score_rates.view(shape)
        descent = total if context.score.sums_descent else torch.full_like(total, torch.nan)  # not asked for
        scores = context.score.scores(Evidence(names, total, n, lr, descent, steps[: len(names)].double()))
        chosen = context.ranks.broadcast_decision(choose(scores, context.top_k), self._device)
        return Routing(names, experts, scores, chosen, self._taken)

    def _move(self, routing: Routing | None, steps: Tensor) -> None:
        """Take the step of the winners and of ordinary parameters, and count what was updated."""
        made, plan, tables, go = self._made, self._plan, self._tables, self._scalars[0]
        won = made.always if routing is None else torch.cat([routing.chosen.flatten(), made.always])
        self._won, t, (beta1, beta2) = won.char(), steps.double(), made.betas
        self._corrections = torch.stack([1 - beta1**t, (1 - beta2**t).sqrt()], dim=1).float()
        # A layer may have missed steps, but the largest count is new at every step.
        self._noise = steps.max().long() + self._seed % 2**31 if made.draws else go
        self._move_ordinary()
        for what in tables.early:
            self._launch_winners(what, go)
        for chunk in tables.chunks:
            self._move_chunk(chunk)
        if plan.update_counts:
            updated = self._won.index_select(0, made.update_experts) * go
            torch._foreach_add_(plan.update_counts, list(updated.unbind()))

    def _move_chunk(self, chunk: Chunk) -> None:
        """Move the pairs of some layers and add to the weights what that changes in them."""
        tables, scalars = self._tables, self._scalars
        operands = torch.empty(chunk.operands.numel, device=self._device)
        products = torch.empty(chunk.products.numel, device=self._device)
        rates = (tables.factors, self._made.rates, self._corrections, self._won)
        for what in chunk.pairs:
            launch(move_pairs, what, tables.addresses, tables.sizes, *rates, operands, scalars)
        views = chunk.operands.views(operands)
        if chunk.P:
            outs = chunk.products.views(products)
            for x, y, p in zip(chunk.X, chunk.Y, chunk.P, strict=True):
                torch.mm(views[x], views[y], out=outs[p])
        else:
            for weight, x, y in zip(chunk.weights, chunk.X, chunk.Y, strict=True):
                weight.addmm_(views[x], views[y])
        for what in chunk.late:
            self._launch_winners(what, products)

    def _launch_winners(self, what: Launch, products: Tensor) -> None:
        tables, made = self._tables, self._made
        moving = (tables.factors, made.rates, self._corrections, self._won, products)
        if what.quantized:
            codes = (values(self._device), *nearest(self._device), self._scalars, self._noise)
            launch(requantize, what, tables.addresses, self._grads, tables.sizes, *moving, *codes)
        else:
            launch(move_winners, what, tables.addresses, tables.sizes, *moving, self._scalars, self._noise)

    def _move_ordinary(self) -> None:
        """Let PyTorch's fused AdamW move float32 parameters that are not routed; it skips the step itself."""
        made, scalars = self._made, self._scalars
        scaled = self._context.grad_scale is not None or self._context.max_grad_norm is not None
        for own, numbers in zip(self._plan.ordinary, made.ordinary, strict=True):
            torch._fused_adamw_(
                [x.param for x in own.states],
                [made.grads[i] for i in numbers],
                [x.exp_avg for x in own.states],
                [x.exp_avg_sq for x in own.states],
                [],
                own.counts,
                lr=made.lrs[own.group],
                beta1=made.betas[0],
                beta2=made.betas[1],
                weight_decay=own.decay,
                eps=made.eps,
                amsgrad=False,
                maximize=False,
                grad_scale=scalars[1].reciprocal() if scaled else None,
                found_inf=1 - scalars[0],
            )
