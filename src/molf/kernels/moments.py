"""Phase 1: move the moments of every expert, and add up what the scores are made of.

    m += (1 - b1) (g - m)        v = b2 v + (1 - b2) g g        EPD: sum m u,  PFN: sum u u,  u = m / (sqrt(v) + eps)

Every block of a tensor leaves one partial sum; a second launch adds them up per expert in the order of the blocks, so that
equal inputs give equal scores, bit for bit.
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

__all__ = ["GRADIENTS", "Moments", "Scalars", "add_up", "move_moments_", "place_in_sums"]

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
        counted: Whether it counts in its expert's sum; what several ranks hold whole counts on one of them.
    """

    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    expert: int
    counted: bool = True


class Scalars(NamedTuple):
    """What all kernels of a step read on the device, 0-dim float32.

    Attributes:
        go: 0 if the step is to be left out (a gradient is not finite), else 1.
        clip: What gradients are multiplied by.
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
    slot = tl.load(blocks + 2 * block)
    start = tl.multiple_of(tl.load(blocks + 2 * block + 1), CHUNK)
    size = size_in(sizes + slot, ALIGNED)
    grad = pointer(grads + slot, GRAD, ALIGNED)
    exp_avg = pointer(exp_avgs + slot, tl.float32, ALIGNED)
    exp_avg_sq = pointer(exp_avg_sqs + slot, tl.float32, ALIGNED)
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


def move_moments_(
    slots: Sequence[Moments],
    experts: int,
    betas: tuple[float, float],
    eps: float,
    pfn: bool,
    scalars: Scalars,
    tables: Tables,
) -> Tensor:
    """Move all moments and return every expert's sum, float64 ``[experts]``; zeros if the step is left out.

    Args:
        slots: The tensors in any order; the gradients of one expert are of one dtype.
        experts: Number of experts of all layers together, ``L * E``.
        betas: Decay rates of the moments.
        eps: Added to the denominator.
        pfn: Sum ``u u`` instead of ``m u``.
        scalars: Whether to go on, and the factor of the gradients.
        tables: Of this device.
    """
    # A launch per dtype: dense gradients may be bf16 while those of pairs are float32. Experts stay together.
    ordered = sorted(slots, key=place_in_sums)
    counts = [triton.cdiv(slot.exp_avg.numel(), _CHUNK) for slot in ordered]
    partials = torch.zeros(sum(counts), device=tables.device, dtype=torch.float32)
    first = 0
    for dtype, group in groupby(ordered, key=lambda slot: slot.grad.dtype):
        own = list(group)
        name, sizes = f"moments.{dtype}", tuple(slot.exp_avg.numel() for slot in own)
        blocks = tables.blocks(f"{name}.blocks", sizes, _CHUNK)
        tensors = [[slot.grad for slot in own], [slot.exp_avg for slot in own], [slot.exp_avg_sq for slot in own]]
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
    return add_up("moments", partials, ordered, counts, experts, tables)


class _Summed(Protocol):
    @property
    def grad(self) -> Tensor: ...
    @property
    def expert(self) -> int: ...
    @property
    def counted(self) -> bool: ...


def place_in_sums(slot: _Summed) -> tuple[str, int, bool]:
    """Return the key to sort tensors by, so that what adds up to one sum lies together."""
    return str(slot.grad.dtype), slot.expert, not slot.counted


def add_up(
    name: str, partials: Tensor, slots: Sequence[_Summed], counts: Sequence[int], experts: int, tables: Tables
) -> Tensor:
    """Add up partial sums per expert in their order, float64 ``[experts]``.

    Args:
        name: Of the tables.
        partials: One sum a block, float32.
        slots: The tensors, in the order of ``place_in_sums``.
        counts: The number of blocks of each tensor.
        experts: Number of experts.
        tables: Of this device.
    """
    bounds = tables.numbers(f"{name}.bounds", _bounds(slots, counts, experts), torch.int32)
    totals = torch.zeros(experts, device=tables.device, dtype=torch.float64)
    launch(_totals, experts, partials, bounds, totals, STRIP=_STRIP)
    return totals


def _bounds(slots: Sequence[_Summed], counts: Sequence[int], experts: int) -> tuple[int, ...]:
    """Return first and last + 1 of the partial sums that count of every expert, flat; both 0 where it has none."""
    bounds = [0] * (2 * experts)
    at = 0
    for expert, group in groupby(zip(slots, counts, strict=True), key=lambda pair: pair[0].expert):
        own = list(group)
        assert bounds[2 * expert + 1] == 0, "the gradients of one expert are of one dtype"
        bounds[2 * expert : 2 * expert + 2] = at, at + sum(count for slot, count in own if slot.counted)
        at += sum(count for _, count in own)
    return tuple(bounds)
