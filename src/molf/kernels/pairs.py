"""The LoRA pairs of the merged form: their gradients, their step, and what it changes in the effective weight. cuBLAS multiplies.

    dB_i = s_i G A_i^T        dA_i = s_i B_i^T G

With the changes ``DB = B' - B`` and ``DA = A' - A`` (0 where the pair lost), and ``f = lr wd`` if ``fft`` won and else 0:

    W_eff += sum_i s_i B_i (f A_i + DA_i) + s_i DB_i A_i'

The first part undoes what the decay of all of ``W_eff`` did to the LoRA parts, which are not ``W``'s. All of it is one product
``X Y`` a layer, with ``X [out, 2 sum r]`` and ``Y [2 sum r, in]`` written by one kernel: no decision reaches the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from molf.kernels import tables as t
from molf.kernels.plan import Entry
from molf.kernels.tables import BLOCK, CHUNK, pointer, size_in
from molf.kernels.winners import moved

__all__ = ["move_pairs", "pair_gradients"]


def pair_gradients(
    pairs: Sequence[tuple[Entry, Entry]], dense: Sequence[Tensor], dAs: Sequence[Tensor], dBs: Sequence[Tensor]
) -> None:
    """Fill the gradients ``dA`` and ``dB`` of all pairs from the dense gradients of all rows, float32 or bf16."""
    weight, grad = -1, torch.empty(0)
    for (A, B), dA, dB in zip(pairs, dAs, dBs, strict=True):
        if A.weight != weight:
            weight, grad = A.weight, dense[A.weight]
            if grad.dtype != torch.float32:
                grad = grad.float()
        torch.addmm(dB, grad, A.tensor.param.T, beta=0, alpha=B.scale, out=dB)
        torch.addmm(dA, B.tensor.param.T, grad, beta=0, alpha=B.scale, out=dA)


@triton.jit
def move_pairs(rows, moves, operands, scalars, blocks, HINT: tl.constexpr):
    """Move A and B of the pairs that won, and write the operands of all: parts of X from B, of Y from A."""
    block = blocks + 3 * tl.program_id(0)
    i, start = tl.load(block), tl.multiple_of(tl.load(block + 1).to(tl.int32), CHUNK)
    row, move = rows + i * t.ROW, moves + i * t.MOVE
    size, columns = size_in(row + t.SIZE, HINT).to(tl.int32), size_in(row + t.COLUMNS, HINT).to(tl.int32)
    stride = size_in(row + t.STRIDE, HINT).to(tl.int32)
    first_operand = operands + size_in(row + t.OFFSET, HINT)
    second_operand = operands + size_in(row + t.SECOND, HINT)
    running = tl.load(scalars + t.GO) != 0
    won, fft = running & (tl.load(move + t.WON) != 0), running & (tl.load(move + t.FFT) != 0)
    # From B: s B beside s DB. From A, whose own scale is 1: f A + DA above A'.
    scale, is_b = tl.load(move + t.SCALE), tl.load(row + t.IS_B) != 0
    of_a = tl.where(is_b, 0.0, 1.0)
    old = tl.where(is_b, scale, tl.where(fft, tl.load(move + t.FFT_DECAY), 0.0))
    param = pointer(row + t.PARAM, tl.float32, HINT > 1)
    exp_avg = pointer(row + t.EXP_AVG, tl.float32, HINT > 1)
    exp_avg_sq = pointer(row + t.EXP_AVG_SQ, tl.float32, HINT > 1)
    for first in range(0, CHUNK, BLOCK):
        at = start + first + tl.arange(0, BLOCK)
        inside = at < size
        p = tl.load(param + at, mask=inside, other=0.0)
        change = tl.zeros((BLOCK,), dtype=tl.float32)
        if won:
            m = tl.load(exp_avg + at, mask=inside, other=0.0)
            v = tl.load(exp_avg_sq + at, mask=inside, other=0.0)
            now = moved(p, m, v, move, scalars)
            tl.store(param + at, now, mask=inside)
            change = now - p
        to = (at // columns) * stride + at % columns
        tl.store(first_operand + to, old * p + of_a * change, mask=inside)
        tl.store(second_operand + to, of_a * p + scale * change, mask=inside)
