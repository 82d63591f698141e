"""Moments in 8 bits (``molf.numerics.quantization``), phase 1: opened and moved for the score alone; nothing is written.

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

from molf.kernels.addresses import aligned, pointer, size_in
from molf.kernels.moments import GRADIENTS, Scalars, add_up, place_in_sums
from molf.kernels.tables import Tables, launch
from molf.numerics.quantization import BLOCK, block_count, code_values

__all__ = [
    "ROWS",
    "WARPS",
    "Packed",
    "all_aligned",
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
    """A matrix's gradient, float32 or bf16, its moments as codes, their block maxima; the rest as in ``moments.Moments``."""

    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    exp_avg_absmax: Tensor
    exp_avg_sq_absmax: Tensor
    expert: int
    counted: bool = True


@triton.jit
def load_moved(
    grads,
    codes,
    maxima,
    slot,
    block,
    here,
    at,
    inside,
    values,
    clip,
    beta1,
    beta2,
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Return both moments of this step of a slot, 0 outside.

    ``block`` is the block of each row of the tile, ``at`` are its elements, and ``here`` and ``inside`` say which there are.
    """
    codes, maxima = codes + 2 * slot, maxima + 2 * slot
    g = tl.load(pointer(grads + slot, GRAD, ALIGNED) + at, mask=inside, other=0.0).to(tl.float32) * tl.load(clip)
    code_m = tl.load(pointer(codes, tl.uint8, ALIGNED) + at, mask=inside, other=0)
    code_v = tl.load(pointer(codes + 1, tl.uint8, ALIGNED) + at, mask=inside, other=0)
    m, v = tl.load(values + code_m.to(tl.int32)), tl.load(values + 256 + code_v.to(tl.int32))
    most_m = tl.load(pointer(maxima, tl.float32, ALIGNED) + block, mask=here, other=0.0)
    most_v = tl.load(pointer(maxima + 1, tl.float32, ALIGNED) + block, mask=here, other=0.0)
    m, v = m * tl.where(inside, most_m, 0.0), v * tl.where(inside, most_v, 0.0)
    m += (1 - beta1) * (g - m)
    v = beta2 * v + (1 - beta2) * g * g
    return m, v


@triton.jit
def places(blocks, shapes, ALIGNED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Return slot, blocks ``[ROWS, 1]``, which there are, elements ``[ROWS, BLOCK]``, and which there are, of this program."""
    tile = tl.program_id(0)
    slot = tl.load(blocks + 2 * tile)
    block = tl.load(blocks + 2 * tile + 1) + tl.arange(0, ROWS)
    n = size_in(shapes + 3 * slot, ALIGNED)
    in_row, there = tl.load(shapes + 3 * slot + 1), tl.load(shapes + 3 * slot + 2)
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
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if tl.load(go) == 0:
        return
    slot, block, here, at, inside = places(blocks, shapes, ALIGNED, ROWS, BLOCK)
    m, v = load_moved(grads, codes, maxima, slot, block, here, at, inside, values, clip, beta1, beta2, GRAD, ALIGNED)
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
    ordered = sorted(slots, key=place_in_sums)
    counts = [triton.cdiv(shape_of(slot)[2], ROWS) for slot in ordered]
    partials = torch.zeros(sum(counts), device=tables.device, dtype=torch.float32)
    first = 0
    for dtype, group in groupby(ordered, key=lambda slot: slot.grad.dtype):
        own = list(group)
        name = f"observe.{dtype}"
        blocks = tables.blocks(f"{name}.blocks", tuple(shape_of(packed)[2] for packed in own), ROWS)
        launch(
            _observe,
            len(blocks),
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
            ALIGNED=all_aligned(own),
            ROWS=ROWS,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
        first += len(blocks)
    return add_up("observe", partials, ordered, counts, experts, tables)


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


def all_aligned(packed: Sequence[Packed]) -> bool:
    """Tell whether gradients and moments can be read 16 bytes at once."""
    return aligned([shape_of(one)[0] for one in packed], *(one[:5] for one in packed))


def shape_of(packed: Packed) -> tuple[int, int, int]:
    """Return elements a row, blocks a row, and all blocks."""
    rows = len(packed.exp_avg)
    n = packed.exp_avg.numel() // max(1, rows)
    return n, block_count(n), rows * block_count(n)


def shapes_of(name: str, packed: Sequence[Packed], tables: Tables) -> Tensor:
    """Return ``shape_of`` each, int64 ``[S, 3]`` flat."""
    return tables.numbers(f"{name}.shapes", tuple(x for one in packed for x in shape_of(one)), torch.int64)
