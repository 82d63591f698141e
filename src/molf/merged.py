"""The merged form: the model's own weight is the effective weight, and the LoRA pairs live in the optimizer's state.

    W_eff = W + sum_i s_i B_i A_i       W_eff, W [out, in], A_i [r_i, in], B_i [out, r_i]

Backward gives ``G = dL/dW_eff``, from which every expert's exact gradient follows at the step:

    dW = G        dB_i = s_i G A_i^T        dA_i = s_i B_i^T G

After the step the change of the winner is folded into ``W_eff``. ``W`` itself is never stored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from molf.adamw import Rates, Slot
from molf.groups import expert_names, lora_scales
from molf.precision import Noise, load, master_dtype, store

__all__ = ["MergedLayer", "Pair", "base_weight", "decay_base_", "expert_gradients", "fold_", "init_state", "pairs"]


class Pair(NamedTuple):
    """A LoRA expert's live tensors: ``A [r, in]``, ``B [out, r]`` and the scale of their product."""

    A: Tensor
    B: Tensor
    scale: float


def expert_gradients(grad: Tensor, pair: Pair) -> tuple[Tensor, Tensor]:
    """Return ``(dA, dB)`` of a pair from the gradient ``G [out, in]`` of the effective weight."""
    return pair.B.T.mm(grad).mul_(pair.scale), grad.mm(pair.A.T).mul_(pair.scale)


def base_weight(effective: Tensor, experts: Sequence[Pair]) -> Tensor:
    """Return ``W = W_eff - sum_i s_i B_i A_i``, a new tensor."""
    weight = effective.clone()
    for A, B, scale in experts:
        weight.addmm_(B, A, alpha=-scale)
    return weight


def decay_base_(effective: Tensor, experts: Sequence[Pair], decay: float) -> None:
    """Decay ``W`` alone inside ``W_eff``: ``W_eff -= decay * (W_eff - sum_i s_i B_i A_i)``."""
    if decay == 0:
        return
    if not experts:
        effective.mul_(1 - decay)
    for i, (A, B, scale) in enumerate(experts):
        effective.addmm_(B, A, beta=1 - decay if i == 0 else 1.0, alpha=decay * scale)


def fold_(effective: Tensor, before: Pair, after: Pair) -> None:
    """Add a pair's change to ``W_eff``: ``s (dB A' + B dA)``, because the difference ``B'A' - BA`` would cancel."""
    left = torch.cat((after.B - before.B, before.B), dim=1)
    right = torch.cat((after.A, after.A - before.A), dim=0)
    effective.addmm_(left, right, alpha=after.scale)


def init_state(group: dict[str, Any], state: dict[Any, dict[str, Any]], keep_low: bool) -> None:
    """Create the state of a routed group where it is missing: moments, low parts, LoRA pairs and their moments.

    All entries are flat tensors keyed by name in the state of the weight (``lora_r8.A``, ``lora_r8.A.exp_avg``, ...); the
    bias has AdamW's usual entries. ``A`` starts Kaiming-uniform (a = sqrt 5), ``B`` at zero; the start depends on the
    group's seed only.
    """
    weight = group["params"][0]
    fresh = "step" not in state[weight]
    if fresh:
        state[weight]["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
    for p in group["params"]:
        init_moments(p, state[p], keep_low)
    if not fresh:
        return
    generator = torch.Generator("cpu").manual_seed(group["lora_seed"])
    dtype, (n_out, n_in) = master_dtype(weight.dtype), weight.shape
    for name, r in zip(expert_names(group["ranks"])[1:], group["ranks"], strict=True):
        bound = 1 / math.sqrt(n_in)
        A = torch.empty(r, n_in, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)
        A = A.to(weight.device, dtype)
        for key, value in (("A", A), ("B", torch.zeros(n_out, r, dtype=dtype, device=weight.device))):
            state[weight][f"{name}.{key}"] = value
            state[weight][f"{name}.{key}.exp_avg"] = torch.zeros_like(value)
            state[weight][f"{name}.{key}.exp_avg_sq"] = torch.zeros_like(value)


def init_moments(p: Tensor, state: dict[str, Any], keep_low: bool) -> None:
    """Create AdamW's moments of one parameter, and the low part of a bf16 one, where they are missing."""
    if "exp_avg" not in state:
        state["exp_avg"] = torch.zeros_like(p, dtype=master_dtype(p.dtype))
        state["exp_avg_sq"] = torch.zeros_like(p, dtype=master_dtype(p.dtype))
    if keep_low and p.dtype == torch.bfloat16 and "low" not in state:
        state["low"] = torch.zeros_like(p, dtype=torch.int16)


def pairs(group: dict[str, Any], state: dict[Any, dict[str, Any]]) -> list[Pair]:
    """Return the live pairs of a routed group, in the order of its ranks."""
    own = state[group["params"][0]]
    names = expert_names(group["ranks"])[1:]
    return [Pair(own[f"{n}.A"], own[f"{n}.B"], s) for n, s in zip(names, lora_scales(group), strict=True)]


def _snapshot(pair: Pair) -> Pair:
    return Pair(pair.A.clone(), pair.B.clone(), pair.scale)


class MergedLayer:
    """One routed layer at one step: what the optimizer asks of any form of holding the experts.

    Args:
        group: The layer's parameter group.
        state: The optimizer's state.
        noise: For stochastic rounding, None where low parts are kept.
    """

    def __init__(self, group: dict[str, Any], state: dict[Any, dict[str, Any]], noise: Noise | None):
        self.group = group
        self.name: str = group["module"]
        self.experts = expert_names(group["ranks"])
        self._state = state
        self._noise = noise
        self._pairs = pairs(group, state)
        lora_lr = float(group["lr"]) * group["lora_lr_ratio"]
        self.lrs = (float(group["lr"]), *(lora_lr for _ in self._pairs))
        self.numel = sum(p.numel() for p in group["params"])
        self._slots: list[list[Slot]] | None = None

    def gradients(self) -> list[Tensor]:
        """Return the dense gradients that backward left (weight, then bias)."""
        return [p.grad for p in self.group["params"] if p.grad is not None]

    def slots(self) -> list[list[Slot]]:
        """Return each expert's tensors with their gradients; LoRA gradients are computed at the first call."""
        if self._slots is None:
            dense = [self._slot(p) for p in self.group["params"] if p.grad is not None]
            grad = self.gradients()[0].to(dense[0].exp_avg.dtype)
            self._slots = [dense]
            for name, pair in zip(self.experts[1:], self._pairs, strict=True):
                gradients = dict(zip("AB", expert_gradients(grad, pair), strict=True))
                self._slots.append([self._lora_slot(name, key, gradients[key]) for key in "AB"])
        return self._slots

    def count_step(self) -> None:
        """Count this step: there is one count for all experts of the layer."""
        self._state[self.group["params"][0]]["step"] += 1

    def release(self) -> None:
        """Drop the LoRA gradients: phase 2 needs moments only."""
        self._slots = [[slot._replace(grad=None) for slot in expert] for expert in self.slots()]

    def begin_update(self, winners: Sequence[int]) -> list[tuple[Rates, Slot]]:
        """Prepare the winners' step and return what AdamW has to move; losers are not touched.

        Args:
            winners: Indices into ``experts``.
        """
        dense, *lora = self.slots()
        self._effective = load(dense[0].param, dense[0].low)
        work = []
        if 0 in winners:
            rates = self._rates(self.lrs[0], self.group["weight_decay"])
            decay_base_(self._effective, self._pairs, rates.lr * rates.weight_decay)
            bare = rates._replace(weight_decay=0.0)
            work = [(bare, dense[0]._replace(param=self._effective, low=None)), *((bare, slot) for slot in dense[1:])]
        self._before = {i: _snapshot(self._pairs[i - 1]) for i in winners if i > 0}
        for i in self._before:
            rates = self._rates(self.lrs[i], self.group["lora_weight_decay"])
            work += [(rates, slot) for slot in lora[i - 1]]
        return work

    def finish_update(self) -> None:
        """Fold the pairs' changes into ``W_eff`` and put it back into the model."""
        weight = self.slots()[0][0]
        for i, before in self._before.items():
            fold_(self._effective, before, self._pairs[i - 1])
        store(self._effective, weight.param, weight.low, self._noise)
        del self._effective, self._before

    def _rates(self, lr: float, weight_decay: float) -> Rates:
        step = float(self._state[self.group["params"][0]]["step"])
        return Rates(lr, weight_decay, self.group["betas"], self.group["eps"], step)

    def _slot(self, p: Tensor) -> Slot:
        own = self._state[p]
        return Slot(p, p.grad, own["exp_avg"], own["exp_avg_sq"], own.get("low"))

    def _lora_slot(self, name: str, key: str, grad: Tensor) -> Slot:
        own, key = self._state[self.group["params"][0]], f"{name}.{key}"
        return Slot(own[key], grad, own[f"{key}.exp_avg"], own[f"{key}.exp_avg_sq"])
