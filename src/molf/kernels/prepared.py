"""Whether a plan and its tables still hold, asked at every step in few calls: the host must stay ahead of the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from molf.kernels.checks import check_gradients, check_groups
from molf.kernels.launches import Launches
from molf.kernels.plan import StepPlan
from molf.kernels.tables import to_device
from molf.kernels.winners import STOCHASTIC
from molf.layers.branched import BranchedLayer
from molf.layers.build import active_layers
from molf.numerics.context import StepContext
from molf.numerics.distributed import is_sharded, local

__all__ = ["Prepared"]


class Prepared:
    """A plan with its tables, and what they were made for.

    Between steps it holds no gradient.

    Args:
        groups: The groups of the step.
        context: Of the step.
        device: The model's.

    Attributes:
        grads: The gradients of this step by parameter, this rank's parts; None where there is none.
        grad_table: Their addresses, and where those of pairs lie in their buffer.
        rates: The learning rates of all entries, float32.
        score_rates: The learning rates ``[L, E]``, float64.

    Raises:
        MolfError: If the kernels cannot take the step.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], context: StepContext, device: torch.device):
        check_groups(groups, context.score)
        layers = active_layers(groups, context.state)
        check_gradients(layers, [group for group in groups if "module" not in group])
        self.device = device
        self.plan = plan = StepPlan(layers, groups, context, device)
        self.betas, self.eps = groups[0]["betas"], groups[0]["eps"]
        self._score, self._ranks, self._settings = type(context.score), context.ranks, _settings(groups)
        self._params = [p for group in groups for p in group["params"]]
        self._had = [p.grad is not None for p in self._params]
        self.is_sharded = [is_sharded(p) for p in self._params]
        self._sharded = any(self.is_sharded)
        used = {id(p) for layer in layers for p in layer.group["params"]}
        used |= {id(p) for group in groups if "module" not in group for p in group["params"] if p.grad is not None}
        self.moves = [id(p) in used for p in self._params]
        self._kept = [list(context.state[p].items()) if id(p) in used else [] for p in self._params]
        number = {id(p): i for i, p in enumerate(self._params)}
        self.owned = [number[id(entry.owner)] for entry in plan.entries[: plan.owned]]
        self.ordinary = [[number[id(p)] for p in own.owners] for own in plan.ordinary]
        self._b_grads = [
            (number[id(p)], layer.b_factor(p))
            for layer in layers
            if isinstance(layer, BranchedLayer)
            for p in layer.group["params"]
            if p.grad is not None and layer.b_factor(p) != 1
        ]
        self._addresses = self._addresses_of([local(p) for p in self._params])
        self.grads: list[Any] = [None if p.grad is None else local(p.grad) for p in self._params]
        self._grad_addresses = self._addresses_of(self.grads)
        self.launches = Launches(plan, self._grad_addresses, device)
        self._make_grad_table()
        self._make_fixed_tables()
        self._lrs: list[Any] = []
        self._update_rates(groups)

    def is_current(self, groups: Sequence[dict[str, Any]], context: StepContext) -> bool:
        """Return whether the tables hold for a step, but for other addresses of gradients and other rates."""
        params = [p for group in groups for p in group["params"]]
        if len(params) != len(self._params) or _settings(groups) != self._settings:
            return False
        if type(context.score) is not self._score or context.ranks != self._ranks:
            return False
        grads, state = [p.grad for p in params], context.state
        own = params
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
        if self._addresses_of(own) != self._addresses:
            return False
        self.grads = grads
        self._now = self._addresses_of(grads)
        return self.launches.still_aligned(self._now)

    def refresh(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Follow gradients that have moved, and rates on the host; return whether a table was copied for it."""
        copied = False
        if self._now != self._grad_addresses:
            self._grad_addresses = self._now
            self._make_grad_table()
            copied = True
        return self._update_rates(groups) or copied

    @property
    def changing(self) -> list[Tensor]:
        """The tables that ``refresh`` replaces."""
        return [self._grad_table, self.rates, self.score_rates, self._lr_table]

    def level_gradients_(self) -> None:
        """Bring gradients into the units of levelled scales, as ``level_gradients_`` does."""
        if self._b_grads:
            torch._foreach_mul_([self.grads[i] for i, _ in self._b_grads], [factor for _, factor in self._b_grads])

    def grad_table(self, buffer: Tensor) -> Tensor:
        """Return the addresses of all gradients, with those of pairs in a buffer."""
        if not self.plan.pairs:
            return self._grad_table
        return torch.add(self._grad_table, self._inside, alpha=buffer.data_ptr())

    def _addresses_of(self, tensors: Sequence[Tensor | None]) -> list[int]:
        """Return the addresses of what kernels read and write by address, given a tensor for every parameter."""
        return list(map(torch.Tensor.data_ptr, [tensors[i] for i in self.owned]))  # type: ignore[arg-type]

    def _make_grad_table(self) -> None:
        addresses = torch.tensor(self._grad_addresses + self.plan.gradients.offsets, dtype=torch.int64, device="cpu")
        self._grad_table = to_device(addresses, self.device)

    def _make_fixed_tables(self) -> None:
        """Make what depends on the plan alone."""
        plan, (beta1, beta2) = self.plan, self.betas
        inside = [0] * plan.owned + [1] * (len(plan.entries) - plan.owned)
        group = [entry.group for entry in plan.entries] + plan.expert_groups
        ratio = [entry.ratio for entry in plan.entries] + plan.expert_ratios
        made = {"inside": inside, "group": group, "experts": plan.update_experts}
        self._inside, self._group, self.update_experts = (
            to_device(torch.tensor(own, dtype=torch.int64, device="cpu"), self.device) for own in made.values()
        )
        self._ratio, self.n = (
            to_device(torch.tensor(own, dtype=torch.float64, device="cpu"), self.device) for own in (ratio, plan.n)
        )
        ordinary = plan.experts - plan.routed
        self.always = torch.ones(ordinary, dtype=torch.bool, device=self.device)
        self.one = torch.ones((), device=self.device)
        settings = torch.tensor([1 - beta1, beta2, 1 - beta2, self.eps], dtype=torch.float32, device="cpu")
        self.settings = to_device(settings, self.device)
        self.draws = any(entry.storage == STOCHASTIC for entry in plan.entries)

    def _update_rates(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Bring the rates up to date and return whether a table was copied; tensors on the device are read at every step."""
        lrs = [group["lr"] for group in groups]
        live: dict[int, Tensor] = {}
        for lr in lrs:
            if isinstance(lr, Tensor) and lr.device == self.device:
                live[id(lr)] = lr
        at = {key: i for i, key in enumerate(live)}
        # Rates on the host stand behind those on the device.
        values = [at[id(lr)] if id(lr) in at else float(lr) for lr in lrs] if live else list(map(float, lrs))
        copied = values != self._lrs
        if copied:
            self._lrs = values
            table = [0.0 if id(lr) in at else float(lr) for lr in lrs]
            self._lr_table = to_device(torch.tensor(table, dtype=torch.float64, device="cpu"), self.device)
            if live:
                place = [at.get(id(lr), len(live) + i) for i, lr in enumerate(lrs)]
                self._place = to_device(torch.tensor(place, dtype=torch.int64, device="cpu"), self.device)
        self.lrs: list[Any] = lrs
        if not (copied or live):
            return False
        lr_of_group = self._lr_table
        if live:
            now = torch.stack([lr.view(()) for lr in live.values()]).double()
            self.lrs = [lr.view(()).float() if id(lr) in at else lr for lr in lrs] if self.plan.ordinary else lrs
            lr_of_group = torch.cat([now, self._lr_table]).index_select(0, self._place)
        every = lr_of_group.index_select(0, self._group) * self._ratio
        rows = len(self.plan.entries)
        self.rates, self.score_rates = every[:rows].float(), every[rows:]
        return copied


def _settings(groups: Sequence[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Return what a plan takes from groups, beside parameters and rates."""
    keys, routed = ("weight_decay", "betas", "eps"), ("lora_weight_decay", "lora_lr_ratio", "scales", "b_factors")
    return [tuple(map(group.get, keys + routed if "module" in group else keys)) for group in groups]
