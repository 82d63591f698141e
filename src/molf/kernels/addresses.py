"""From a tensor's address in a table to a pointer in a kernel, with alignment hints for vector loads."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["ALIGNMENT", "aligned", "size_in", "pointer"]

ALIGNMENT = 16
"""Bytes of a vector load."""


def aligned(sizes: Sequence[int], *tensors: Sequence[Tensor]) -> bool:
    """Return whether all tensors are aligned to 16 bytes and all sizes are multiples of 16.

    Args:
        sizes: Elements of flat tensors, of rows, or ranks: whatever bounds the elements.
        *tensors: All tensors that a launch reads or writes element by element.
    """
    return all(n % ALIGNMENT == 0 for n in sizes) and all(x.data_ptr() % ALIGNMENT == 0 for own in tensors for x in own)


@triton.jit
def pointer(table, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the pointer to a tensor, given the table entry of its address."""
    to = tl.load(table).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        to = tl.multiple_of(to, 16)
    return to


@triton.jit
def size_in(table, ALIGNED: tl.constexpr):
    """Return a size, given its table entry; a multiple of 16 if ``ALIGNED``."""
    size = tl.load(table)
    if ALIGNED:
        size = tl.multiple_of(size, 16)
    return size
