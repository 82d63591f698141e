"""Phase 2: the AdamW step of the tensors whose expert won. Blocks of losers return at once and read nothing.

    p = (1 - lr wd) p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

A bf16 parameter has a 16-bit low part (``p = join(high, low)``, ``molf.numerics.bf16``) or is rounded stochastically.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from molf.kernels.addresses import aligned, pointer, size_in
from molf.kernels.moments import Scalars
from molf.kernels.tables import Rate, Tables, launch

__all__ = [
    "FLOAT",
    "SPLIT",
    "STOCHASTIC",
    "Step",
    "adam_change",
    "storage_of",
    "per_tensor_scalars",
    "load_weight",
    "move_winners_",
    "store_weight",
    "weight_addresses",
]

_CHUNK, _BLOCK = 4096, 1024

FLOAT, SPLIT, STOCHASTIC = 0, 1, 2
"""How a weight is stored: float32; bf16 with a low part; bf16, rounded stochastically."""


class Step(NamedTuple):
    """One tensor in phase 2.

    Attributes:
        param: Float32 or bf16.
        low: The low part of a bf16 parameter, or None.
        exp_avg: First moment, float32.
        exp_avg_sq: Second moment, float32.
        expert: Number of its expert, ``l * E + e``; its entry of ``chosen`` says whether it moves.
        layer: Number of its layer, for the step count.
        stream: Selects its random numbers, in [0, 2^62).
        lr: Learning rate.
        weight_decay: Decoupled decay.
        change: Receives the change of the parameter, float32, or None. Not written if the expert lost.
    """

    param: Tensor
    low: Tensor | None
    exp_avg: Tensor
    exp_avg_sq: Tensor
    expert: int
    layer: int
    stream: int
    lr: float | Rate
    weight_decay: float
    change: Tensor | None = None


def storage_of(param: Tensor, low: Tensor | None) -> int:
    """Return how a weight is stored."""
    if param.dtype == torch.float32:
        return FLOAT
    return STOCHASTIC if low is None else SPLIT


@triton.jit
def adam_change(m, v, corrections, eps):
    """Return ``(m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)`` from the address of the two corrections."""
    correction1, correction2 = tl.load(corrections), tl.load(corrections + 1)
    return correction2 / correction1 * m / (tl.sqrt(v) + eps * correction2)


@triton.jit
def load_weight(param, low, at, inside, STORAGE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return elements ``at`` of a parameter in float32, given the address entries of it and its low part."""
    if STORAGE == 0:
        return tl.load(pointer(param, tl.float32, ALIGNED) + at, mask=inside, other=0.0)
    bits = tl.load(pointer(param, tl.int16, ALIGNED) + at, mask=inside, other=0).to(tl.int32)
    if STORAGE == 1:
        rest = tl.load(pointer(low, tl.int16, ALIGNED) + at, mask=inside, other=0).to(tl.int32)
        # A weight that the user set to zero keeps its old remainder; a negative one is ignored.
        rest = tl.where(((bits & 0x7FFF) == 0) & (rest < 0), 0, rest)
        return ((bits << 16) + rest).to(tl.float32, bitcast=True)
    return (bits << 16).to(tl.float32, bitcast=True)


@triton.jit
def store_weight(param, low, at, inside, value, seed, stream, STORAGE: tl.constexpr, ALIGNED: tl.constexpr):
    """Store float32 values for ``load_weight``; ``seed`` and ``stream`` are addresses."""
    if STORAGE == 0:
        tl.store(pointer(param, tl.float32, ALIGNED) + at, value, mask=inside)
    else:
        bits = value.to(tl.int32, bitcast=True)
        if STORAGE == 1:
            high = (bits + 0x8000) >> 16
            tl.store(pointer(low, tl.int16, ALIGNED) + at, (bits - (high << 16)).to(tl.int16), mask=inside)
        else:
            noise = tl.randint(tl.load(seed) + tl.load(stream), at)
            high = (bits + (noise & 0xFFFF).to(tl.int32)) >> 16
        tl.store(pointer(param, tl.int16, ALIGNED) + at, high.to(tl.int16), mask=inside)


@triton.jit
def _winners(
    weights,
    lows,
    exp_avgs,
    exp_avg_sqs,
    changes,
    sizes,
    experts,
    layers,
    streams,
    rates,
    decays,
    corrections,
    chosen,
    blocks,
    go,
    eps,
    seed,
    STORAGE: tl.constexpr,
    KEEP: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    entry = tl.load(blocks + 2 * block)
    if (tl.load(go) == 0) | (tl.load(chosen + tl.load(experts + entry)) == 0):
        return
    start = tl.multiple_of(tl.load(blocks + 2 * block + 1), CHUNK)
    size = size_in(sizes + entry, ALIGNED)
    lr, decay, pair = tl.load(rates + entry), tl.load(decays + entry), corrections + 2 * tl.load(layers + entry)
    exp_avg, exp_avg_sq = (
        pointer(exp_avgs + entry, tl.float32, ALIGNED),
        pointer(exp_avg_sqs + entry, tl.float32, ALIGNED),
    )
    for first in range(0, CHUNK, BLOCK):
        at = start + first + tl.arange(0, BLOCK)
        inside = at < size
        p = load_weight(weights + entry, lows + entry, at, inside, STORAGE, ALIGNED)
        m = tl.load(exp_avg + at, mask=inside, other=0.0)
        v = tl.load(exp_avg_sq + at, mask=inside, other=0.0)
        moved = p * (1 - lr * decay) - lr * adam_change(m, v, pair, eps)
        store_weight(weights + entry, lows + entry, at, inside, moved, seed, streams + entry, STORAGE, ALIGNED)
        if KEEP:
            tl.store(pointer(changes + entry, tl.float32, ALIGNED) + at, moved - p, mask=inside)


def move_winners_(
    name: str,
    steps: Sequence[Step],
    chosen: Tensor,
    corrections: Tensor,
    eps: float,
    scalars: Scalars,
    tables: Tables,
    seed: Tensor | None = None,
) -> None:
    """Move the tensors whose expert won.

    Args:
        name: Names the tables; two calls in one step need different names.
        steps: The tensors; all record their change or none does.
        chosen: Whether each expert won, int8 ``[L * E]`` on the device.
        corrections: ``1 - b1^t`` and ``sqrt(1 - b2^t)`` of each layer, float32 ``[L, 2]`` on the device.
        eps: Added to the denominator.
        scalars: Whether to take the step.
        tables: Of this device.
        seed: For this step's stochastic rounding, int64 on the device, in [0, 2^62); needed for a bf16 parameter without a
            low part.
    """
    for how, group in groupby(sorted(steps, key=_how), key=_how):
        own, kept = list(group), f"{name}.{how}"
        sizes = tuple(step.param.numel() for step in own)
        weights, lows = [step.param for step in own], [step.low for step in own if step.low is not None]
        moments = [step.exp_avg for step in own], [step.exp_avg_sq for step in own]
        changes = [step.change for step in own if step.change is not None]
        blocks = tables.blocks(f"{kept}.blocks", sizes, _CHUNK)
        launch(
            _winners,
            len(blocks),
            *weight_addresses(kept, weights, lows, tables),
            *(tables.pointers(f"{kept}.moments.{i}", own) for i, own in enumerate(moments)),
            tables.pointers(f"{kept}.changes", changes) if changes else blocks,
            tables.numbers(f"{kept}.sizes", sizes, torch.int64),
            tables.numbers(f"{kept}.experts", tuple(step.expert for step in own), torch.int32),
            *per_tensor_scalars(kept, own, tables),
            corrections,
            chosen,
            blocks,
            scalars.go,
            eps,
            scalars.go if seed is None else seed,
            STORAGE=how,
            KEEP=bool(changes),
            ALIGNED=aligned(sizes, weights, lows, *moments, changes),
            CHUNK=_CHUNK,
            BLOCK=_BLOCK,
        )


def _how(step: Step) -> int:
    return storage_of(step.param, step.low)


def weight_addresses(
    name: str, weights: Sequence[Tensor], lows: Sequence[Tensor], tables: Tables
) -> tuple[Tensor, Tensor]:
    """Return the addresses of parameters and of their low parts; dummies if there are none."""
    params = tables.pointers(f"{name}.weights", weights)
    return params, tables.pointers(f"{name}.lows", lows) if lows else params


class _Scheduled(Protocol):
    @property
    def layer(self) -> int: ...
    @property
    def stream(self) -> int: ...
    @property
    def lr(self) -> float | Rate: ...
    @property
    def weight_decay(self) -> float: ...


def per_tensor_scalars(name: str, own: Sequence[_Scheduled], tables: Tables) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return layer numbers, noise streams, learning rates and decays of a launch's tensors."""
    return (
        tables.numbers(f"{name}.layers", tuple(one.layer for one in own), torch.int32),
        tables.numbers(f"{name}.streams", tuple(one.stream for one in own), torch.int64),
        tables.rates(f"{name}.rates", [one.lr for one in own]),
        tables.numbers(f"{name}.decays", tuple(one.weight_decay for one in own), torch.float32),
    )
