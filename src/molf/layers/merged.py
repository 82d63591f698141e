"""The merged form: the model's own weight is the effective weight, and the LoRA pairs live in the optimizer's state.

    W_eff = W + sum_i s_i B_i A_i       W_eff, W [out, in], A_i [r_i, in], B_i [out, r_i]

Backward gives ``G = dL/dW_eff``, from which every expert's exact gradient follows at the step:

    dW = G        dB_i = s_i G A_i^T        dA_i = s_i B_i^T G

After the step the change of the winner is folded into ``W_eff``. ``W`` itself is never stored.

Sharded by rows, ``W_eff``, ``B`` and their moments are cut alike, so ``dW``, ``dB`` and the fold concern own rows only. ``A`` is
whole on every rank, and ``dA`` is the sum of what the shards' rows give.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from molf.layers.base import Pair, RoutedLayer, in_8_bits, init_moments, init_step
from molf.numerics.adamw import Rates, Slot
from molf.numerics.bf16 import master_dtype
from molf.numerics.distributed import is_sharded, like_rows, local, part_of

__all__ = ["MergedLayer", "base_weight", "decay_base_", "expert_gradients", "fold_"]


def expert_gradients(grad: Tensor, pair: Pair, room: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return ``(dA, dB)`` of a pair from the gradient ``G [out, in]`` of the effective weight, or from some of its rows.

    Args:
        grad: The gradient.
        pair: The pair, with the same rows of B.
        room: Where to put dA, by default new memory.
    """
    dA, dB = torch.zeros_like(pair.A) if room is None else room, torch.empty_like(pair.B)
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
    def init_state(group: dict[str, Any], state: dict[Any, dict[str, Any]], keep_low: bool, optim_bits: int) -> None:
        """Create moments, low parts, LoRA pairs and their moments where they are missing.

        All entries are flat tensors keyed by name in the state of the weight: ``lora_r8.A``, ``lora_r8.A.exp_avg``, ..., and
        ``lora_r8.wins``, how often the pair moved; the bias has AdamW's usual entries. ``A`` starts Kaiming-uniform
        (a = sqrt 5), ``B`` at zero; the start depends on the group's seed only.
        """
        weight = group["params"][0]
        fresh = init_step(state[weight])
        for p, packed in zip(group["params"], in_8_bits(group, optim_bits), strict=True):
            init_moments(p, state[p], keep_low, packed)
        if not fresh:
            return
        generator = torch.Generator("cpu").manual_seed(group["lora_seed"])
        dtype, n_in = master_dtype(weight.dtype), weight.shape[1]
        for name, r in zip(group["experts"][1:], group["ranks"], strict=True):
            bound = 1 / math.sqrt(n_in)
            A = torch.empty(r, n_in, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)
            A = A.to(weight.device, dtype)
            rows = torch.zeros(len(local(weight)), r, dtype=dtype, device=weight.device)
            for key, value in (("A", A), ("B", like_rows(rows, weight))):
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
    def _pairs_here(self) -> list[Pair]:
        """The pairs with the rows of B that are here."""
        return [pair._replace(B=local(pair.B)) for pair in self.pairs]

    @property
    def active(self) -> bool:
        """Whether the weight has a gradient: all experts' gradients follow from it."""
        return self.base[0].grad is not None

    def base_weight(self) -> Tensor:
        """Return ``W = W_eff - sum_i s_i B_i A_i``, a new tensor."""
        return like_rows(base_weight(self._full(self.base[0]), self._pairs_here), self.base[0])

    def set_base_weight(self, value: Tensor) -> None:
        """Set ``W``; the effective weight follows."""
        change = part_of(value, self.base[0]) - local(self.base_weight())
        self._write(self.base[0], self._full(self.base[0]) + change)

    def set_pair(self, i: int, A: Tensor, B: Tensor) -> None:  # noqa: N803 - the paper's letters
        """Set a pair; the effective weight follows, ``W`` stays."""
        pair = self._pairs_here[i]
        before = _snapshot(pair)
        pair.A.copy_(A)
        pair.B.copy_(part_of(B, self.pairs[i].B))
        self._count_win(i + 1)
        effective = self._full(self.base[0]).clone()
        fold_(effective, before, pair)
        self._write(self.base[0], effective)

    @property
    def shared_numel(self) -> int:
        """Elements of ``dA`` of the pairs that have started; the others' is zero."""
        return sum(pair.A.numel() for pair in self.pairs if pair.started) if is_sharded(self.base[0]) else 0

    def lend(self, room: Tensor) -> None:
        """Compute the pairs' gradients, with those of A in the memory given."""
        sizes = [pair.A.numel() if pair.started else 0 for pair in self.pairs]
        for i, part in enumerate(torch.split(room, sizes)):
            pair = self._pairs_here[i]
            self._slots[i + 1] = self._pair_slots(i + 1, pair, part.view_as(pair.A) if pair.started else None)

    def derived_slots(self) -> list[Slot]:
        """Return A and B of all pairs."""
        return [slot for i in range(1, len(self.experts)) for slot in self.slots(i)]

    def pair_slot(self, i: int, key: str) -> Slot:
        """Return A or B (``key``) of the i-th expert with its moments, without the gradient, which is not kept anywhere."""
        own, name = self._state[self.base[0]], f"{self.experts[i]}.{key}"
        return Slot(own[name], None, own[f"{name}.exp_avg"], own[f"{name}.exp_avg_sq"])

    def _find_slots(self, i: int) -> list[Slot]:
        if i == 0:
            return [self._slot(p) for p in self.base if p.grad is not None]
        return self._pair_slots(i, self._pairs_here[i - 1])

    def _pair_slots(self, i: int, pair: Pair, room: Tensor | None = None) -> list[Slot]:
        gradients = expert_gradients(local(self.gradients()[0]).to(pair.A.dtype), pair, room)
        return [self.pair_slot(i, key)._replace(grad=grad) for key, grad in zip("AB", gradients, strict=True)]

    def begin_update(self, winners: Sequence[int]) -> list[tuple[Rates, Slot]]:
        """Decay ``W`` inside ``W_eff`` if it won, remember the winning pairs, and return what AdamW has to move."""
        weight, *bias = self.slots(0)
        self._effective, pairs = self._full(self.base[0]), self._pairs_here
        self._moved = [(i, pair, _snapshot(pair)) for i, pair in enumerate(pairs, start=1) if i in winners]
        work = []
        if 0 in winners:
            rates = self._rates(0)
            decay_base_(self._effective, pairs, rates.lr * rates.weight_decay)
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
        self._put_back(self.base[0], self._effective)
        del self._effective, self._moved

    def _count_win(self, i: int) -> None:
        """Count a move of a pair; the count is on the host, so asking whether a pair has started costs no transfer."""
        self._state[self.base[0]][f"{self.experts[i]}.wins"] += 1


def _snapshot(pair: Pair) -> Pair:
    return pair._replace(A=pair.A.clone(), B=pair.B.clone())
