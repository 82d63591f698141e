"""Tables on the device that a launch over many tensors reads, and how kernels read them.

Row i of every table is about tensor i of the plan. Kernels work on addresses, so one launch takes tensors of any shape.

    addresses [S, ADDRESSES]   int64, of the parameter, its moments, low part and block maxima; ``grads [S]`` apart, which change
    sizes     [S, SIZES]       int64
    factors   [S, FACTORS]     float32; ``rates [S]`` apart, which change
    blocks    [N, 3]           int64, of one launch: tensor, first element (or quantization block), place of its partial sum
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "ADDRESSES",
    "ALIGNMENT",
    "FACTORS",
    "GRADIENTS",
    "SIZES",
    "Launch",
    "blocks_of",
    "launch",
    "pointer",
    "to_device",
]

ALIGNMENT = 16
"""Bytes of a vector load."""

GRADIENTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}
"""The dtypes that gradients may have."""

# Columns of ``addresses``.
PARAM, EXP_AVG, EXP_AVG_SQ, LOW, ABSMAX, ABSMAX_SQ = map(tl.constexpr, range(6))
ADDRESSES = tl.constexpr(6)

# Columns of ``sizes``: elements; elements of a row; number of the expert and of the step count; noise stream; whether it counts
# in its expert's sum here; whether its gradient counts in the norm of phase 1; blocks of a row and in all, of 8-bit moments;
# and of the merged form (offsets in elements): the product or first operand, the second operand, elements between rows of
# operands, whether it is a B, and the row of the effective weight.
SIZE, COLUMNS, EXPERT, LAYER, STREAM, COUNTED, NORMED, IN_ROW, BLOCKS = map(tl.constexpr, range(9))
OFFSET, SECOND, STRIDE, IS_B, WEIGHT = map(tl.constexpr, range(9, 14))
SIZES = tl.constexpr(14)

# Columns of ``factors``: weight decay, and the scale of a pair.
DECAY, SCALE = map(tl.constexpr, range(2))
FACTORS = tl.constexpr(2)

# Elements of ``scalars``, float32: 0 to skip the step (a gradient is not finite), else 1; the factor of all gradients; what new
# gradients weigh in the first moments; the second beta; what new gradients weigh in the second; and epsilon.
GO, CLIP, NEW1, BETA2, NEW2, EPS = map(tl.constexpr, range(6))

# Fuse multiply and add in all kernels, whatever the default of the Triton release.
_OPTIONS = {"enable_fp_fusion": True}


class Launch(NamedTuple):
    """The blocks of one launch, the constants that its kernel is compiled for, and whether it reads 8-bit moments."""

    blocks: Tensor
    constants: dict[str, Any]
    quantized: bool = False


def launch(kernel: Any, what: Launch, *args: Any, **constants: Any) -> None:
    """Launch a kernel, one program a block; a rank without rows has none."""
    if programs := what.blocks.shape[0]:
        kernel[(programs,)](*args, what.blocks, **what.constants, **constants, **_OPTIONS)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy a host table; from pinned memory that needs no sync, and PyTorch keeps the memory until it is done."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def blocks_of(tensors: Sequence[int], counts: Sequence[int], slots: Sequence[int], step: int) -> Tensor:
    """Cut tensors into blocks.

    Args:
        tensors: Their rows in the tables.
        counts: The number of blocks of each.
        slots: The place of each tensor's first partial sum.
        step: Elements (or quantization blocks) of a block.
    """
    number = torch.tensor(counts, dtype=torch.int64, device="cpu")
    before = number.cumsum(0) - number
    rows = torch.tensor([tensors, slots], dtype=torch.int64, device="cpu").repeat_interleave(number, dim=1)
    within = torch.arange(rows.shape[1], dtype=torch.int64, device="cpu") - before.repeat_interleave(number)
    return torch.stack([rows[0], within * step, rows[1] + within], dim=1)


@triton.jit
def pointer(table, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the pointer to a tensor, given the table entry of its address."""
    to = tl.load(table).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        to = tl.multiple_of(to, 16)
    return to


@triton.jit
def size_in(table, HINT: tl.constexpr):
    """Return a size, given its table entry: a multiple of ``HINT``, the elements of a vector load; 1 for no hint."""
    size = tl.load(table)
    if HINT > 1:
        size = tl.multiple_of(size, HINT)
    return size
