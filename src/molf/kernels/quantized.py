"""8-bit moments (``molf.numerics.quantization``), phase 1: updated in registers for the score only; nothing is written.

Phase 2 (``requantize``, ``merged_update``) updates them again. A row of a tile is one block of 256 elements.
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
from molf.kernels.moments import GRADIENTS, Scalars, sum_order, sum_partials
from molf.kernels.tables import Tables, launch
from molf.numerics.quantization import BLOCK, block_count, code_values

__all__ = [
    "ROWS",
    "WARPS",
    "Quantized",
    "quantized_aligned",
    "load_updated",
    "score_quantized",
    "places",
    "pointers",
    "shape_of",
    "shapes_of",
    "values",
]

ROWS = 16
"""Blocks of a tile."""

WARPS = 8
"""Warps of programs on tiles of 4096 8-bit elements; 4 would spill registers."""


class Quantized(NamedTuple):
    """A matrix's gradient, float32 or bf16, its moments as codes, their block maxima; the rest as in ``moments.Moments``."""

    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    exp_avg_absmax: Tensor
    exp_avg_sq_absmax: Tensor
    expert: int
    counted: bool = True


@triton.jit
def load_updated(
    grads,
    codes,
    maxima,
    entry,
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
    """Return both updated moments of a tensor's tile, 0 outside.

    ``block`` is the block of each row of the tile, ``at`` are its elements; ``here`` and ``inside`` mask them.
    """
    codes, maxima = codes + 2 * entry, maxima + 2 * entry
    g = tl.load(pointer(grads + entry, GRAD, ALIGNED) + at, mask=inside, other=0.0).to(tl.float32) * tl.load(clip)
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
    """Return this program's tensor, blocks ``[ROWS, 1]`` with mask, and elements ``[ROWS, BLOCK]`` with mask."""
    tile = tl.program_id(0)
    entry = tl.load(blocks + 2 * tile)
    block = tl.load(blocks + 2 * tile + 1) + tl.arange(0, ROWS)
    n = size_in(shapes + 3 * entry, ALIGNED)
    in_row, there = tl.load(shapes + 3 * entry + 1), tl.load(shapes + 3 * entry + 2)
    column = (block % in_row * BLOCK)[:, None] + tl.arange(0, BLOCK)[None, :]
    at = (block // in_row * n)[:, None] + column
    here = (block < there)[:, None]
    return entry, block[:, None], here, at, here & (column < n)


@triton.jit
def _score_quantized(
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
    entry, block, here, at, inside = places(blocks, shapes, ALIGNED, ROWS, BLOCK)
    m, v = load_updated(grads, codes, maxima, entry, block, here, at, inside, values, clip, beta1, beta2, GRAD, ALIGNED)
    u = m / (tl.sqrt(v) + eps)
    total = tl.sum(u * u if PFN else m * u, axis=1)
    tl.store(partials + tl.program_id(0), tl.sum(total, axis=0))


def score_quantized(
    entries: Sequence[Quantized],
    experts: int,
    betas: tuple[float, float],
    eps: float,
    pfn: bool,
    scalars: Scalars,
    tables: Tables,
) -> Tensor:
    """Return every expert's sum over its 8-bit tensors, float64 ``[experts]``, as ``update_moments_`` does; writes nothing."""
    ordered = sorted(entries, key=sum_order)
    counts = [triton.cdiv(shape_of(entry)[2], ROWS) for entry in ordered]
    partials = torch.zeros(sum(counts), device=tables.device, dtype=torch.float32)
    first = 0
    for dtype, group in groupby(ordered, key=lambda entry: entry.grad.dtype):
        own = list(group)
        name = f"observe.{dtype}"
        blocks = tables.blocks(f"{name}.blocks", tuple(shape_of(quantized)[2] for quantized in own), ROWS)
        launch(
            _score_quantized,
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
            ALIGNED=quantized_aligned(own),
            ROWS=ROWS,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
        first += len(blocks)
    return sum_partials("observe", partials, ordered, counts, experts, tables)


@functools.lru_cache
def values(device: torch.device) -> Tensor:
    """Return the values of the codes, first and second moments, float32 ``[512]``."""
    return torch.cat([code_values(signed, device) for signed in (True, False)])


def pointers(name: str, quantized: Sequence[Quantized], tables: Tables) -> tuple[Tensor, Tensor, Tensor]:
    """Return the addresses of gradients ``[S]``, of codes ``[S, 2]`` and of block maxima ``[S, 2]``, first and second moments."""
    codes = [x for one in quantized for x in (one.exp_avg, one.exp_avg_sq)]
    maxima = [x for one in quantized for x in (one.exp_avg_absmax, one.exp_avg_sq_absmax)]
    return (
        tables.pointers(f"{name}.grads", [one.grad for one in quantized]),
        tables.pointers(f"{name}.codes", codes),
        tables.pointers(f"{name}.maxima", maxima),
    )


def quantized_aligned(quantized: Sequence[Quantized]) -> bool:
    """Return whether gradients and moments are aligned."""
    return aligned([shape_of(one)[0] for one in quantized], *(one[:5] for one in quantized))


def shape_of(quantized: Quantized) -> tuple[int, int, int]:
    """Return elements per row, blocks per row, and all blocks."""
    rows = len(quantized.exp_avg)
    n = quantized.exp_avg.numel() // max(1, rows)
    return n, block_count(n), rows * block_count(n)


def shapes_of(name: str, quantized: Sequence[Quantized], tables: Tables) -> Tensor:
    """Return ``shape_of`` every tensor, int64 ``[S, 3]`` flat."""
    return tables.numbers(f"{name}.shapes", tuple(x for one in quantized for x in shape_of(one)), torch.int64)
