"""Phase 1: update the moments of every expert and add up the sums of the scores.

    m += (1 - b1) (g - m)        v = b2 v + (1 - b2) g g        EPD: sum m u,  PFN: sum u u,  u = m / (sqrt(v) + eps)

Every block writes two partial sums, ``sums [slots, 2]``: of the score, and of ``g g`` for the norm, which costs no memory traffic
here; for coherence that of EPD and ``sum sqrt(v)``. A second launch adds them per expert in a fixed order, so that equal inputs
give equal scores, bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from molf.kernels import tables as t
from molf.kernels.tables import BLOCK, CHUNK, pointer, size_in

__all__ = ["COHERENCE", "EPD", "PFN", "store_sums", "sum_per_expert", "terms", "update_moments", "updated"]

EPD, PFN, COHERENCE = 0, 1, 2
"""What the two sums are of."""

_STRIP = tl.constexpr(256)


@triton.jit
def updated(g, m, v, scalars):
    """Return both moments after a step with these gradients; 1 - b2 is given, because it would lose digits in float32."""
    g *= tl.load(scalars + t.CLIP)
    m += tl.load(scalars + t.NEW1) * (g - m)
    v = tl.load(scalars + t.BETA2) * v + tl.load(scalars + t.NEW2) * g * g
    return m, tl.minimum(v, 3e38)  # infinite, it would stay so for good


@triton.jit
def terms(g, m, v, scalars, KIND: tl.constexpr):
    """Return what elements add to both sums, given their gradient and their updated moments; 0 if these are."""
    root = tl.sqrt(v)
    u = m / (root + tl.load(scalars + t.EPS))
    return u * u if KIND == 1 else m * u, root if KIND == 2 else g * g


@triton.jit
def update_moments(rows, sums, scalars, blocks, BF16: tl.constexpr, KIND: tl.constexpr, HINT: tl.constexpr):
    """Update float32 moments in place."""
    if tl.load(scalars + t.GO) == 0:
        return
    block = blocks + 3 * tl.program_id(0)
    i, start, slot = tl.load(block), tl.multiple_of(tl.load(block + 1), CHUNK), tl.load(block + 2)
    row = rows + i * t.ROW
    size = size_in(row + t.SIZE, HINT) - start
    grad = pointer(row + t.GRAD, tl.bfloat16 if BF16 else tl.float32, HINT > 1) + start
    exp_avg = pointer(row + t.EXP_AVG, tl.float32, HINT > 1) + start
    exp_avg_sq = pointer(row + t.EXP_AVG_SQ, tl.float32, HINT > 1) + start
    total, other = tl.zeros((BLOCK,), dtype=tl.float32), tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, CHUNK, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < size
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        m = tl.load(exp_avg + at, mask=inside, other=0.0)
        v = tl.load(exp_avg_sq + at, mask=inside, other=0.0)
        m, v = updated(g, m, v, scalars)
        tl.store(exp_avg + at, m, mask=inside)
        tl.store(exp_avg_sq + at, v, mask=inside)
        one, two = terms(g, m, v, scalars, KIND)
        total += one
        other += two
    store_sums(row, sums + 2 * slot, tl.sum(total, axis=0), tl.sum(other, axis=0), KIND)


@triton.jit
def store_sums(row, to, total, other, KIND: tl.constexpr):
    """Store a block's sums, 0 where they do not count."""
    tl.store(to, tl.where(tl.load(row + t.COUNTED) != 0, total, 0.0))
    tl.store(to + 1, tl.where(tl.load(row + (t.COUNTED if KIND == 2 else t.NORMED)) != 0, other, 0.0))


@triton.jit
def sum_per_expert(sums, totals, others, blocks):
    """Add an expert's partial sums; ``blocks [experts, 3]`` has its first and its last place."""
    expert = tl.program_id(0)
    first, last = tl.load(blocks + 3 * expert + 1), tl.load(blocks + 3 * expert + 2)
    total, other = tl.zeros((_STRIP,), dtype=tl.float64), tl.zeros((_STRIP,), dtype=tl.float64)
    for start in range(first, last, _STRIP):
        at = start + tl.arange(0, _STRIP)
        total += tl.load(sums + 2 * at, mask=at < last, other=0.0).to(tl.float64)
        other += tl.load(sums + 2 * at + 1, mask=at < last, other=0.0).to(tl.float64)
    tl.store(totals + expert, tl.sum(total, axis=0))
    tl.store(others + expert, tl.sum(other, axis=0))
