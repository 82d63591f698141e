"""The merged form: the model's own weight is the effective weight, and the LoRA pairs live in the optimizer's state.

    W_eff = W + sum_i s_i B_i A_i       W_eff, W [out, in], A_i [r_i, in], B_i [out, r_i]

Backward gives ``G = dL/dW_eff``, from which every expert's exact gradient follows at the step:

    dW = G        dB_i = s_i G A_i^T        dA_i = s_i B_i^T G

After the step the change of the winner is folded into ``W_eff``. ``W`` itself is never stored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from molf.adamw import Rates, Slot
from molf.layers import Pair, RoutedLayer, init_moments, init_step
from molf.precision import load, master_dtype, store

__all__ = ["MergedLayer", "base_weight", "decay_base_", "expert_gradients", "fold_"]


def expert_gradients(grad: Tensor, pair: Pair) -> tuple[Tensor, Tensor]:
    """Return ``(dA, dB)`` of a pair from the gradient ``G [out, in]`` of the effective weight."""
    dA, dB = torch.zeros_like(pair.A), torch.empty_like(pair.B)
    if pair.started:
        torch.addmm(dA, pair.B.T, grad, beta=0, alpha=pair.scale, out=dA)
    return dA, torch.addmm(dB, grad, pair.A.T, beta=0, alpha=pair.scale, out=dB)


def base_weight(effective: Tensor, experts: Sequence[Pair]) -> Tensor:
    """Return ``W = W_eff - sum_i s_i B_i A_i``, a new tensor."""
    weight = effective.clone()
    for pair in experts:
        weight.addmm_(pair.B, pair.A, alpha=-pair.scale)
    return weight


def decay_base_(effective: Tensor, experts: Sequence[Pair], decay: float) -> None:
    """Decay ``W`` alone inside ``W_eff``: ``W_eff -= decay * (W_eff - sum_i s_i B_i A_i)``."""
    if decay == 0:
        return
    started = [pair for pair in experts if pair.started]
    if not started:
        effective.mul_(1 - decay)
    for i, pair in enumerate(started):
        effective.addmm_(pair.B, pair.A, beta=1 - decay if i == 0 else 1.0, alpha=decay * pair.scale)


def fold_(effective: Tensor, before: Pair, after: Pair) -> None:
    """Add a pair's change to ``W_eff``: ``s (B dA + dB A')``, because the difference ``B'A' - BA`` would cancel.

    Args:
        effective: ``W_eff [out, in]``.
        before: A copy of the pair before the change; its memory is used up.
        after: The pair now.
    """
    dA = torch.sub(after.A, before.A, out=before.A)
    if before.started:
        effective.addmm_(before.B, dA, alpha=after.scale)
    dB = torch.sub(after.B, before.B, out=before.B)
    effective.addmm_(dB, after.A, alpha=after.scale)


class MergedLayer(RoutedLayer):
    """A layer whose weight is the effective weight; its pairs are tensors in the state of that weight."""

    @staticmethod
    def init_state(group: dict[str, Any], state: dict[Any, dict[str, Any]], keep_low: bool) -> None:
        """Create moments, low parts, LoRA pairs and their moments where they are missing.

        All entries are flat tensors keyed by name in the state of the weight: ``lora_r8.A``, ``lora_r8.A.exp_avg``, ..., and
        ``lora_r8.wins``, how often the pair moved; the bias has AdamW's usual entries. ``A`` starts Kaiming-uniform
        (a = sqrt 5), ``B`` at zero; the start depends on the group's seed only.
        """
        weight = group["params"][0]
        fresh = init_step(state[weight])
        for p in group["params"]:
            init_moments(p, state[p], keep_low)
        if not fresh:
            return
        generator = torch.Generator("cpu").manual_seed(group["lora_seed"])
        dtype, (n_out, n_in) = master_dtype(weight.dtype), weight.shape
        for name, r in zip(group["experts"][1:], group["ranks"], strict=True):
            bound = 1 / math.sqrt(n_in)
            A = torch.empty(r, n_in, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)
            A = A.to(weight.device, dtype)
            for key, value in (("A", A), ("B", torch.zeros(n_out, r, dtype=dtype, device=weight.device))):
                state[weight][f"{name}.{key}"] = value
                state[weight][f"{name}.{key}.exp_avg"] = torch.zeros_like(value)
                state[weight][f"{name}.{key}.exp_avg_sq"] = torch.zeros_like(value)
            state[weight][f"{name}.wins"] = torch.zeros((), dtype=torch.float32, device="cpu")

    @property
    def base(self) -> list[Tensor]:
        """The layer's weight, which is ``W_eff``, and its bias if that trains."""
        return list(self.group["params"])

    @property
    def pairs(self) -> list[Pair]:
        """The live pairs, in the order of the ranks."""
        own, scales = self._state[self.base[0]], self.group["scales"]
        return [
            Pair(own[f"{name}.A"], own[f"{name}.B"], scale, started=bool(own[f"{name}.wins"]))
            for name, scale in zip(self.experts[1:], scales, strict=True)
        ]

    @property
    def active(self) -> bool:
        """Whether the weight has a gradient: all experts' gradients follow from it."""
        return self.base[0].grad is not None

    def base_weight(self) -> Tensor:
        """Return ``W = W_eff - sum_i s_i B_i A_i``, a new tensor."""
        return base_weight(self._full(self.base[0]), self.pairs)

    def set_base_weight(self, value: Tensor) -> None:
        """Set ``W``; the effective weight follows."""
        self._write(self.base[0], self._full(self.base[0]) + (value - self.base_weight()))

    def set_pair(self, i: int, A: Tensor, B: Tensor) -> None:  # noqa: N803 - the paper's letters
        """Set a pair; the effective weight follows, ``W`` stays."""
        pair = self.pairs[i]
        before = _snapshot(pair)
        pair.A.copy_(A)
        pair.B.copy_(B)
        self._count_win(i + 1)
        effective = self._full(self.base[0]).clone()
        fold_(effective, before, pair)
        self._write(self.base[0], effective)

    def derived_gradients(self) -> list[Tensor]:
        """Return ``dA`` and ``dB`` of all pairs."""
        lora = range(1, len(self.experts))
        return [slot.grad for i in lora for slot in self.slots(i) if slot.grad is not None]

    def pair_slot(self, i: int, key: str) -> Slot:
        """Return A or B (``key``) of the i-th expert with its moments, without the gradient, which is not kept anywhere."""
        own, name = self._state[self.base[0]], f"{self.experts[i]}.{key}"
        return Slot(own[name], None, own[f"{name}.exp_avg"], own[f"{name}.exp_avg_sq"])

    def _find_slots(self, i: int) -> list[Slot]:
        if i == 0:
            return [self._slot(p) for p in self.base if p.grad is not None]
        pair = self.pairs[i - 1]
        gradients = expert_gradients(self.gradients()[0].to(pair.A.dtype), pair)
        return [self.pair_slot(i, key)._replace(grad=grad) for key, grad in zip("AB", gradients, strict=True)]

    def begin_update(self, winners: Sequence[int]) -> list[tuple[Rates, Slot]]:
        """Decay ``W`` inside ``W_eff`` if it won, remember the winning pairs, and return what AdamW has to move."""
        weight, *bias = self.slots(0)
        self._effective = load(weight.param, weight.low)
        self._moved = [(i, pair, _snapshot(pair)) for i, pair in enumerate(self.pairs, start=1) if i in winners]
        work = []
        if 0 in winners:
            rates = self._rates(0)
            decay_base_(self._effective, self.pairs, rates.lr * rates.weight_decay)
            bare = self._rates(0, decayed=False)
            work = [(bare, weight._replace(param=self._effective, low=None)), *((bare, slot) for slot in bias)]
        for i, _, _ in self._moved:
            work += [(self._rates(i), slot) for slot in self.slots(i)]
        return work

    def finish_update(self) -> None:
        """Fold the pairs' changes into ``W_eff`` and put it back into the model."""
        for i, pair, before in self._moved:
            fold_(self._effective, before, pair)
            self._count_win(i)
        weight = self.slots(0)[0]
        store(self._effective, weight.param, weight.low, self._noise)
        del self._effective, self._moved

    def _count_win(self, i: int) -> None:
        """Count a move of a pair; the count is on the host, so asking whether a pair has started costs no transfer."""
        self._state[self.base[0]][f"{self.experts[i]}.wins"] += 1


def _snapshot(pair: Pair) -> Pair:
    return pair._replace(A=pair.A.clone(), B=pair.B.clone())
