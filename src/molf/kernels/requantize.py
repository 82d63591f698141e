"""Phase 2 of 8-bit moments: updated again and written back, for winners and losers; winners' parameters take the AdamW step.

``merged_update`` moves effective weights. It runs first, because it reads the same codes.
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

from molf.kernels.addresses import aligned, pointer
from molf.kernels.moments import GRADIENTS, Scalars
from molf.kernels.quantized import (
    ROWS,
    WARPS,
    Quantized,
    load_updated,
    places,
    pointers,
    quantized_aligned,
    shape_of,
    shapes_of,
    values,
)
from molf.kernels.tables import Rate, Tables, launch
from molf.kernels.winners import (
    adam_change,
    load_weight,
    per_tensor_scalars,
    storage_of,
    store_weight,
    weight_addresses,
)
from molf.numerics.quantization import BLOCK, nearest_code

__all__ = ["QuantizedStep", "requantize_"]

_NO_STEP = -1  # beside the storages of ``winners``: the parameter is not moved here


class QuantizedStep(NamedTuple):
    """One matrix with 8-bit moments.

    Attributes:
        quantized: Gradient and moments.
        param: Float32 or bf16; None for an effective weight, which is moved elsewhere.
        low: The low part of a bf16 parameter, or None.
        layer: Number of its layer, for the step count.
        stream: Selects its random numbers, in [0, 2^62).
        lr: Learning rate.
        weight_decay: Decoupled decay.
    """

    quantized: Quantized
    param: Tensor | None
    low: Tensor | None
    layer: int
    stream: int
    lr: float | Rate
    weight_decay: float


@triton.jit
def _quantize(codes, maxima, block, here, at, inside, x, lower, starts, SIGNED: tl.constexpr, ALIGNED: tl.constexpr):
    """Write moments as codes and block maxima, given by their address entries."""
    x = tl.where(inside, x, 0.0)
    most = tl.max(tl.abs(x), axis=1)
    tl.store(pointer(maxima, tl.float32, ALIGNED) + block, most[:, None], mask=here)
    x = tl.div_rn(x, tl.where(most > 0, most, 1.0)[:, None] + tl.zeros_like(x))
    code = tl.load(lower + (x.to(tl.int32, bitcast=True) >> 16) + 32768).to(tl.int32)
    code += (x > tl.load(starts + code)).to(tl.int32)
    if not SIGNED:
        code = tl.maximum(code, (x > 0).to(tl.int32))
    tl.store(pointer(codes, tl.uint8, ALIGNED) + at, code.to(tl.uint8), mask=inside)


@triton.jit
def _requantize(
    weights,
    lows,
    grads,
    codes,
    maxima,
    shapes,
    experts,
    layers,
    streams,
    rates,
    decays,
    corrections,
    chosen,
    blocks,
    values,
    lower,
    starts,
    go,
    clip,
    beta1,
    beta2,
    eps,
    seed,
    GRAD: tl.constexpr,
    STORAGE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if tl.load(go) == 0:
        return
    entry, block, here, at, inside = places(blocks, shapes, ALIGNED, ROWS, BLOCK)
    m, v = load_updated(grads, codes, maxima, entry, block, here, at, inside, values, clip, beta1, beta2, GRAD, ALIGNED)
    if STORAGE >= 0:  # noqa: SIM102 - a compile-time branch
        if tl.load(chosen + tl.load(experts + entry)) != 0:
            lr, decay = tl.load(rates + entry), tl.load(decays + entry)
            p = load_weight(weights + entry, lows + entry, at, inside, STORAGE, ALIGNED)
            p = p * (1 - lr * decay) - lr * adam_change(m, v, corrections + 2 * tl.load(layers + entry), eps)
            store_weight(weights + entry, lows + entry, at, inside, p, seed, streams + entry, STORAGE, ALIGNED)
    codes, maxima = codes + 2 * entry, maxima + 2 * entry
    _quantize(codes, maxima, block, here, at, inside, m, lower, starts, True, ALIGNED)
    _quantize(codes + 1, maxima + 1, block, here, at, inside, v, lower + 65536, starts + 256, False, ALIGNED)


def requantize_(
    entries: Sequence[QuantizedStep],
    chosen: Tensor,
    corrections: Tensor,
    betas: tuple[float, float],
    eps: float,
    scalars: Scalars,
    tables: Tables,
    seed: Tensor | None = None,
) -> None:
    """Update the 8-bit moments of all matrices, and the parameters of those whose expert won.

    Args:
        entries: The matrices.
        chosen: Whether each expert won, int8 ``[L * E]`` on the device.
        corrections: ``1 - b1^t`` and ``sqrt(1 - b2^t)`` of each layer, float32 ``[L, 2]`` on the device.
        betas: Decay rates of the moments.
        eps: Added to the denominator.
        scalars: Whether to take the step, and the factor of the gradients.
        tables: Of this device.
        seed: As in ``winners.move_winners_``.
    """
    for (dtype, how), group in groupby(sorted(entries, key=_kind), key=_kind):
        own, name = list(group), f"requantize.{dtype}.{how}"
        quantized = [entry.quantized for entry in own]
        weights = [entry.param for entry in own if entry.param is not None]
        lows = [entry.low for entry in own if entry.low is not None]
        blocks = tables.blocks(f"{name}.blocks", tuple(shape_of(one)[2] for one in quantized), ROWS)
        launch(
            _requantize,
            len(blocks),
            *(weight_addresses(name, weights, lows, tables) if weights else (blocks, blocks)),
            *pointers(name, quantized, tables),
            shapes_of(name, quantized, tables),
            tables.numbers(f"{name}.experts", tuple(entry.quantized.expert for entry in own), torch.int32),
            *per_tensor_scalars(name, own, tables),
            corrections,
            chosen,
            blocks,
            values(tables.device),
            *_nearest(tables.device),
            *scalars,
            *betas,
            eps,
            scalars.go if seed is None else seed,
            GRAD=GRADIENTS[quantized[0].grad.dtype],
            STORAGE=how,
            ALIGNED=quantized_aligned(quantized) and aligned((), weights, lows),
            ROWS=ROWS,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )


def _kind(entry: QuantizedStep) -> tuple[str, int]:
    return str(entry.quantized.grad.dtype), _NO_STEP if entry.param is None else storage_of(entry.param, entry.low)


@functools.lru_cache
def _nearest(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the tables of ``nearest_code`` for first and second moments, concatenated."""
    first, second = (nearest_code(signed, device) for signed in (True, False))
    return torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]])
