"""8-bit moments (``molf.numerics.quantization``): updated in registers for the score, and again in phase 2, which keeps them.

A row of a tile is one block of 256 elements.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from molf.kernels import tables as t
from molf.kernels.moments import store_sums, updated
from molf.kernels.tables import pointer, size_in
from molf.kernels.winners import load_weight, moved, store_weight
from molf.numerics.quantization import code_values, nearest_code

__all__ = ["ROWS", "WARPS", "nearest", "requantize", "score_quantized", "values"]

ROWS = 16
"""Blocks of a tile."""

WARPS = 8
"""Warps of programs on tiles of 4096 8-bit elements; 4 would spill registers."""


@triton.jit
def _moments(codes, absmax, values, block, here, at, inside, ALIGNED: tl.constexpr):
    """Return the moments of a tile that are stored, given their two address entries; 0 outside."""
    code = tl.load(pointer(codes, tl.uint8, ALIGNED) + at, mask=inside, other=0)
    most = tl.load(pointer(absmax, tl.float32, ALIGNED) + block, mask=here, other=0.0)
    return tl.load(values + code.to(tl.int32)) * tl.where(inside, most, 0.0)


@triton.jit
def _updated(
    i,
    addresses,
    grads,
    sizes,
    values,
    scalars,
    first,
    GRAD: tl.constexpr,
    HINT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return a tile's updated moments, its gradient, its blocks and its elements, each with a mask."""
    row, address = sizes + i * t.SIZES, addresses + i * t.ADDRESSES
    block = first + tl.arange(0, ROWS)
    n, in_row = size_in(row + t.COLUMNS, HINT), tl.load(row + t.IN_ROW)
    column = (block % in_row * BLOCK)[:, None] + tl.arange(0, BLOCK)[None, :]
    at = (block // in_row * n)[:, None] + column
    here = (block < tl.load(row + t.BLOCKS))[:, None]
    inside, block = here & (column < n), block[:, None]
    g = tl.load(pointer(grads + i, GRAD, HINT > 1) + at, mask=inside, other=0.0).to(tl.float32)
    m = _moments(address + t.EXP_AVG, address + t.ABSMAX, values, block, here, at, inside, HINT > 1)
    v = _moments(address + t.EXP_AVG_SQ, address + t.ABSMAX_SQ, values + 256, block, here, at, inside, HINT > 1)
    m, v = updated(g, m, v, scalars)
    return m, v, g, block, here, at, inside


@triton.jit
def score_quantized(
    addresses,
    grads,
    sizes,
    partials,
    squares,
    scalars,
    values,
    blocks,
    GRAD: tl.constexpr,
    PFN: tl.constexpr,
    HINT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add up the sums of the scores as ``update_moments`` does; nothing is kept."""
    if tl.load(scalars + t.GO) == 0:
        return
    start = blocks + 3 * tl.program_id(0)
    i, first, slot = tl.load(start), tl.load(start + 1), tl.load(start + 2)
    m, v, g, _, _, _, _ = _updated(i, addresses, grads, sizes, values, scalars, first, GRAD, HINT, ROWS, BLOCK)
    u = m / (tl.sqrt(v) + tl.load(scalars + t.EPS))
    total, norm = tl.sum(tl.sum(u * u if PFN else m * u, axis=1), axis=0), tl.sum(tl.sum(g * g, axis=1), axis=0)
    store_sums(sizes + i * t.SIZES, partials + slot, squares + slot, total, norm)


@triton.jit
def _quantize(codes, absmax, block, here, at, inside, x, lower, starts, SIGNED: tl.constexpr, ALIGNED: tl.constexpr):
    """Write moments as codes and block maxima, given by their address entries."""
    x = tl.where(inside, x, 0.0)
    most = tl.max(tl.abs(x), axis=1)
    tl.store(pointer(absmax, tl.float32, ALIGNED) + block, most[:, None], mask=here)
    x = tl.div_rn(x, tl.where(most > 0, most, 1.0)[:, None] + tl.zeros_like(x))
    code = tl.load(lower + (x.to(tl.int32, bitcast=True) >> 16) + 32768).to(tl.int32)
    code += (x > tl.load(starts + code)).to(tl.int32)
    if not SIGNED:
        code = tl.maximum(code, (x > 0).to(tl.int32))
    tl.store(pointer(codes, tl.uint8, ALIGNED) + at, code.to(tl.uint8), mask=inside)


@triton.jit
def requantize(
    addresses,
    grads,
    sizes,
    factors,
    rates,
    corrections,
    chosen,
    products,
    values,
    lower,
    starts,
    scalars,
    seed,
    blocks,
    GRAD: tl.constexpr,
    STORAGE: tl.constexpr,
    PRODUCT: tl.constexpr,
    HINT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update the moments and write them back, for winners and losers; move parameters as ``move_winners`` does."""
    if tl.load(scalars + t.GO) == 0:
        return
    start = blocks + 3 * tl.program_id(0)
    i, first = tl.load(start), tl.load(start + 1)
    row, address = sizes + i * t.SIZES, addresses + i * t.ADDRESSES
    m, v, _, block, here, at, inside = _updated(
        i, addresses, grads, sizes, values, scalars, first, GRAD, HINT, ROWS, BLOCK
    )
    won = tl.load(chosen + tl.load(row + t.EXPERT)) != 0
    if won | PRODUCT:
        origin = first * 0
        p = load_weight(address, origin, at, inside, STORAGE, HINT > 1)
        if won:
            p = moved(p, m, v, i, sizes, factors, rates, corrections, scalars)
        if PRODUCT:
            p += tl.load(products + size_in(row + t.OFFSET, HINT) + at, mask=inside, other=0.0)
        store_weight(address, origin, at, inside, p, seed, row + t.STREAM, STORAGE, HINT > 1)
    _quantize(address + t.EXP_AVG, address + t.ABSMAX, block, here, at, inside, m, lower, starts, True, HINT > 1)
    codes, absmax = address + t.EXP_AVG_SQ, address + t.ABSMAX_SQ
    _quantize(codes, absmax, block, here, at, inside, v, lower + 65536, starts + 256, False, HINT > 1)


@functools.lru_cache
def values(device: torch.device) -> Tensor:
    """Return the values of the codes, first and second moments, float32 ``[512]``."""
    return torch.cat([code_values(signed, device) for signed in (True, False)])


@functools.lru_cache
def nearest(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the tables of ``nearest_code`` for first and second moments, concatenated."""
    first, second = (nearest_code(signed, device) for signed in (True, False))
    return torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]])
