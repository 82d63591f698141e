"""Phase 2 of moments in 8 bits: moved again and written back, of winners and losers; winners' parameters take the AdamW step.

Effective weights are moved when the winners are folded in (``molf.kernels.fold``). That comes first: it opens the same codes.
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
from molf.kernels.packed import (
    ROWS,
    WARPS,
    Packed,
    all_aligned,
    load_moved,
    places,
    pointers,
    shape_of,
    shapes_of,
    values,
)
from molf.kernels.tables import Rate, Tables, launch
from molf.kernels.winners import adam_change, held, layer_settings, load_weight, store_weight, weight_addresses
from molf.numerics.quantization import BLOCK, nearest_code

__all__ = ["PackedStep", "settle_packed_"]

_NO_STEP = -1  # beside the ways a weight is held (``molf.kernels.winners``): it is not moved here


class PackedStep(NamedTuple):
    """One matrix with 8-bit moments.

    Attributes:
        packed: Gradient and moments.
        param: Float32 or bf16; None if it is moved elsewhere, as effective weights are.
        low: The low part of a bf16 parameter, or None.
        layer: Number of its layer, for the step count.
        stream: What tells its random numbers from those of others, in [0, 2^62).
        lr: Learning rate.
        weight_decay: Decoupled decay.
    """

    packed: Packed
    param: Tensor | None
    low: Tensor | None
    layer: int
    stream: int
    lr: float | Rate
    weight_decay: float


@triton.jit
def _pack(codes, maxima, block, here, at, inside, x, lower, starts, SIGNED: tl.constexpr, ALIGNED: tl.constexpr):
    """Write moments as codes and block maxima, given by their entries in tables."""
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
def _settle(
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
    HELD: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if tl.load(go) == 0:
        return
    slot, block, here, at, inside = places(blocks, shapes, ALIGNED, ROWS, BLOCK)
    m, v = load_moved(grads, codes, maxima, slot, block, here, at, inside, values, clip, beta1, beta2, GRAD, ALIGNED)
    if HELD >= 0:  # noqa: SIM102 - decided when it is compiled
        if tl.load(chosen + tl.load(experts + slot)) != 0:
            lr, decay = tl.load(rates + slot), tl.load(decays + slot)
            p = load_weight(weights + slot, lows + slot, at, inside, HELD, ALIGNED)
            p = p * (1 - lr * decay) - lr * adam_change(m, v, corrections + 2 * tl.load(layers + slot), eps)
            store_weight(weights + slot, lows + slot, at, inside, p, seed, streams + slot, HELD, ALIGNED)
    codes, maxima = codes + 2 * slot, maxima + 2 * slot
    _pack(codes, maxima, block, here, at, inside, m, lower, starts, True, ALIGNED)
    _pack(codes + 1, maxima + 1, block, here, at, inside, v, lower + 65536, starts + 256, False, ALIGNED)


def settle_packed_(
    slots: Sequence[PackedStep],
    chosen: Tensor,
    corrections: Tensor,
    betas: tuple[float, float],
    eps: float,
    scalars: Scalars,
    tables: Tables,
    seed: Tensor | None = None,
) -> None:
    """Move the 8-bit moments of all slots, and the parameters of those whose expert won.

    Args:
        slots: The matrices.
        chosen: Whether each expert won, int8 ``[L * E]`` on the device.
        corrections: ``1 - b1^t`` and ``sqrt(1 - b2^t)`` of each layer, float32 ``[L, 2]`` on the device.
        betas: Decay rates of the moments.
        eps: Added to the denominator.
        scalars: Whether to go on, and the factor of the gradients.
        tables: Of this device.
        seed: Of this step's stochastic rounding, as in ``winners.move_winners_``.
    """
    for (dtype, how), group in groupby(sorted(slots, key=_kind), key=_kind):
        own, name = list(group), f"settle.{dtype}.{how}"
        packed = [slot.packed for slot in own]
        weights = [slot.param for slot in own if slot.param is not None]
        lows = [slot.low for slot in own if slot.low is not None]
        blocks = tables.blocks(f"{name}.blocks", tuple(shape_of(one)[2] for one in packed), ROWS)
        launch(
            _settle,
            len(blocks),
            *(weight_addresses(name, weights, lows, tables) if weights else (blocks, blocks)),
            *pointers(name, packed, tables),
            shapes_of(name, packed, tables),
            tables.numbers(f"{name}.experts", tuple(slot.packed.expert for slot in own), torch.int32),
            *layer_settings(name, own, tables),
            corrections,
            chosen,
            blocks,
            values(tables.device),
            *_nearest(tables.device),
            *scalars,
            *betas,
            eps,
            scalars.go if seed is None else seed,
            GRAD=GRADIENTS[packed[0].grad.dtype],
            HELD=how,
            ALIGNED=all_aligned(packed) and aligned((), weights, lows),
            ROWS=ROWS,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )


def _kind(slot: PackedStep) -> tuple[str, int]:
    return str(slot.packed.grad.dtype), _NO_STEP if slot.param is None else held(slot.param, slot.low)


@functools.lru_cache
def _nearest(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the tables of ``nearest_code``, for first and for second moments, one after the other."""
    first, second = (nearest_code(signed, device) for signed in (True, False))
    return torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]])
