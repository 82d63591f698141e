"""Phase 1: update the moments of every expert and add up the sums of the scores.

    m += (1 - b1) (g - m)        v = b2 v + (1 - b2) g g        EPD: sum m u,  PFN: sum u u,  u = m / (sqrt(v) + eps)

Every block of a tensor writes one partial sum. A second launch adds them per expert in a fixed order, so that equal inputs give
equal scores, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from molf.kernels.addresses import aligned, pointer, size_in
from molf.kernels.tables import Tables, launch

__all__ = ["GRADIENTS", "Moments", "Scalars", "sum_partials", "update_moments_", "sum_order"]

_CHUNK, _BLOCK = 4096, 1024
_STRIP = 256

GRADIENTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}
"""The dtypes that gradients may have."""


class Moments(NamedTuple):
    """One tensor of an expert in phase 1.

    Attributes:
        grad: Float32 or bf16.
        exp_avg: First moment, float32.
        exp_avg_sq: Second moment, float32.
        expert: Number of its expert, ``l * E + e``.
        counted: Whether it counts in its expert's sum here; replicated tensors count on one rank only.
    """

    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    expert: int
    counted: bool = True


class Scalars(NamedTuple):
    """Scalars on the device that all kernels of a step read, 0-dim float32.

    Attributes:
        go: 0 to skip the step (a gradient is not finite), else 1.
        clip: The factor of all gradients.
    """

    go: Tensor
    clip: Tensor


@triton.jit
def _moments(
    grads,
    exp_avgs,
    exp_avg_sqs,
    sizes,
    blocks,
    partials,
    go,
    clip,
    beta1,
    beta2,
    eps,
    GRAD: tl.constexpr,
    PFN: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    if tl.load(go) == 0:
        return
    entry = tl.load(blocks + 2 * block)
    start = tl.multiple_of(tl.load(blocks + 2 * block + 1), CHUNK)
    size = size_in(sizes + entry, ALIGNED)
    grad = pointer(grads + entry, GRAD, ALIGNED)
    exp_avg = pointer(exp_avgs + entry, tl.float32, ALIGNED)
    exp_avg_sq = pointer(exp_avg_sqs + entry, tl.float32, ALIGNED)
    factor = tl.load(clip)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, CHUNK, BLOCK):
        at = start + first + tl.arange(0, BLOCK)
        inside = at < size
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) * factor
        m = tl.load(exp_avg + at, mask=inside, other=0.0)
        v = tl.load(exp_avg_sq + at, mask=inside, other=0.0)
        m += (1 - beta1) * (g - m)
        v = beta2 * v + (1 - beta2) * g * g
        tl.store(exp_avg + at, m, mask=inside)
        tl.store(exp_avg_sq + at, v, mask=inside)
        u = m / (tl.sqrt(v) + eps)
        total += u * u if PFN else m * u  # 0 outside: m is
    tl.store(partials + block, tl.sum(total, axis=0))


@triton.jit
def _totals(partials, bounds, totals, STRIP: tl.constexpr):
    expert = tl.program_id(0)
    first = tl.load(bounds + 2 * expert)
    last = tl.load(bounds + 2 * expert + 1)
    total = tl.zeros((STRIP,), dtype=tl.float64)
    for start in range(first, last, STRIP):
        at = start + tl.arange(0, STRIP)
        total += tl.load(partials + at, mask=at < last, other=0.0).to(tl.float64)
    tl.store(totals + expert, tl.sum(total, axis=0))


def update_moments_(
    entries: Sequence[Moments],
    experts: int,
    betas: tuple[float, float],
    eps: float,
    pfn: bool,
    scalars: Scalars,
    tables: Tables,
) -> Tensor:
    """Update all moments and return every expert's sum, float64 ``[experts]``; zeros if the step is skipped.

    Args:
        entries: The tensors in any order; the gradients of one expert are of one dtype.
        experts: Number of experts of all layers together, ``L * E``.
        betas: Decay rates of the moments.
        eps: Added to the denominator.
        pfn: Sum ``u u`` instead of ``m u``.
        scalars: Whether to take the step, and the factor of the gradients.
        tables: Of this device.
    """
    # One launch per dtype: dense gradients may be bf16 while those of pairs are float32.
    ordered = sorted(entries, key=sum_order)
    counts = [triton.cdiv(entry.exp_avg.numel(), _CHUNK) for entry in ordered]
    partials = torch.zeros(sum(counts), device=tables.device, dtype=torch.float32)
    first = 0
    for dtype, group in groupby(ordered, key=lambda entry: entry.grad.dtype):
        own = list(group)
        name, sizes = f"moments.{dtype}", tuple(entry.exp_avg.numel() for entry in own)
        blocks = tables.blocks(f"{name}.blocks", sizes, _CHUNK)
        tensors = [[entry.grad for entry in own], [entry.exp_avg for entry in own], [entry.exp_avg_sq for entry in own]]
        launch(
            _moments,
            len(blocks),
            *(tables.pointers(f"{name}.{i}", own) for i, own in enumerate(tensors)),
            tables.numbers(f"{name}.sizes", sizes, torch.int64),
            blocks,
            partials[first:],
            *scalars,
            *betas,
            eps,
            GRAD=GRADIENTS[dtype],
            PFN=pfn,
            ALIGNED=aligned(sizes, *tensors),
            CHUNK=_CHUNK,
            BLOCK=_BLOCK,
        )
        first += len(blocks)
    return sum_partials("moments", partials, ordered, counts, experts, tables)


class _Summed(Protocol):
    @property
    def grad(self) -> Tensor: ...
    @property
    def expert(self) -> int: ...
    @property
    def counted(self) -> bool: ...


def sum_order(entry: _Summed) -> tuple[str, int, bool]:
    """Return the sort key that puts the tensors of one sum side by side."""
    return str(entry.grad.dtype), entry.expert, not entry.counted


def sum_partials(
    name: str, partials: Tensor, entries: Sequence[_Summed], counts: Sequence[int], experts: int, tables: Tables
) -> Tensor:
    """Add partial sums per expert in their order, float64 ``[experts]``.

    Args:
        name: Of the tables.
        partials: One sum per block, float32.
        entries: The tensors, in the order of ``sum_order``.
        counts: The number of blocks of each tensor.
        experts: Number of experts.
        tables: Of this device.
    """
    bounds = tables.numbers(f"{name}.bounds", _bounds(entries, counts, experts), torch.int32)
    totals = torch.zeros(experts, device=tables.device, dtype=torch.float64)
    launch(_totals, experts, partials, bounds, totals, STRIP=_STRIP)
    return totals


def _bounds(entries: Sequence[_Summed], counts: Sequence[int], experts: int) -> tuple[int, ...]:
    """Return begin and end of every expert's counted partial sums, flat; both 0 if it has none."""
    bounds = [0] * (2 * experts)
    at = 0
    for expert, group in groupby(zip(entries, counts, strict=True), key=lambda pair: pair[0].expert):
        own = list(group)
        assert bounds[2 * expert + 1] == 0, "the gradients of one expert are of one dtype"
        bounds[2 * expert : 2 * expert + 2] = at, at + sum(count for entry, count in own if entry.counted)
        at += sum(count for _, count in own)
    return tuple(bounds)
