"""Moments in 8 bits (``molf.quantised``), phase 1: opened and moved for the score alone; nothing is written.

Phase 2 (``molf.kernels.settle``, ``molf.kernels.fold``) opens and moves them again. A row of a tile is one block of 256 elements.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from molf.kernels.moments import GRADIENTS, Scalars, add_up
from molf.kernels.tables import OPTIONS, Tables
from molf.quantised import BLOCK, block_count, code_values

__all__ = [
    "ROWS",
    "WARPS",
    "Packed",
    "load_moved",
    "observe_packed",
    "places",
    "pointers",
    "shape_of",
    "shapes_of",
    "values",
]

ROWS = 16
"""Blocks of a tile."""

WARPS = 8
"""Of programs that work on tiles of 4096 elements in 8 bits; with 4, registers don't suffice."""


class Packed(NamedTuple):
    """A matrix's gradient, float32 or bf16, its moments as codes, their block maxima, and its expert's number ``l * E + e``."""

    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    exp_avg_absmax: Tensor
    exp_avg_sq_absmax: Tensor
    expert: int


@triton.jit
def load_moved(grad, codes, maxima, block, here, at, inside, values, factor, beta1, beta2, GRAD: tl.constexpr):
    """Return both moments of this step, 0 outside.

    ``grad`` is an address, ``codes`` and ``maxima`` point to the addresses of the two moments'; ``block`` is the block of each
    row of the tile, ``at`` are its elements, and ``here`` and ``inside`` say which of them there are.
    """
    g = tl.load(grad.to(tl.pointer_type(GRAD)) + at, mask=inside, other=0.0).to(tl.float32) * factor
    code_m = tl.load(tl.load(codes).to(tl.pointer_type(tl.uint8)) + at, mask=inside, other=0)
    code_v = tl.load(tl.load(codes + 1).to(tl.pointer_type(tl.uint8)) + at, mask=inside, other=0)
    m, v = tl.load(values + code_m.to(tl.int32)), tl.load(values + 256 + code_v.to(tl.int32))
    m *= tl.where(inside, tl.load(tl.load(maxima).to(tl.pointer_type(tl.float32)) + block, mask=here, other=0.0), 0.0)
    v *= tl.where(
        inside, tl.load(tl.load(maxima + 1).to(tl.pointer_type(tl.float32)) + block, mask=here, other=0.0), 0.0
    )
    m += (1 - beta1) * (g - m)
    v = beta2 * v + (1 - beta2) * g * g
    return m, v


@triton.jit
def places(blocks, shapes, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Return slot, blocks ``[ROWS, 1]``, which there are, elements ``[ROWS, BLOCK]``, and which there are, of this program."""
    tile = tl.program_id(0)
    slot = tl.load(blocks + 2 * tile)
    block = tl.load(blocks + 2 * tile + 1) + tl.arange(0, ROWS)
    n, in_row, there = tl.load(shapes + 3 * slot), tl.load(shapes + 3 * slot + 1), tl.load(shapes + 3 * slot + 2)
    column = (block % in_row * BLOCK)[:, None] + tl.arange(0, BLOCK)[None, :]
    at = (block // in_row * n)[:, None] + column
    here = (block < there)[:, None]
    return slot, block[:, None], here, at, here & (column < n)


@triton.jit
def _observe(
    grads,
    codes,
    maxima,
    shapes,
    blocks,
    partials,
    values,
    go,
    clip,
    beta1,
    beta2,
    eps,
    GRAD: tl.constexpr,
    PFN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if tl.load(go) == 0:
        return
    slot, block, here, at, inside = places(blocks, shapes, ROWS, BLOCK)
    grad, pair, factor = tl.load(grads + slot), 2 * slot, tl.load(clip)
    m, v = load_moved(grad, codes + pair, maxima + pair, block, here, at, inside, values, factor, beta1, beta2, GRAD)
    u = m / (tl.sqrt(v) + eps)
    total = tl.sum(u * u if PFN else m * u, axis=1)
    tl.store(partials + tl.program_id(0), tl.sum(total, axis=0))


def observe_packed(
    slots: Sequence[Packed],
    experts: int,
    betas: tuple[float, float],
    eps: float,
    pfn: bool,
    scalars: Scalars,
    tables: Tables,
) -> Tensor:
    """Return every expert's sum over its 8-bit slots, float64 ``[experts]``, as ``move_moments_`` does; nothing is written."""
    ordered = sorted(slots, key=lambda slot: (str(slot.grad.dtype), slot.expert))
    counts = [triton.cdiv(shape_of(slot)[2], ROWS) for slot in ordered]
    partials = torch.zeros(sum(counts), device=tables.device, dtype=torch.float32)
    first = 0
    for dtype, group in groupby(ordered, key=lambda slot: slot.grad.dtype):
        own = list(group)
        name = f"observe.{dtype}"
        blocks = tables.blocks(f"{name}.blocks", tuple(shape_of(packed)[2] for packed in own), ROWS)
        if len(blocks):
            _observe[(len(blocks),)](
                *pointers(name, own, tables),
                shapes_of(name, own, tables),
                blocks,
                partials[first:],
                values(tables.device),
                *scalars,
                *betas,
                eps,
                GRAD=GRADIENTS[dtype],
                PFN=pfn,
                ROWS=ROWS,
                BLOCK=BLOCK,
                num_warps=WARPS,
                **OPTIONS,
            )
        first += len(blocks)
    return add_up("observe", partials, [slot.expert for slot in ordered], counts, experts, tables)


@functools.lru_cache
def values(device: torch.device) -> Tensor:
    """Return what codes stand for, of first and of second moments, float32 ``[512]``."""
    return torch.cat([code_values(signed, device) for signed in (True, False)])


def pointers(name: str, packed: Sequence[Packed], tables: Tables) -> tuple[Tensor, Tensor, Tensor]:
    """Return the addresses of gradients ``[S]``, of codes ``[S, 2]`` and of block maxima ``[S, 2]``, first and second moments."""
    codes = [x for one in packed for x in (one.exp_avg, one.exp_avg_sq)]
    maxima = [x for one in packed for x in (one.exp_avg_absmax, one.exp_avg_sq_absmax)]
    return (
        tables.pointers(f"{name}.grads", [one.grad for one in packed]),
        tables.pointers(f"{name}.codes", codes),
        tables.pointers(f"{name}.maxima", maxima),
    )


def shape_of(packed: Packed) -> tuple[int, int, int]:
    """Return elements a row, blocks a row, and all blocks."""
    rows = len(packed.exp_avg)
    n = packed.exp_avg.numel() // max(1, rows)
    return n, block_count(n), rows * block_count(n)


def shapes_of(name: str, packed: Sequence[Packed], tables: Tables) -> Tensor:
    """Return ``shape_of`` each, int64 ``[S, 3]`` flat."""
    return tables.numbers(f"{name}.shapes", tuple(x for one in packed for x in shape_of(one)), torch.int64)
