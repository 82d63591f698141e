"""AdamW in the two phases that routing needs: move all moments, then step the winners only.

Everything works on lists of ``Slot`` (one tensor with its gradient and moments; of a sharded one the part that is here),
flattened and cut into blocks: on a CPU a
block stays in the cache while several operations pass over it, on an accelerator many tensors share one launch.
Temporaries never exceed one block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from molf.distributed import is_sharded, local
from molf.precision import Noise, load, store
from molf.scores import Score

__all__ = ["Rates", "Slot", "Workspace", "adamw_", "observe_", "update_"]

# Elements per block: on a CPU a few arrays of 4 MB share the last-level cache; on an accelerator, fewer launches matter.
_CPU_BLOCK = 1 << 20
_ACCELERATOR_BLOCK = 1 << 26


class Slot(NamedTuple):
    """One trainable tensor at one step; all of one shape. They may be sharded, all alike, or the gradient be a plain part."""

    param: Tensor
    grad: Tensor | None
    exp_avg: Tensor
    exp_avg_sq: Tensor
    low: Tensor | None = None


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
        self._buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def like(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return flat tensors as long as the given flat ones of one device and dtype; finite, otherwise of any content."""
        sizes = [x.numel() for x in tensors]
        kind = (tensors[0].device, tensors[0].dtype)
        if kind not in self._buffers or self._buffers[kind].numel() < sum(sizes):
            self._buffers[kind] = torch.zeros(sum(sizes), device=kind[0], dtype=kind[1])
        return list(torch.split(self._buffers[kind][: sum(sizes)], sizes))


def observe_(
    slots: Sequence[Slot], betas: tuple[float, float], eps: float, score: Score, workspace: Workspace
) -> list[Tensor]:
    """Phase 1: move the moments of every slot and return the score's sum over each slot (0-dim tensors).

    ``m += (1-b1)(g-m)`` and ``v = b2 v + (1-b2) g*g``. PyTorch's fused AdamW kernel does it in one pass over memory: with
    bias corrections of 1 (a huge step count), lr = weight decay = -1 and a scratch tensor as the parameter, it decays the scratch
    to zero and leaves ``u = m / (sqrt(v) + eps)`` there, which is what the scores are made of.
    """
    # A shard may be empty; its sum is zero.
    sums = {i: local(slot.exp_avg).sum() for i, slot in enumerate(slots) if not local(slot.exp_avg).numel()}
    whole = Rates(lr=-1.0, weight_decay=-1.0, betas=betas, eps=eps, t=math.inf)
    for batch in _blocks(slots):
        scratch = workspace.like([slot.exp_avg for _, slot in batch])
        never = torch.full((), 1e30, dtype=torch.float32, device=scratch[0].device)
        _fused([slot._replace(param=u) for u, (_, slot) in zip(scratch, batch, strict=True)], whole, never)
        for u, (i, slot) in zip(scratch, batch, strict=True):
            part = score.partial(slot.exp_avg, slot.exp_avg_sq, u, eps)
            sums[i] = sums[i] + part if i in sums else part
    return [sums[i] for i in range(len(slots))]


def update_(slots: Sequence[Slot], rates: Rates, workspace: Workspace, noise: Noise | None = None) -> None:
    """Phase 2: one AdamW step of every slot from the moments as they are (decoupled weight decay).

    ``p = (1 - lr*wd) p - lr * (m/(1-b1^t)) / (sqrt(v/(1-b2^t)) + eps)``, with both corrections moved out of the quotient.
    """
    correction1 = 1 - rates.betas[0] ** rates.t
    correction2 = math.sqrt(1 - rates.betas[1] ** rates.t)
    for batch in _blocks(slots):
        values = [load(slot.param, slot.low) for _, slot in batch]
        if rates.weight_decay:
            torch._foreach_mul_(values, 1 - rates.lr * rates.weight_decay)
        denominators = workspace.like([slot.exp_avg_sq for _, slot in batch])
        torch._foreach_copy_(denominators, [slot.exp_avg_sq for _, slot in batch])
        torch._foreach_sqrt_(denominators)
        torch._foreach_add_(denominators, rates.eps * correction2)
        moments = [slot.exp_avg for _, slot in batch]
        torch._foreach_addcdiv_(values, moments, denominators, value=-rates.lr * correction2 / correction1)
        for value, (i, slot) in zip(values, batch, strict=True):
            store(value, slot.param, slot.low, noise, is_sharded(slots[i].param))


def adamw_(slots: Sequence[Slot], rates: Rates, noise: Noise | None = None) -> None:
    """Both phases at once, for tensors that are not routed: PyTorch's fused AdamW."""
    for batch in _blocks(slots):
        values = [load(slot.param, slot.low) for _, slot in batch]
        step = torch.full((), rates.t, dtype=torch.float32, device=values[0].device)
        _fused([slot._replace(param=value) for value, (_, slot) in zip(values, batch, strict=True)], rates, step)
        for value, (i, slot) in zip(values, batch, strict=True):
            store(value, slot.param, slot.low, noise, is_sharded(slots[i].param))


def _fused(slots: Sequence[Slot], rates: Rates, step: Tensor) -> None:
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
        slot = Slot(*(None if x is None else local(x) for x in whole))  # type: ignore[arg-type]
        n = slot.param.numel()
        budget = _CPU_BLOCK if slot.param.device.type == "cpu" else _ACCELERATOR_BLOCK
        flat = [None if x is None else x.contiguous().view(-1) if x is slot.grad else x.view(-1) for x in slot]
        for start in range(0, n, budget):
            piece = Slot(*(None if x is None else x[start : start + budget] for x in flat))  # type: ignore[arg-type]
            size = min(budget, n - start)
            if batch and (size > room or kind != (piece.param.device, piece.exp_avg.dtype)):
                yield batch
                batch = []
            if not batch:
                room, kind = budget, (piece.param.device, piece.exp_avg.dtype)
            batch.append((i, piece))
            room -= size
    if batch:
        yield batch
