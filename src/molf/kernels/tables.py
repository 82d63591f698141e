"""Tables on the device that a launch over many tensors reads, and how kernels read them.

Row i of every table is about tensor i of the plan. Kernels work on addresses, so one launch takes tensors of any shape.

    rows   [S, ROW]    int64, addresses and sizes; all but the addresses of gradients stay
    moves  [S, MOVE]   float32, of one step: whether the expert won, and by how much its tensors move
    blocks [N, 3]      int64, of one launch: tensor, first element (or quantization block), place of its partial sum
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from molf.numerics import quantization

__all__ = [
    "ALIGNMENT", "BLOCK", "CHUNK", "CODES", "TILE", "Launch", "blocks_of", "launch", "pointer", "size_in",
    "to_device",
]  # fmt: skip

ALIGNMENT = 16
"""Bytes of a vector load."""

CHUNK, BLOCK = tl.constexpr(4096), tl.constexpr(1024)
"""Elements that a program works on, and at once, of tensors with float32 moments."""

TILE, CODES = tl.constexpr(8), tl.constexpr(quantization.BLOCK)
"""Quantization blocks that a program works on at once, and the elements of each."""

# Columns of ``rows``: addresses of the parameter, its moments, low part and block maxima; elements; elements of a row; noise
# stream; whether it counts in its expert's sum here; whether its gradient counts in the norm of phase 1; and of the merged form
# (offsets in elements): the product or first operand, the second operand, elements between rows of operands, whether it is a B.
# Last, the address of the gradient.
PARAM, EXP_AVG, EXP_AVG_SQ, LOW, ABSMAX, ABSMAX_SQ, SIZE, COLUMNS, STREAM, COUNTED, NORMED = map(
    tl.constexpr, range(11)
)
OFFSET, SECOND, STRIDE, IS_B, GRAD = map(tl.constexpr, range(11, 16))
ROW = tl.constexpr(16)

# Columns of ``moves``: 1 if the expert won, else 0; the learning rate; its product with the weight decay; the corrections
# ``1 - b1^t`` and ``1 - b2^t``; and of a pair its scale, and the first and third of these for the layer's effective weight.
WON, LR, DECAY, CORRECTION1, CORRECTION2, SCALE, FFT, FFT_DECAY = map(tl.constexpr, range(8))
MOVE = tl.constexpr(8)

# Elements of ``scalars``, float32: 0 to skip the step (a gradient is not finite), else 1; the factor of all gradients; what new
# gradients weigh in the first moments; the second beta; what new gradients weigh in the second; and epsilon.
GO, CLIP, NEW1, BETA2, NEW2, EPS = map(tl.constexpr, range(6))

# Fuse multiply and add in all kernels, whatever the default of the Triton release.
_OPTIONS = {"enable_fp_fusion": True}


class Launch(NamedTuple):
    """A kernel, the tables of this launch alone (the last has its blocks), and the constants that it is compiled for."""

    kernel: Any
    tables: Sequence[Tensor]
    constants: dict[str, Any]


def launch(what: Launch, *args: Any, **constants: Any) -> None:
    """Launch a kernel, one program a block; a rank without rows has none."""
    if programs := what.tables[-1].shape[0]:
        what.kernel[(programs,)](*args, *what.tables, **what.constants, **constants, **_OPTIONS)


def to_device(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make a table of host values; from pinned memory that needs no sync, and PyTorch keeps the memory until it is done."""
    table = torch.as_tensor(values, dtype=dtype, device="cpu")
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)


def blocks_of(tensors: Sequence[tuple[int, int, int]], step: int) -> Tensor:
    """Cut tensors into blocks, ``[blocks, 3]``.

    Args:
        tensors: The row of each in the tables, its number of blocks, and the place of its first partial sum.
        step: Elements (or quantization blocks) of a block.
    """
    row, count, slot = torch.tensor(tensors, dtype=torch.int64, device="cpu").view(-1, 3).unbind(1)
    within = torch.cat([torch.arange(n, dtype=torch.int64, device="cpu") for n in count.tolist()])
    return torch.stack([row.repeat_interleave(count), within * step, slot.repeat_interleave(count) + within], dim=1)


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
