"""AdamW split into the two phases that routing needs: update all moments, then step the winners.

Functions take lists of ``TensorState``, flatten them and work block by block. On a CPU a block stays in the cache while several
operations pass over it; on an accelerator many tensors share one launch. Temporaries never exceed one block.

8-bit moments are dequantized block by block. Scores and updates use the new moments *before* they are rounded: dividing by a
rounded ``v`` could make an update far too large. So phase 1 discards the new 8-bit moments, and phase 2 computes them again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from molf.numerics.bf16 import Noise, load, master_dtype, store
from molf.numerics.distributed import is_sharded, local
from molf.numerics.quantization import BLOCK, block_count, dequantize, quantize_
from molf.scores import Score

__all__ = [
    "Rates",
    "TensorState",
    "Workspace",
    "adamw_",
    "adamw_update_",
    "requantize_moments_",
    "update_moments_and_score_",
]

# Elements per block. CPU: a few 4 MB arrays share the last-level cache. Accelerator: fewer launches.
_CPU_BLOCK = 1 << 20
_ACCELERATOR_BLOCK = 1 << 26
_ALIGNMENT = 64  # bytes: that of PyTorch's memory on a CPU
# Dequantized moments need about 20 bytes an element.
_ACCELERATOR_BLOCK_8BIT = 1 << 24

# With this step count both bias corrections are 1. The second constant is the largest float64 below 1.
_INFINITE_STEP, _NEARLY_ONE = 1e30, 1 - 2.0**-53


class TensorState(NamedTuple):
    """One trainable tensor at one step with its gradient and moments, all of one shape.

    If ``exp_avg_absmax`` is set, the moments are 8-bit codes (``molf.numerics.quantization``). Tensors may be sharded; the
    gradient may already be this rank's shard. With ``stacked`` above 1, the tensor is a stack of so many along its first
    dimension, each of which has sums of its own.
    """

    param: Tensor
    grad: Tensor | None
    exp_avg: Tensor
    exp_avg_sq: Tensor
    low: Tensor | None = None
    exp_avg_absmax: Tensor | None = None
    exp_avg_sq_absmax: Tensor | None = None
    stacked: int = 1

    @classmethod
    def of(cls, p: Tensor, entries: dict[str, Any]) -> TensorState:
        """Return a parameter with its gradient and its entries of the optimizer's state."""
        absmax = entries.get("exp_avg.absmax"), entries.get("exp_avg_sq.absmax")
        return cls(p, p.grad, entries["exp_avg"], entries["exp_avg_sq"], entries.get("low"), *absmax)

    @property
    def is_quantized(self) -> bool:
        """Whether the moments are 8-bit codes."""
        return self.exp_avg_absmax is not None

    @property
    def local(self) -> TensorState:
        """This rank's shard of every tensor."""
        if not (is_sharded(self.param) or is_sharded(self.exp_avg)):
            return self
        return self.map(local)

    def map(self, change: Callable[[Tensor], Tensor]) -> TensorState:
        """Return this with every tensor changed by a function; ``stacked`` stays."""
        return TensorState(*(None if x is None else change(x) for x in self[:-1]), self.stacked)  # type: ignore


class Rates(NamedTuple):
    """The scalars of one AdamW step: ``lr`` and ``weight_decay`` of a tensor, and its 1-based step count ``t``."""

    lr: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    t: float


class Workspace:
    """Scratch memory, reused from block to block: fresh memory for each block would cost page faults on a CPU."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def empty_like(self, tensors: Sequence[Tensor], aligned: Sequence[bool]) -> list[Tensor]:
        """Return flat tensors of the given sizes with arbitrary finite content; all inputs share device and dtype.

        Args:
            tensors: Of the sizes.
            aligned: Which of them to align like a tensor of its own; the others follow their predecessor without a gap.
        """
        return self._split("any", tensors, aligned)

    def zeros_like(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return flat zero tensors of the given sizes. Do not write to them."""
        return self._split("zeros", tensors, [False] * len(tensors))

    def _split(self, content: str, tensors: Sequence[Tensor], aligned: Sequence[bool]) -> list[Tensor]:
        key = (content, tensors[0].device, tensors[0].dtype)
        step, end, ranges = _ALIGNMENT // tensors[0].itemsize, 0, []
        for x, far in zip(tensors, aligned, strict=True):
            start = -(-end // step) * step if far else end
            end = start + x.numel()
            ranges.append(slice(start, end))
        if key not in self._buffers or self._buffers[key].numel() < end:
            self._buffers[key] = torch.zeros(end, device=key[1], dtype=key[2])
        return [self._buffers[key][own] for own in ranges]


def update_moments_and_score_(
    tensors: Sequence[TensorState],
    betas: tuple[float, float],
    eps: float,
    score: Score,
    workspace: Workspace,
    firsts: Container[int] = (),
) -> list[Tensor]:
    """Phase 1: update the moments of every tensor, and return the sums of each.

    They are ``[stacked, 2]``, the score's and the descent, or ``[stacked, 1]`` if both are equal.

    ``m += (1-b1)(g-m)`` and ``v = b2 v + (1-b2) g*g``. 8-bit moments are updated in scratch memory only.

    PyTorch's fused AdamW kernel does this in one pass over memory: with bias corrections of 1 (a huge step count),
    lr = weight decay = -1 and a scratch tensor as the parameter, it decays the scratch to zero and leaves
    ``u = m / (sqrt(v) + eps)`` in it, which is what the scores are made of. The descent is ``sum m u``. How a sum rounds depends
    on the alignment of ``u``; with the first tensor of each layer in ``firsts``, it does not depend on the layers before.
    """
    width = 1 if score.sums_descent else 2
    # An empty shard contributes zero.
    sums = {i: _zero_sums(x, width) for i, x in enumerate(tensors) if x.stacked > 1 or not local(x.param).numel()}
    taken = dict.fromkeys(sums, 0)
    for batch in _blocks(tensors):
        updated = [_dequantized(piece) for _, piece in batch]
        scratch = _update_moments_(updated, betas, eps, workspace, [i in firsts for i, _ in batch])
        for u, piece, (i, _) in zip(scratch, updated, batch, strict=True):
            part = _sums(piece, u, eps, score)
            if tensors[i].stacked > 1:
                row = taken[i] * tensors[i].stacked // local(tensors[i].param).numel()
                sums[i][row : row + piece.stacked] += part
                taken[i] += u.numel()
            else:
                sums[i] = sums[i] + part if i in sums else part
    return [sums[i] for i in range(len(tensors))]


def _zero_sums(tensor: TensorState, width: int) -> Tensor:
    return torch.zeros(tensor.stacked, width, dtype=master_dtype(tensor.param.dtype), device=tensor.param.device)


def _sums(piece: TensorState, u: Tensor, eps: float, score: Score) -> Tensor:
    """Return the sums of a flat piece, ``[stacked, 1 or 2]``."""
    if piece.stacked == 1:
        part = torch.dot(piece.exp_avg, u).view(1, 1)
        if score.sums_descent:
            return part
        return torch.cat([score.partial(piece.exp_avg, piece.exp_avg_sq, u, eps).view(1, 1), part], dim=1)
    m, v, u = (x.view(piece.stacked, -1) for x in (piece.exp_avg, piece.exp_avg_sq, u))
    part = torch.linalg.vecdot(m, u)[:, None]
    return part if score.sums_descent else torch.cat([score.partials(m, v, u, eps)[:, None], part], dim=1)


def requantize_moments_(
    tensors: Sequence[TensorState], betas: tuple[float, float], eps: float, workspace: Workspace
) -> None:
    """Phase 2 for losers with 8-bit moments: update the moments and write them back."""
    for batch in _blocks(tensors):
        updated = [_dequantized(piece) for _, piece in batch]
        _update_moments_(updated, betas, eps, workspace, [False] * len(batch))
        for piece, (_, kept) in zip(updated, batch, strict=True):
            _write_back_(piece, kept)


def adamw_update_(
    tensors: Sequence[TensorState], rates: Rates, workspace: Workspace, noise: Noise | None = None
) -> None:
    """Phase 2 for winners: one AdamW step from the moments as they are, with decoupled weight decay.

    ``p = (1 - lr*wd) p - lr * (m/(1-b1^t)) / (sqrt(v/(1-b2^t)) + eps)``, with both corrections moved out of the quotient.

    PyTorch's fused kernel does this in one pass, too: with zero gradients and betas next to 1 it changes the moments by less
    than float32 can represent. float64 moments would lose a last bit, so it gets copies of them. 8-bit moments are updated
    first, because phase 1 did not keep them.
    """
    adamw_([tensor for tensor in tensors if tensor.is_quantized], rates, noise)
    tensors = [tensor for tensor in tensors if not tensor.is_quantized]
    correction1 = 1 - rates.betas[0] ** rates.t
    correction2 = math.sqrt(1 - rates.betas[1] ** rates.t)
    step = Rates(
        lr=rates.lr * correction2 / correction1,
        weight_decay=rates.weight_decay * correction1 / correction2,
        betas=(_NEARLY_ONE, _NEARLY_ONE),
        eps=rates.eps * correction2,
        t=math.inf,
    )
    for batch in _blocks(tensors):
        values = [load(piece.param, piece.low) for _, piece in batch]
        moments = [(piece.exp_avg, piece.exp_avg_sq) for _, piece in batch]
        if values[0].dtype == torch.float64:
            moments = [(m.clone(), v.clone()) for m, v in moments]
        zeros = workspace.zeros_like(values)
        _torch_adamw_([TensorState(p, g, m, v) for p, g, (m, v) in zip(values, zeros, moments, strict=True)], step)
        for value, (i, piece) in zip(values, batch, strict=True):
            store(value, piece.param, piece.low, noise, tensors[i].param)


def adamw_(tensors: Sequence[TensorState], rates: Rates, noise: Noise | None = None) -> None:
    """Take a whole AdamW step (both phases): for tensors that are not routed, and for winners with 8-bit moments."""
    for batch in _blocks(tensors):
        values = [load(piece.param, piece.low) for _, piece in batch]
        updated = [_dequantized(piece._replace(param=value)) for value, (_, piece) in zip(values, batch, strict=True)]
        _torch_adamw_(updated, rates)
        for new, (i, piece) in zip(updated, batch, strict=True):
            store(new.param, piece.param, piece.low, noise, tensors[i].param)
            _write_back_(new, piece)


def _update_moments_(
    pieces: Sequence[TensorState],
    betas: tuple[float, float],
    eps: float,
    workspace: Workspace,
    aligned: Sequence[bool],
) -> list[Tensor]:
    """Update the moments of flat pieces and return ``u = m / (sqrt(v) + eps)`` of each, in scratch memory."""
    rates = Rates(lr=-1.0, weight_decay=-1.0, betas=betas, eps=eps, t=math.inf)
    scratch = workspace.empty_like([piece.exp_avg for piece in pieces], aligned)
    _torch_adamw_([piece._replace(param=u) for u, piece in zip(scratch, pieces, strict=True)], rates)
    return scratch


def _dequantized(piece: TensorState) -> TensorState:
    """Return a piece with flat float moments: its own, or a float32 copy of 8-bit ones."""
    if piece.exp_avg_absmax is None or piece.exp_avg_sq_absmax is None:
        return piece
    return piece._replace(
        exp_avg=dequantize(piece.exp_avg, piece.exp_avg_absmax, signed=True).view(-1),
        exp_avg_sq=dequantize(piece.exp_avg_sq, piece.exp_avg_sq_absmax, signed=False).view(-1),
    )


def _write_back_(updated: TensorState, kept: TensorState) -> None:
    """Quantize the moments of a dequantized piece into ``kept``; the memory of ``updated`` is overwritten."""
    if kept.exp_avg_absmax is None or kept.exp_avg_sq_absmax is None:
        return
    quantize_(updated.exp_avg.view_as(kept.exp_avg), kept.exp_avg, kept.exp_avg_absmax, signed=True)
    quantize_(updated.exp_avg_sq.view_as(kept.exp_avg_sq), kept.exp_avg_sq, kept.exp_avg_sq_absmax, signed=False)


def _torch_adamw_(pieces: Sequence[TensorState], rates: Rates) -> None:
    """Call PyTorch's fused AdamW on flat pieces; ``t = inf`` turns the bias corrections off."""
    step = torch.full((), min(rates.t, _INFINITE_STEP), dtype=torch.float32, device=pieces[0].param.device)
    grads = [piece.grad for piece in pieces]
    torch._fused_adamw_(
        [piece.param for piece in pieces],
        [grad.to(piece.exp_avg.dtype) for grad, piece in zip(grads, pieces, strict=True) if grad is not None],
        [piece.exp_avg for piece in pieces],
        [piece.exp_avg_sq for piece in pieces],
        [],
        [step] * len(pieces),
        lr=rates.lr,
        beta1=rates.betas[0],
        beta2=rates.betas[1],
        weight_decay=rates.weight_decay,
        eps=rates.eps,
        amsgrad=False,
        maximize=False,
    )


def _blocks(tensors: Sequence[TensorState]) -> Iterator[list[tuple[int, TensorState]]]:
    """Cut tensors into flat pieces and yield batches of (tensor index, piece) of one device and dtype within the budget."""
    batch: list[tuple[int, TensorState]] = []
    left, kind = 0, None
    for i, whole in enumerate(tensors):
        tensor = whole.local
        budget = _CPU_BLOCK
        if tensor.param.device.type != "cpu":
            budget = _ACCELERATOR_BLOCK_8BIT if tensor.is_quantized else _ACCELERATOR_BLOCK
        for piece in _pieces(tensor, budget):
            size = piece.param.numel()
            if batch and (size > left or kind != (piece.param.device, piece.exp_avg.dtype)):
                yield batch
                batch = []
            if not batch:
                left, kind = budget, (piece.param.device, piece.exp_avg.dtype)
            batch.append((i, piece))
            left -= size
    if batch:
        yield batch


def _pieces(tensor: TensorState, budget: int) -> Iterator[TensorState]:
    """Cut a tensor into flat pieces: codes and stacks where a row ends, or a block of a row that is longer than the budget."""
    size = tensor.param.numel()
    if not size:
        return
    p, grad, m, v, low, m_absmax, v_absmax, stacked = tensor
    grad = None if grad is None else grad.contiguous()
    if size <= budget and not tensor.is_quantized:
        flat = (None if x is None else x.view(-1) for x in (p, grad, m, v, low))
        yield TensorState(*flat, None, None, stacked)  # type: ignore
        return
    rows = len(p) if tensor.is_quantized or stacked > 1 else 1
    n = size // rows
    wide = [None if x is None else x.view(rows, -1) for x in (p, grad, m, v, low, m_absmax, v_absmax)]
    for top in range(0, rows, max(1, budget // n)):
        bottom = min(top + max(1, budget // n), rows)
        for first in range(0, n, budget):
            ends = [slice(first, first + budget)] * 5 + [slice(first // BLOCK, block_count(first + budget))] * 2
            cut = [None if x is None else x[top:bottom, end] for x, end in zip(wide, ends, strict=True)]
            flat = (None if x is None else x.view(-1) if x.dtype != torch.uint8 else x for x in cut[:5])
            yield TensorState(*flat, *cut[5:], bottom - top if stacked > 1 else 1)  # type: ignore
