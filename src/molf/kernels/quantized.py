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
from molf.kernels.moments import store_sums, terms, updated
from molf.kernels.tables import CODES, TILE, pointer, size_in
from molf.kernels.winners import load_weight, moved, store_weight
from molf.numerics.quantization import code_values, nearest_code

__all__ = ["WARPS", "code_tables", "requantize", "score_quantized"]

WARPS = 4
"""Warps of programs on tiles of 2048 8-bit elements; on larger tiles Triton 3.6 needs a whole multiprocessor's registers."""


@triton.jit
def _moments(codes, absmax, values, block, here, at, inside, ALIGNED: tl.constexpr):
    """Return the moments of a tile that are stored, given their two address entries; 0 outside."""
    code = tl.load(pointer(codes, tl.uint8, ALIGNED) + at, mask=inside, other=0)
    most = tl.load(pointer(absmax, tl.float32, ALIGNED) + block, mask=here, other=0.0)
    return tl.load(values + code.to(tl.int32)) * tl.where(inside, most, 0.0)


@triton.jit
def _updated(row, values, scalars, first, BF16: tl.constexpr, HINT: tl.constexpr):
    """Return a tile's updated moments, its gradient, its blocks and its elements, each with a mask."""
    n, block = size_in(row + t.COLUMNS, HINT), first.to(tl.int32) + tl.arange(0, TILE)
    in_row = tl.cdiv(n.to(tl.int32), CODES)  # in 64 bits, divisions cost several times as much
    begin = ((block // in_row) * n)[:, None]
    column = (block % in_row * CODES)[:, None] + tl.arange(0, CODES)[None, :]
    here, block, at = begin < tl.load(row + t.SIZE), block[:, None], begin + column
    inside = here & (column < n)
    grad = pointer(row + t.GRAD, tl.bfloat16 if BF16 else tl.float32, HINT > 1)
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    m = _moments(row + t.EXP_AVG, row + t.ABSMAX, values, block, here, at, inside, HINT > 1)
    v = _moments(row + t.EXP_AVG_SQ, row + t.ABSMAX_SQ, values + 256, block, here, at, inside, HINT > 1)
    m, v = updated(g, m, v, scalars)
    return m, v, g, block, here, at, inside


@triton.jit
def score_quantized(rows, sums, scalars, values, blocks, BF16: tl.constexpr, KIND: tl.constexpr, HINT: tl.constexpr):
    """Add up the sums of the scores as ``update_moments`` does; nothing is kept."""
    if tl.load(scalars + t.GO) == 0:
        return
    start = blocks + 3 * tl.program_id(0)
    i, first, slot = tl.load(start), tl.load(start + 1), tl.load(start + 2)
    row = rows + i * t.ROW
    m, v, g, _, _, _, _ = _updated(row, values, scalars, first, BF16, HINT)
    one, two = terms(g, m, v, scalars, KIND)
    total, other = tl.sum(tl.sum(one, axis=1), axis=0), tl.sum(tl.sum(two, axis=1), axis=0)
    store_sums(row, sums + 2 * slot, total, other, KIND)


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
    rows,
    moves,
    products,
    scalars,
    seed,
    values,
    lower,
    starts,
    blocks,
    STORAGE: tl.constexpr,
    PRODUCT: tl.constexpr,
    HINT: tl.constexpr,
):
    """Update the moments and write them back, for winners and losers; move parameters as ``move_winners`` does."""
    if tl.load(scalars + t.GO) == 0:
        return
    start = blocks + 3 * tl.program_id(0)
    i, first = tl.load(start), tl.load(start + 1)
    row, move = rows + i * t.ROW, moves + i * t.MOVE
    m, v, _, block, here, at, inside = _updated(row, values, scalars, first, STORAGE != 0, HINT)
    won = tl.load(move + t.WON) != 0
    if won | PRODUCT:
        origin = first * 0
        p = load_weight(row, origin, at, inside, STORAGE, HINT > 1)
        if won:
            p = moved(p, m, v, move, scalars)
        if PRODUCT:
            p += tl.load(products + size_in(row + t.OFFSET, HINT) + at, mask=inside, other=0.0)
        store_weight(row, origin, at, inside, p, seed, STORAGE, HINT > 1)
    _quantize(row + t.EXP_AVG, row + t.ABSMAX, block, here, at, inside, m, lower, starts, True, HINT > 1)
    codes, absmax = row + t.EXP_AVG_SQ, row + t.ABSMAX_SQ
    _quantize(codes, absmax, block, here, at, inside, v, lower + 65536, starts + 256, False, HINT > 1)


@functools.lru_cache
def code_tables(device: torch.device) -> tuple[Tensor, ...]:
    """Return the values of the codes and the two tables of ``nearest_code``, of first moments and, behind them, second ones."""
    kinds = [(code_values(signed, device), *nearest_code(signed, device)) for signed in (True, False)]
    return tuple(map(torch.cat, zip(*kinds, strict=True)))
