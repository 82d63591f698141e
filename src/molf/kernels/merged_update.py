"""Phase 2 of the merged form: the winner's step in the effective weight, tile by tile, one launch for the whole model.

With ``W_eff = W + sum_i s_i B_i A_i`` and the pairs already updated (``B'``, ``A'``, changes ``dB``, ``dA``):

    fft won      W_eff -= lr wd (W_eff - sum_i s_i B_i A_i) + lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
    LoRA i won   W_eff += s_i (B_i dA + dB A_i')

A tile reads moments only if ``fft`` won, and pairs only if one won or ``W`` is decayed. 8-bit moments are still those of the last
step: this kernel updates them in registers, and ``molf.kernels.requantize`` writes them back later.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from molf.kernels.addresses import aligned, pointer, size_in
from molf.kernels.moments import GRADIENTS, Scalars
from molf.kernels.quantized import Quantized, load_updated, pointers, values
from molf.kernels.tables import Rate, Tables, launch
from molf.kernels.winners import (
    adam_change,
    load_weight,
    per_tensor_scalars,
    storage_of,
    store_weight,
    weight_addresses,
)
from molf.numerics.quantization import BLOCK

__all__ = ["Effective", "UpdatedPair", "update_merged_weights_"]

_TILE, _DEPTH = 64, 32
_WARPS = 8  # 4 would spill registers


class UpdatedPair(NamedTuple):
    """A LoRA expert after its step: the pair now, its changes (undefined if it lost), and its scale.

    ``b_is_nonzero`` is a 0-dim float32 tensor on the device: how often the pair was updated before this step.
    """

    A: Tensor
    B: Tensor
    dA: Tensor
    dB: Tensor
    scale: float
    b_is_nonzero: Tensor


class Effective(NamedTuple):
    """A layer's effective weight: parameter, low part, float32 or 8-bit moments, R pairs; the rest as in ``winners.Step``."""

    weight: Tensor
    low: Tensor | None
    moments: tuple[Tensor, Tensor] | Quantized
    layer: int
    stream: int
    lr: float | Rate
    weight_decay: float
    pairs: tuple[UpdatedPair, ...]


@triton.jit
def _add_product(
    total,
    scale,
    left,
    right,
    sign_left,
    sign_right,
    rows,
    columns,
    n_out,
    n_in,
    r,
    BK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Return ``total + scale (L + sign_left dL)[rows] @ (R + sign_right dR)[:, columns]``; a sign of 0 leaves the change out.

    ``left`` and ``right`` are the address entries of a matrix and of its change. Tensor cores truncate factors to 11 bits;
    tf32x3 represents each factor by two such numbers.
    """
    L, dL = pointer(left[0], tl.float32, ALIGNED), pointer(left[1], tl.float32, ALIGNED)
    R, dR = pointer(right[0], tl.float32, ALIGNED), pointer(right[1], tl.float32, ALIGNED)
    for k in range(0, r, BK):
        ranks = k + tl.arange(0, BK)
        at = rows.to(tl.int64)[:, None] * r + ranks[None, :]
        inside = (rows < n_out)[:, None] & (ranks < r)[None, :]
        x = tl.load(L + at, mask=inside, other=0.0)
        if sign_left != 0:
            x += sign_left * tl.load(dL + at, mask=inside, other=0.0)
        at = ranks.to(tl.int64)[:, None] * n_in + columns[None, :]
        inside = (ranks < r)[:, None] & (columns < n_in)[None, :]
        y = tl.load(R + at, mask=inside, other=0.0)
        if sign_right != 0:
            y += sign_right * tl.load(dR + at, mask=inside, other=0.0)
        total = tl.dot(scale * x, y, total, input_precision="tf32x3")
    return total


@triton.jit
def _merged_update(
    weights,
    lows,
    grads,
    moments,
    maxima,
    values,
    pairs,
    b_is_nonzeros,
    ranks,
    scales,
    shapes,
    layers,
    streams,
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
    STORAGE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    if tl.load(go) == 0:
        return
    tile = tiles + 3 * tl.program_id(0)
    i, first = tl.load(tile), tl.multiple_of(tl.load(tile + 2), BN)
    rows, columns = tl.load(tile + 1) + tl.arange(0, BM), first + tl.arange(0, BN)
    n_out, n_in = tl.load(shapes + 2 * i), size_in(shapes + 2 * i + 1, ALIGNED)
    layer, lr = tl.load(layers + i), tl.load(rates + i)
    won, decay = chosen + layer * (R + 1), lr * tl.load(decays + i)
    fft = tl.load(won) != 0
    change = tl.zeros((BM, BN), dtype=tl.float32)
    for e in tl.static_range(R):
        A, r, s = pairs + 4 * (i * R + e), size_in(ranks + i * R + e, ALIGNED), tl.load(scales + i * R + e)
        B, dA, dB = A + 1, A + 2, A + 3
        moved = tl.load(won + e + 1) != 0
        if fft & (decay != 0) & (tl.load(pointer(b_is_nonzeros + i * R + e, tl.float32, False)) != 0):
            to, back = decay * s, -moved.to(tl.float32)
            change = _add_product(change, to, (B, dB), (A, dA), back, back, rows, columns, n_out, n_in, r, BK, ALIGNED)
        if moved:
            change = _add_product(change, s, (B, dB), (dA, dA), -1.0, 0.0, rows, columns, n_out, n_in, r, BK, ALIGNED)
            change = _add_product(change, s, (dB, dB), (A, A), 0.0, 0.0, rows, columns, n_out, n_in, r, BK, ALIGNED)
    at = rows.to(tl.int64)[:, None] * n_in + columns[None, :]
    inside = (rows < n_out)[:, None] & (columns < n_in)[None, :]
    if fft:
        if GRAD is None:
            m = tl.load(pointer(moments + 2 * i, tl.float32, ALIGNED) + at, mask=inside, other=0.0)
            v = tl.load(pointer(moments + 2 * i + 1, tl.float32, ALIGNED) + at, mask=inside, other=0.0)
        else:  # a tile lies within one quantization block of each row
            here, block = (rows < n_out)[:, None], (rows.to(tl.int64) * tl.cdiv(n_in, BLOCK) + first // BLOCK)[:, None]
            m, v = load_updated(
                grads, moments, maxima, i, block, here, at, inside, values, clip, beta1, beta2, GRAD, ALIGNED
            )
        change -= lr * adam_change(m, v, corrections + 2 * layer, eps)
    W = load_weight(weights + i, lows + i, at, inside, STORAGE, ALIGNED)
    W += tl.where(fft, change - decay * W, change)
    store_weight(weights + i, lows + i, at, inside, W, seed, streams + i, STORAGE, ALIGNED)


def update_merged_weights_(
    layers: Sequence[Effective],
    chosen: Tensor,
    corrections: Tensor,
    betas: tuple[float, float],
    eps: float,
    scalars: Scalars,
    tables: Tables,
    seed: Tensor | None = None,
) -> None:
    """Apply the winners' step to all effective weights.

    Args:
        layers: All layers with their pairs, R each.
        chosen: Whether each expert won, int8 ``[L * E]`` on the device, ``fft`` first in every layer.
        corrections: ``1 - b1^t`` and ``sqrt(1 - b2^t)`` of each layer, float32 ``[L, 2]`` on the device.
        betas: Decay rates of the moments.
        eps: Added to the denominator.
        scalars: Whether to take the step, and the factor of the gradients.
        tables: Of this device.
        seed: As in ``winners.move_winners_``.
    """
    for (how, grad), group in groupby(sorted(layers, key=_kind), key=_kind):
        own, name = list(group), f"fold.{how}.{grad}"
        quantized = [layer.moments for layer in own if isinstance(layer.moments, Quantized)]
        weights, lows = [layer.weight for layer in own], [layer.low for layer in own if layer.low is not None]
        shapes = tuple((x.shape[0], x.shape[1]) for x in weights)
        tiles = tables.tiles(f"{name}.tiles", shapes, (_TILE, _TILE))
        launch(
            _merged_update,
            len(tiles),
            *weight_addresses(name, weights, lows, tables),
            *_moments(name, own, quantized, tables),
            values(tables.device),
            *_pairs(name, own, tables),
            tables.numbers(f"{name}.shapes", tuple(n for shape in shapes for n in shape), torch.int32),
            *per_tensor_scalars(name, own, tables),
            corrections,
            chosen,
            tiles,
            *scalars,
            *betas,
            eps,
            scalars.go if seed is None else seed,
            R=len(own[0].pairs),
            GRAD=GRADIENTS[quantized[0].grad.dtype] if quantized else None,
            BLOCK=BLOCK,
            STORAGE=how,
            ALIGNED=_aligned(own),
            BM=_TILE,
            BN=_TILE,
            BK=_DEPTH,
            num_warps=_WARPS,
        )


def _kind(layer: Effective) -> tuple[int, str]:
    return storage_of(layer.weight, layer.low), str(layer.moments.grad.dtype) if isinstance(
        layer.moments, Quantized
    ) else ""


def _pairs(name: str, layers: Sequence[Effective], tables: Tables) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return for all pairs: addresses of A, B, dA and dB ``[L * R, 4]``, addresses of ``started``, ranks, scales."""
    pairs = [pair for layer in layers for pair in layer.pairs]
    return (
        tables.pointers(f"{name}.pairs", [x for pair in pairs for x in (pair.A, pair.B, pair.dA, pair.dB)]),
        tables.pointers(f"{name}.started", [pair.b_is_nonzero for pair in pairs]),
        tables.numbers(f"{name}.ranks", tuple(pair.A.shape[0] for pair in pairs), torch.int32),
        tables.numbers(f"{name}.scales", tuple(pair.scale for pair in pairs), torch.float32),
    )


def _aligned(layers: Sequence[Effective]) -> bool:
    tensors = [x for layer in layers for x in (layer.weight, layer.low, *layer.moments) if isinstance(x, Tensor)]
    pairs = [pair for layer in layers for pair in layer.pairs]
    sizes = [layer.weight.shape[1] for layer in layers] + [pair.A.shape[0] for pair in pairs]
    return aligned(sizes, tensors, [x for pair in pairs for x in (pair.A, pair.B, pair.dA, pair.dB)])


def _moments(
    name: str, layers: Sequence[Effective], quantized: Sequence[Quantized], tables: Tables
) -> tuple[Tensor, Tensor, Tensor]:
    """Return addresses: of gradients, of moments ``[L, 2]`` and of block maxima; only the moments' if float32."""
    if quantized:
        return pointers(name, quantized, tables)
    pairs = [layer.moments for layer in layers if not isinstance(layer.moments, Quantized)]
    moments = tables.pointers(f"{name}.moments", [x for pair in pairs for x in pair])
    return moments, moments, moments
