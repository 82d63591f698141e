"""Whether a plan and its tables still hold, asked at every step in few calls: the host must stay ahead of the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from molf.kernels.checks import check_gradients, check_groups, share_betas_and_eps
from molf.kernels.launches import Launches
from molf.kernels.plan import StepPlan
from molf.kernels.tables import to_device
from molf.kernels.winners import STOCHASTIC
from molf.layers.base import stand_in
from molf.layers.build import active_layers
from molf.numerics.context import StepContext
from molf.numerics.distributed import is_sharded, local

__all__ = ["Prepared", "are_at"]


class Prepared:
    """A plan with its tables, and what they were made for.

    Between steps it holds no gradient, but room for those in other units.

    Args:
        groups: The groups of the step.
        context: Of the step.
        device: The model's.

    Attributes:
        grads: The gradients of this step by parameter, this rank's parts; None where there is none. Where backward leaves them
            in other units than those of levelled scales, room for copies; ``unlevelled`` has what backward left.
        grad_table: Their addresses, and where those of pairs lie in their buffer; ``inside`` is 1 for the latter, else 0.
        adamw: What PyTorch's fused AdamW is given with all ordinary parameters, on the host.
        powers: Both betas; ``settings`` are what kernels make of them, and eps.
        rates: The learning rates of all entries, float32.
        score_rates: The learning rates to score by, ``[L, E]`` float64.

    Raises:
        MolfError: If the kernels cannot take the step.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], context: StepContext, device: torch.device):
        check_groups(groups, context.score)
        layers = active_layers(groups, context.state)
        check_gradients(p for group in groups for p in group["params"])
        self.device = device
        self.plan = plan = StepPlan(layers, groups, context, device)
        self._settings = _settings(groups, context)
        self._params = [p for group in groups for p in group["params"]]
        self._had = [p.grad is not None for p in self._params]
        self.is_sharded = [is_sharded(p) for p in self._params]
        self._sharded = any(self.is_sharded)
        self._kept = [list(context.state.get(p, {}).items()) for p in self._params]
        self.owned = [entry.owner for entry in plan.entries[: plan.owned]]
        self.moving = sorted({*self.owned, *(i for own in plan.ordinary for i in own.owners)})
        self._addresses = [local(self._params[i]).data_ptr() for i in self.owned]
        grads: list[Any] = [None if p.grad is None else local(p.grad) for p in self._params]
        self._room = {i: torch.empty_like(grads[i]) for i, _ in plan.levelled}
        self._take(grads)
        self._make_grad_table(self._addresses_of(self.grads))
        self.launches = Launches(plan, self._grad_addresses, device)
        self._make_fixed_tables(groups)
        self._on_host: list[float | None] = []
        self._betas_and_eps: tuple[Any, ...] = ()
        self._update_rates(groups)
        self._update_betas_and_eps(groups[0])

    def is_current(self, groups: Sequence[dict[str, Any]], context: StepContext) -> bool:
        """Return whether the tables hold for a step, but for other addresses of gradients and other rates."""
        params = [p for group in groups for p in group["params"]]
        if len(params) != len(self._params) or _settings(groups, context) != self._settings:
            return False
        own, grads, state = params, [p.grad for p in params], context.state
        if self._sharded:
            own, grads = [local(p) for p in params], [None if grad is None else local(grad) for grad in grads]
        try:
            for p, q, x, grad, had, kept in zip(params, self._params, own, grads, self._had, self._kept, strict=True):
                if p is not q or (grad is not None) is not had:
                    return False
                if grad is not None and (grad.dtype is not x.dtype or not grad.is_contiguous()):
                    return False
                entries = state[p] if kept else {}
                for key, tensor in kept:
                    if entries[key] is not tensor:
                        return False
        except KeyError:  # of a state that was loaded
            return False
        if not are_at([own[i] for i in self.owned], self._addresses):
            return False
        self._take(grads)
        self._now = self._addresses_of(self.grads)
        return self.launches.still_aligned(self._now)

    def _take(self, grads: list[Any]) -> None:
        self.unlevelled = [grads[i] for i in self._room]
        for i, room in self._room.items():
            grads[i] = room
        self.grads = grads

    def refresh(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Follow gradients that have moved, rates on the host, betas and eps; return whether a table was copied for it."""
        moved = self._now != self._grad_addresses
        if moved:
            self._make_grad_table(self._now)
        return any([self._update_rates(groups), self._update_betas_and_eps(groups[0]), moved])

    def _addresses_of(self, tensors: Sequence[Tensor | None]) -> list[int]:
        """Return the addresses of what kernels read and write by address, given a tensor for every parameter."""
        return list(map(torch.Tensor.data_ptr, [tensors[i] for i in self.owned]))  # type: ignore[arg-type]

    def _make_grad_table(self, addresses: list[int]) -> None:
        self._grad_addresses = addresses
        self.grad_table = to_device(addresses + self.plan.gradients.offsets, torch.int64, self.device)

    def _make_fixed_tables(self, groups: Sequence[dict[str, Any]]) -> None:
        """Make what does not change between steps."""
        plan, entries = self.plan, self.plan.entries
        self.inside = to_device([i >= plan.owned for i in range(len(entries))], torch.int64, self.device)
        # Rates: of all entries, their products with the decays, and of all routed experts.
        self._group = to_device([entry.group for entry in entries] * 2 + plan.expert_groups, torch.int64, self.device)
        shares = [entry.ratio for entry in entries], [entry.ratio * entry.decay for entry in entries]
        self._shares = to_device([*shares[0], *shares[1], *plan.expert_ratios], torch.float64, self.device)
        stand_ins = [stand_in(groups[i]) * x for i, x in zip(plan.expert_groups, plan.expert_ratios, strict=True)]
        self._stand_ins = to_device(stand_ins, torch.float64, self.device)
        self.n = to_device(plan.n, torch.float64, self.device).view(len(plan.names), -1 if plan.names else 0)
        self.unknown = torch.full_like(self.n, torch.nan)
        self.always = torch.ones(plan.experts - plan.routed, dtype=torch.float32, device=self.device)
        self.one = torch.ones((), dtype=torch.float32, device=self.device)
        self.draws = any(entry.storage == STOCHASTIC for entry in entries)

    def _update_betas_and_eps(self, group: dict[str, Any]) -> bool:
        """Bring what all groups share up to date and return whether a table was copied."""
        (beta1, beta2), eps = group["betas"], group["eps"]
        changed = (beta1, beta2, eps) != self._betas_and_eps
        if changed:
            self._betas_and_eps = beta1, beta2, eps
            self.powers = to_device([beta1, beta2], torch.float64, self.device)
            self.settings = to_device([1 - beta1, beta2, 1 - beta2, eps], torch.float32, self.device)
            self.adamw = {"beta1": beta1, "beta2": beta2, "eps": eps, "amsgrad": False, "maximize": False}
        return changed

    def _update_rates(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Bring the rates up to date and return whether a table was copied; tensors on the device are read at every step."""
        lrs: list[Any] = [group["lr"] for group in groups]
        live = {id(lr): lr.view(()) for lr in lrs if isinstance(lr, Tensor) and lr.device == self.device}
        on_host = [None if id(lr) in live else float(lr) for lr in lrs]
        copied = on_host != self._on_host
        if copied:
            self._on_host = on_host
            self._lr_table = to_device([lr or 0.0 for lr in on_host], torch.float64, self.device)
        self.lrs, lr_of_group = lrs, self._lr_table
        if live:
            now = {key: lr.double() for key, lr in live.items()}
            lr_of_group = torch.stack([now.get(id(lr), own) for lr, own in zip(lrs, lr_of_group.unbind(), strict=True)])
            self.lrs = [live[id(lr)].float() if id(lr) in live else lr for lr in lrs] if self.plan.ordinary else lrs
        if copied or live:
            every, count = lr_of_group.index_select(0, self._group) * self._shares, 2 * len(self.plan.entries)
            self.rates, scored = every[:count].float(), every[count:]
            if live or 0.0 in on_host:
                scored = scored.where(scored != 0, self._stand_ins)
            self.score_rates = scored.view_as(self.n)
        return copied


def _settings(groups: Sequence[dict[str, Any]], context: StepContext) -> list[Any]:
    """Return what a plan takes from groups and context, beside parameters, rates, betas and eps."""
    keys, routed = ("weight_decay",), ("lora_weight_decay", "lora_lr_ratio", "scales", "b_factors")
    own = [tuple(map(group.get, keys + routed if "module" in group else keys)) for group in groups]
    return [type(context.score), context.ranks, share_betas_and_eps(groups), *own]


def are_at(tensors: list[Tensor], addresses: list[int]) -> bool:
    """Return whether tensors are where they were. PyTorch's CUDA builds compare all in one call."""
    if compare := getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None):
        return bool(compare(tensors, addresses, list(range(len(tensors)))))
    return list(map(torch.Tensor.data_ptr, tensors)) == addresses
