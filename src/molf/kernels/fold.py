"""Phase 2 of the merged form: the winner's step inside the effective weight, tile by tile, one launch for the whole model.

With ``W_eff = W + sum_i s_i B_i A_i`` and the pairs already moved (``B'``, ``A'``, changes ``dB``, ``dA``):

    fft won      W_eff -= lr wd (W_eff - sum_i s_i B_i A_i) + lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
    LoRA i won   W_eff += s_i (B_i dA + dB A_i')

A tile reads moments where ``fft`` won, and pairs where one won or is decayed away from; nothing else. Moments in 8 bits are
still those of the step before: they are opened and moved here, and written back later (``molf.kernels.settle``).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from molf.kernels.moments import GRADIENTS, Scalars
from molf.kernels.packed import Packed, load_moved, pointers, values
from molf.kernels.tables import OPTIONS, Rate, Tables
from molf.kernels.winners import MOST, held, load_weight, store_weight
from molf.quantised import BLOCK

__all__ = ["Effective", "MovedPair", "fold_winners_"]

_TILE, _DEPTH = 64, 32
_WARPS = 8  # with 4, registers don't suffice


class MovedPair(NamedTuple):
    """A LoRA expert after its step: the pair as it is now, the changes (of no meaning where it lost), and its scale.

    ``started`` is a 0-dim float32 tensor on the device, how often the pair had moved before this step.
    """

    A: Tensor
    B: Tensor
    dA: Tensor
    dB: Tensor
    scale: float
    started: Tensor


class Effective(NamedTuple):
    """A layer's effective weight: its parameter, low part, float32 or 8-bit moments, rate and decay, and its R pairs."""

    weight: Tensor
    low: Tensor | None
    moments: tuple[Tensor, Tensor] | Packed
    layer: int
    lr: float | Rate
    weight_decay: float
    pairs: tuple[MovedPair, ...]


@triton.jit
def _add_product(total, scale, left, right, sign_left, sign_right, rows, columns, n_out, n_in, r, BK: tl.constexpr):
    """Return ``total + scale (L + sign_left dL)[rows] @ (R + sign_right dR)[:, columns]``; a sign of 0 leaves the change out.

    ``left`` and ``right`` are each the address of a matrix and of its change. Tensor cores would drop all but 10 bits of the
    factors, and always towards zero: each is taken as two numbers of 11 bits (tf32x3), so losers keep their weights.
    """
    for k in range(0, r, BK):
        ranks = k + tl.arange(0, BK)
        at = rows.to(tl.int64)[:, None] * r + ranks[None, :]
        inside = (rows < n_out)[:, None] & (ranks < r)[None, :]
        x = tl.load(left[0].to(tl.pointer_type(tl.float32)) + at, mask=inside, other=0.0)
        if sign_left != 0:
            x += sign_left * tl.load(left[1].to(tl.pointer_type(tl.float32)) + at, mask=inside, other=0.0)
        at = ranks.to(tl.int64)[:, None] * n_in + columns[None, :]
        inside = (ranks < r)[:, None] & (columns < n_in)[None, :]
        y = tl.load(right[0].to(tl.pointer_type(tl.float32)) + at, mask=inside, other=0.0)
        if sign_right != 0:
            y += sign_right * tl.load(right[1].to(tl.pointer_type(tl.float32)) + at, mask=inside, other=0.0)
        total = tl.dot(scale * x, y, total, input_precision="tf32x3")
    return total


@triton.jit
def _fold(
    weights,
    lows,
    grads,
    moments,
    maxima,
    values,
    pairs,
    starteds,
    shapes,
    ranks_of,
    scales,
    layers,
    rates,
    decays,
    corrections,
    chosen,
    tiles,
    go,
    clip,
    beta1,
    beta2,
    eps,
    seed,
    R: tl.constexpr,
    GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
    HELD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    if tl.load(go) == 0:
        return
    tile = tl.program_id(0)
    i = tl.load(tiles + 3 * tile)
    first = tl.load(tiles + 3 * tile + 2)
    rows, columns = tl.load(tiles + 3 * tile + 1) + tl.arange(0, BM), first + tl.arange(0, BN)
    n_out, n_in, layer = tl.load(shapes + 2 * i), tl.load(shapes + 2 * i + 1), tl.load(layers + i)
    won = chosen + layer * (R + 1)
    fft = tl.load(won) != 0
    lr = tl.load(rates + i)
    kept = lr * tl.load(decays + i)
    change = tl.zeros((BM, BN), dtype=tl.float32)
    for e in tl.static_range(R):
        own, r, scale = pairs + 4 * (i * R + e), tl.load(ranks_of + i * R + e), tl.load(scales + i * R + e)
        A, B, dA, dB = tl.load(own), tl.load(own + 1), tl.load(own + 2), tl.load(own + 3)
        moved = tl.load(won + e + 1) != 0
        if fft & (kept != 0) & (tl.load(tl.load(starteds + i * R + e).to(tl.pointer_type(tl.float32))) != 0):
            back = -moved.to(tl.float32)
            change = _add_product(change, kept * scale, (B, dB), (A, dA), back, back, rows, columns, n_out, n_in, r, BK)
        if moved:
            change = _add_product(change, scale, (B, dB), (dA, dA), -1.0, 0.0, rows, columns, n_out, n_in, r, BK)
            change = _add_product(change, scale, (dB, dB), (A, A), 0.0, 0.0, rows, columns, n_out, n_in, r, BK)
    at = rows.to(tl.int64)[:, None] * n_in + columns[None, :]
    inside = (rows < n_out)[:, None] & (columns < n_in)[None, :]
    if fft:
        correction1, correction2 = tl.load(corrections + 2 * layer), tl.load(corrections + 2 * layer + 1)
        pair = 2 * i
        if GRAD is None:
            m = tl.load(tl.load(moments + pair).to(tl.pointer_type(tl.float32)) + at, mask=inside, other=0.0)
            v = tl.load(tl.load(moments + pair + 1).to(tl.pointer_type(tl.float32)) + at, mask=inside, other=0.0)
        else:
            # A tile lies within one block of each row.
            block = (rows.to(tl.int64) * tl.cdiv(n_in, BLOCK) + first // BLOCK)[:, None]
            here, grad, factor = (rows < n_out)[:, None], tl.load(grads + i), tl.load(clip)
            m, v = load_moved(
                grad, moments + pair, maxima + pair, block, here, at, inside, values, factor, beta1, beta2, GRAD
            )
        change -= lr * correction2 / correction1 * m / (tl.sqrt(v) + eps * correction2)
    weight, low = tl.load(weights + i), tl.load(lows + i)
    W = load_weight(weight, low, at, inside, HELD)
    W += tl.where(fft, change - kept * W, change)
    store_weight(weight, low, at, inside, W, seed, -1 - layer, HELD)  # a layer has one effective weight


def fold_winners_(
    layers: Sequence[Effective],
    chosen: Tensor,
    corrections: Tensor,
    betas: tuple[float, float],
    eps: float,
    scalars: Scalars,
    tables: Tables,
    seed: Tensor | None = None,
) -> None:
    """Take the winners' step in all effective weights.

    Args:
        layers: Every layer with its pairs, the same number R of pairs in all.
        chosen: Whether each expert won, int8 ``[L * E]`` on the device, ``fft`` first in every layer.
        corrections: ``1 - b1^t`` and ``sqrt(1 - b2^t)`` of each layer, float32 ``[L, 2]`` on the device.
        betas: Decay rates of the moments.
        eps: Added to the denominator.
        scalars: Whether to go on, and the factor of the gradients.
        tables: Of this device.
        seed: Of this step's stochastic rounding, int64 on the device; needed where a bf16 parameter has no low part.
    """

    def kind(layer: Effective) -> tuple[int, str]:
        grad = str(layer.moments.grad.dtype) if isinstance(layer.moments, Packed) else ""
        return held(layer.weight, layer.low), grad

    for (how, grad), group in groupby(sorted(layers, key=kind), key=kind):
        own, name = list(group), f"fold.{how}.{grad}"
        assert len(own) <= MOST, "numbers tell the noise of one tensor from another's"
        packed = [layer.moments for layer in own if isinstance(layer.moments, Packed)]
        pairs = [pair for layer in own for pair in layer.pairs]
        shapes = tuple((layer.weight.shape[0], layer.weight.shape[1]) for layer in own)
        tiles = tables.tiles(f"{name}.tiles", shapes, (_TILE, _TILE))
        weights = tables.pointers(f"{name}.weights", [layer.weight for layer in own])
        lows = [layer.low for layer in own if layer.low is not None]
        _fold[(len(tiles),)](
            weights,
            tables.pointers(f"{name}.lows", lows) if lows else weights,
            *_moments(name, own, packed, tables),
            values(tables.device),
            tables.pointers(f"{name}.pairs", [x for pair in pairs for x in (pair.A, pair.B, pair.dA, pair.dB)]),
            tables.pointers(f"{name}.started", [pair.started for pair in pairs]),
            tables.numbers(f"{name}.shapes", tuple(n for shape in shapes for n in shape), torch.int32),
            tables.numbers(f"{name}.ranks", tuple(pair.A.shape[0] for pair in pairs), torch.int32),
            tables.numbers(f"{name}.scales", tuple(pair.scale for pair in pairs), torch.float32),
            tables.numbers(f"{name}.layers", tuple(layer.layer for layer in own), torch.int32),
            tables.rates(f"{name}.rates", [layer.lr for layer in own]),
            tables.numbers(f"{name}.decays", tuple(layer.weight_decay for layer in own), torch.float32),
            corrections,
            chosen,
            tiles,
            *scalars,
            *betas,
            eps,
            scalars.go if seed is None else seed,
            R=len(own[0].pairs),
            GRAD=GRADIENTS[packed[0].grad.dtype] if packed else None,
            BLOCK=BLOCK,
            HELD=how,
            BM=_TILE,
            BN=_TILE,
            BK=_DEPTH,
            num_warps=_WARPS,
            **OPTIONS,
        )


def _moments(
    name: str, layers: Sequence[Effective], packed: Sequence[Packed], tables: Tables
) -> tuple[Tensor, Tensor, Tensor]:
    """Return addresses: of gradients, of moments ``[L, 2]`` and of their block maxima; only the moments' if they are float32."""
    if packed:
        return pointers(name, packed, tables)
    pairs = [layer.moments for layer in layers if not isinstance(layer.moments, Packed)]
    moments = tables.pointers(f"{name}.moments", [x for pair in pairs for x in pair])
    return moments, moments, moments
