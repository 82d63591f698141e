"""AdamW in the two phases that routing needs: move all moments, then step the winners only.

Everything works on lists of ``Slot`` (one tensor with its gradient and moments; of a sharded one the part that is here),
flattened and cut into blocks: on a CPU a block stays in the cache while several operations pass over it, on an accelerator many
tensors share one launch. Temporaries never exceed one block.

Moments in 8 bits are opened block by block. Score and update use the moments of the step as they are before they are rounded:
with a rounded v an update could be far too large. So phase 1 keeps nothing of them, and phase 2 moves them again, for losers too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from molf.numerics.bf16 import Noise, load, master_dtype, store
from molf.numerics.distributed import local
from molf.numerics.quantization import BLOCK, block_count, dequantise, quantise_
from molf.scores import Score

__all__ = ["Rates", "Slot", "Workspace", "adamw_", "observe_", "settle_", "update_"]

# Elements per block: on a CPU a few arrays of 4 MB share the last-level cache; on an accelerator, fewer launches matter.
_CPU_BLOCK = 1 << 20
_ACCELERATOR_BLOCK = 1 << 26
# 8-bit moments take some 20 bytes an element while they are open.
_ACCELERATOR_BLOCK_8BIT = 1 << 24


# A step count at which both bias corrections are 1, and the largest number below 1.
_NEVER_ENDING, _NEARLY_ONE = 1e30, 1 - 2.0**-53


class Slot(NamedTuple):
    """One trainable tensor at one step; all of one shape. They may be sharded, all alike, or the gradient be a plain part.

    With the block maxima of 8-bit moments, ``exp_avg`` and ``exp_avg_sq`` are codes (``molf.numerics.quantization``).
    """

    param: Tensor
    grad: Tensor | None
    exp_avg: Tensor
    exp_avg_sq: Tensor
    low: Tensor | None = None
    exp_avg_absmax: Tensor | None = None
    exp_avg_sq_absmax: Tensor | None = None

    @classmethod
    def of(cls, p: Tensor, own: dict[str, Any]) -> Slot:
        """Return a parameter with its gradient and what its state holds."""
        maxima = own.get("exp_avg.absmax"), own.get("exp_avg_sq.absmax")
        return cls(p, p.grad, own["exp_avg"], own["exp_avg_sq"], own.get("low"), *maxima)

    @property
    def in_8_bits(self) -> bool:
        """Whether the moments are codes."""
        return self.exp_avg_absmax is not None

    @property
    def here(self) -> Slot:
        """The part of it that this rank holds."""
        return Slot(*(None if x is None else local(x) for x in self))  # type: ignore[arg-type]


class Rates(NamedTuple):
    """The numbers of one AdamW step: ``lr`` and ``weight_decay`` of a tensor, and its 1-based step count ``t``."""

    lr: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    t: float


class Workspace:
    """Scratch memory of one step, reused from block to block: fresh memory for each would cost page faults on a CPU."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def like(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return flat tensors as long as the given flat ones of one device and dtype; finite, otherwise of any content."""
        return self._cut("any", tensors)

    def zeros_like(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return such tensors of zeros, to be read only."""
        return self._cut("zeros", tensors)

    def _cut(self, content: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        sizes = [x.numel() for x in tensors]
        kind = (content, tensors[0].device, tensors[0].dtype)
        if kind not in self._buffers or self._buffers[kind].numel() < sum(sizes):
            self._buffers[kind] = torch.zeros(sum(sizes), device=kind[1], dtype=kind[2])
        return list(torch.split(self._buffers[kind][: sum(sizes)], sizes))


def observe_(
    slots: Sequence[Slot], betas: tuple[float, float], eps: float, score: Score, workspace: Workspace
) -> list[Tensor]:
    """Phase 1: move the moments of every slot and return the score's sum over each slot (0-dim tensors).

    Moments in 8 bits stay as they are: they are moved in scratch memory, for the score only.

    ``m += (1-b1)(g-m)`` and ``v = b2 v + (1-b2) g*g``. PyTorch's fused AdamW kernel does it in one pass over memory: with
    bias corrections of 1 (a huge step count), lr = weight decay = -1 and a scratch tensor as the parameter, it decays the scratch
    to zero and leaves ``u = m / (sqrt(v) + eps)`` there, which is what the scores are made of.
    """
    # A shard may be empty; its sum is zero.
    sums = {
        i: torch.zeros((), dtype=master_dtype(slot.param.dtype), device=slot.param.device)
        for i, slot in enumerate(slots)
        if not local(slot.param).numel()
    }
    for batch in _blocks(slots):
        moved = [_opened(slot) for _, slot in batch]
        for u, slot, (i, _) in zip(_move_(moved, betas, eps, workspace), moved, batch, strict=True):
            part = score.partial(slot.exp_avg, slot.exp_avg_sq, u, eps)
            sums[i] = sums[i] + part if i in sums else part
    return [sums[i] for i in range(len(slots))]


def settle_(slots: Sequence[Slot], betas: tuple[float, float], eps: float, workspace: Workspace) -> None:
    """Phase 2 of 8-bit slots whose expert lost: move the moments and keep them."""
    for batch in _blocks(slots):
        moved = [_opened(slot) for _, slot in batch]
        _move_(moved, betas, eps, workspace)
        for slot, (_, kept) in zip(moved, batch, strict=True):
            _close_(slot, kept)


def update_(slots: Sequence[Slot], rates: Rates, workspace: Workspace, noise: Noise | None = None) -> None:
    """Phase 2: one AdamW step of every slot from the moments as they are (decoupled weight decay); 8-bit ones move first.

    ``p = (1 - lr*wd) p - lr * (m/(1-b1^t)) / (sqrt(v/(1-b2^t)) + eps)``, with both corrections moved out of the quotient. Again
    PyTorch's fused kernel does it in one pass: with no gradient and decay rates next to 1 it moves the moments by less than
    float32 can tell. Of float64 ones it gets copies, since they would lose a last bit.
    """
    adamw_([slot for slot in slots if slot.in_8_bits], rates, noise)
    slots = [slot for slot in slots if not slot.in_8_bits]
    correction1 = 1 - rates.betas[0] ** rates.t
    correction2 = math.sqrt(1 - rates.betas[1] ** rates.t)
    step = Rates(
        lr=rates.lr * correction2 / correction1,
        weight_decay=rates.weight_decay * correction1 / correction2,
        betas=(_NEARLY_ONE, _NEARLY_ONE),
        eps=rates.eps * correction2,
        t=math.inf,
    )
    for batch in _blocks(slots):
        values = [load(slot.param, slot.low) for _, slot in batch]
        moments = [(slot.exp_avg, slot.exp_avg_sq) for _, slot in batch]
        if values[0].dtype == torch.float64:
            moments = [(m.clone(), v.clone()) for m, v in moments]
        no_gradients = workspace.zeros_like(values)
        _fused([Slot(p, g, m, v) for p, g, (m, v) in zip(values, no_gradients, moments, strict=True)], step)
        for value, (i, slot) in zip(values, batch, strict=True):
            store(value, slot.param, slot.low, noise, slots[i].param)


def adamw_(slots: Sequence[Slot], rates: Rates, noise: Noise | None = None) -> None:
    """Both phases at once, for tensors that are not routed and 8-bit winners: PyTorch's fused AdamW."""
    for batch in _blocks(slots):
        values = [load(slot.param, slot.low) for _, slot in batch]
        moved = [_opened(slot._replace(param=value)) for value, (_, slot) in zip(values, batch, strict=True)]
        _fused(moved, rates)
        for opened, (i, slot) in zip(moved, batch, strict=True):
            store(opened.param, slot.param, slot.low, noise, slots[i].param)
            _close_(opened, slot)


def _move_(slots: Sequence[Slot], betas: tuple[float, float], eps: float, workspace: Workspace) -> list[Tensor]:
    """Move the moments of flat slots and return ``u = m / (sqrt(v) + eps)`` of each, in scratch memory."""
    whole = Rates(lr=-1.0, weight_decay=-1.0, betas=betas, eps=eps, t=math.inf)
    scratch = workspace.like([slot.exp_avg for slot in slots])
    _fused([slot._replace(param=u) for u, slot in zip(scratch, slots, strict=True)], whole)
    return scratch


def _opened(slot: Slot) -> Slot:
    """Return a piece with flat moments to compute with: its own, or a float32 copy of 8-bit ones."""
    if slot.exp_avg_absmax is None or slot.exp_avg_sq_absmax is None:
        return slot
    return slot._replace(
        exp_avg=dequantise(slot.exp_avg, slot.exp_avg_absmax, signed=True).view(-1),
        exp_avg_sq=dequantise(slot.exp_avg_sq, slot.exp_avg_sq_absmax, signed=False).view(-1),
    )


def _close_(opened: Slot, kept: Slot) -> None:
    """Write the moments of an opened piece back, if it is a copy; its memory is used up."""
    if kept.exp_avg_absmax is None or kept.exp_avg_sq_absmax is None:
        return
    quantise_(opened.exp_avg.view_as(kept.exp_avg), kept.exp_avg, kept.exp_avg_absmax, signed=True)
    quantise_(opened.exp_avg_sq.view_as(kept.exp_avg_sq), kept.exp_avg_sq, kept.exp_avg_sq_absmax, signed=False)


def _fused(slots: Sequence[Slot], rates: Rates) -> None:
    """Take AdamW's step of flat slots; ``t = inf`` leaves the bias corrections out."""
    step = torch.full((), min(rates.t, _NEVER_ENDING), dtype=torch.float32, device=slots[0].param.device)
    grads = [slot.grad for slot in slots]
    torch._fused_adamw_(
        [slot.param for slot in slots],
        [grad.to(slot.exp_avg.dtype) for grad, slot in zip(grads, slots, strict=True) if grad is not None],
        [slot.exp_avg for slot in slots],
        [slot.exp_avg_sq for slot in slots],
        [],
        [step] * len(slots),
        lr=rates.lr,
        beta1=rates.betas[0],
        beta2=rates.betas[1],
        weight_decay=rates.weight_decay,
        eps=rates.eps,
        amsgrad=False,
        maximize=False,
    )


def _blocks(slots: Sequence[Slot]) -> Iterator[list[tuple[int, Slot]]]:
    """Cut the slots into flat pieces and yield batches of (slot index, piece) of one device and dtype within the budget."""
    batch: list[tuple[int, Slot]] = []
    room, kind = 0, None
    for i, whole in enumerate(slots):
        slot = whole.here
        budget = _CPU_BLOCK
        if slot.param.device.type != "cpu":
            budget = _ACCELERATOR_BLOCK_8BIT if slot.in_8_bits else _ACCELERATOR_BLOCK
        for piece in _cut(slot, budget):
            size = piece.param.numel()
            if batch and (size > room or kind != (piece.param.device, piece.exp_avg.dtype)):
                yield batch
                batch = []
            if not batch:
                room, kind = budget, (piece.param.device, piece.exp_avg.dtype)
            batch.append((i, piece))
            room -= size
    if batch:
        yield batch


def _cut(slot: Slot, budget: int) -> Iterator[Slot]:
    """Cut a slot into flat pieces; codes and their maxima keep their rows, and are cut where a row or a block ends."""
    size = slot.param.numel()
    rows = len(slot.param) if slot.in_8_bits else 1
    if not size:
        return
    n = size // rows
    wide = [None if x is None else (x.contiguous() if x is slot.grad else x).view(rows, -1) for x in slot]
    for top in range(0, rows, max(1, budget // n)):
        bottom = top + max(1, budget // n)
        for left in range(0, n, budget):
            ends = [slice(left, left + budget)] * 5 + [slice(left // BLOCK, block_count(left + budget))] * 2
            cut = [None if x is None else x[top:bottom, end] for x, end in zip(wide, ends, strict=True)]
            flat = [None if x is None else x.view(-1) if x.dtype != torch.uint8 else x for x in cut[:5]]
            yield Slot(*flat, *cut[5:])  # type: ignore[arg-type]
