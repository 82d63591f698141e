"""Phase 2: the AdamW step of the tensors whose expert won. Blocks of losers return at once and read nothing.

    p = (1 - lr wd) p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

A bf16 parameter has a 16-bit low part (``p = join(high, low)``, ``molf.numerics.bf16``) or is rounded stochastically. What pairs
change in a bf16 effective weight is added before it is rounded; in a float32 one, cuBLAS adds it in place.
"""

from __future__ import annotations

import triton
import triton.language as tl

from molf.kernels import tables as t
from molf.kernels.tables import BLOCK, CHUNK, pointer, size_in

__all__ = ["FLOAT", "SPLIT", "STOCHASTIC", "load_weight", "move_winners", "moved", "store_weight"]

FLOAT, SPLIT, STOCHASTIC = 0, 1, 2
"""How a weight is stored: float32; bf16 with a low part; bf16, rounded stochastically."""


@triton.jit
def moved(p, m, v, move, scalars):
    """Return values after their AdamW step, given their row of ``moves``."""
    correction = tl.sqrt(tl.load(move + t.CORRECTION2))
    change = correction / tl.load(move + t.CORRECTION1) * m / (tl.sqrt(v) + tl.load(scalars + t.EPS) * correction)
    return p * (1 - tl.load(move + t.DECAY)) - tl.load(move + t.LR) * change


@triton.jit
def load_weight(row, start, at, inside, STORAGE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return elements ``start + at`` of a parameter in float32, given its row."""
    if STORAGE == 0:
        return tl.load(pointer(row + t.PARAM, tl.float32, ALIGNED) + start + at, mask=inside, other=0.0)
    bits = tl.load(pointer(row + t.PARAM, tl.int16, ALIGNED) + start + at, mask=inside, other=0).to(tl.int32)
    if STORAGE == 1:
        rest = tl.load(pointer(row + t.LOW, tl.int16, ALIGNED) + start + at, mask=inside, other=0).to(tl.int32)
        # A weight that the user set to zero keeps its old remainder; a negative one is ignored.
        rest = tl.where(((bits & 0x7FFF) == 0) & (rest < 0), 0, rest)
        return ((bits << 16) + rest).to(tl.float32, bitcast=True)
    return (bits << 16).to(tl.float32, bitcast=True)


@triton.jit
def store_weight(row, start, at, inside, value, seed, STORAGE: tl.constexpr, ALIGNED: tl.constexpr):
    """Store float32 values for ``load_weight``; ``seed`` is an address."""
    if STORAGE == 0:
        tl.store(pointer(row + t.PARAM, tl.float32, ALIGNED) + start + at, value, mask=inside)
    else:
        bits = value.to(tl.int32, bitcast=True)
        if STORAGE == 1:
            high = (bits + 0x8000) >> 16
            low = pointer(row + t.LOW, tl.int16, ALIGNED) + start + at
            tl.store(low, (bits - (high << 16)).to(tl.int16), mask=inside)
        else:  # 32-bit places: in 64 bits the generator costs several times as much
            noise = tl.randint(tl.load(seed) + tl.load(row + t.STREAM), start.to(tl.int32) + at.to(tl.int32))
            high = (bits + (noise & 0xFFFF).to(tl.int32)) >> 16
        tl.store(pointer(row + t.PARAM, tl.int16, ALIGNED) + start + at, high.to(tl.int16), mask=inside)


@triton.jit
def move_winners(
    rows, moves, products, scalars, seed, blocks, STORAGE: tl.constexpr, PRODUCT: tl.constexpr, HINT: tl.constexpr
):
    """Move tensors with float32 moments; with ``PRODUCT`` also add to each what its pairs change."""
    block = blocks + 3 * tl.program_id(0)
    i, start = tl.load(block), tl.multiple_of(tl.load(block + 1), CHUNK)
    row, move = rows + i * t.ROW, moves + i * t.MOVE
    won = tl.load(move + t.WON) != 0
    if (tl.load(scalars + t.GO) == 0) | ((won | PRODUCT) == 0):
        return
    size = size_in(row + t.SIZE, HINT) - start
    exp_avg = pointer(row + t.EXP_AVG, tl.float32, HINT > 1) + start
    exp_avg_sq = pointer(row + t.EXP_AVG_SQ, tl.float32, HINT > 1) + start
    for first in range(0, CHUNK, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < size
        p = load_weight(row, start, at, inside, STORAGE, HINT > 1)
        if won:
            m = tl.load(exp_avg + at, mask=inside, other=0.0)
            v = tl.load(exp_avg_sq + at, mask=inside, other=0.0)
            p = moved(p, m, v, move, scalars)
        if PRODUCT:
            p += tl.load(products + size_in(row + t.OFFSET, HINT) + start + at, mask=inside, other=0.0)
        store_weight(row, start, at, inside, p, seed, STORAGE, HINT > 1)
