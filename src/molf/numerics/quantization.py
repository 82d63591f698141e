"""8-bit Adam moments: block-wise with a dynamic map (Dettmers et al. 2022, https://arxiv.org/abs/2110.02861).

Each row of a matrix is cut into blocks of 256 elements. Blocks never span rows, so rows can be sharded; the last block of a row
may be shorter. A block stores its largest magnitude (``absmax``, float32) and one code per element. A code stands for one of 256
values in [-1, 1] (first moments) or [0, 1] (second moments).

    codes uint8 [rows, n]        absmax float32 [rows, ceil(n / 256)]        value = absmax * code_values[code]
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = [
    "BLOCK",
    "OPTIM_BITS",
    "block_count",
    "code_values",
    "dequantize",
    "is_quantizable",
    "nearest_code",
    "quantize_",
]

BLOCK = 256
OPTIM_BITS = (32, 8)
# Smaller matrices stay in float32: they save little memory, and gates and routers are sensitive.
_MIN_NUMEL = 4096


def is_quantizable(p: Tensor) -> bool:
    """Return whether the moments of a parameter may be kept in 8 bits: a matrix of 4096 elements or more."""
    return p.ndim >= 2 and p.numel() >= _MIN_NUMEL


def block_count(n: int) -> int:
    """Return the number of blocks in a row of n elements."""
    return -(-n // BLOCK)


@functools.lru_cache
def code_values(signed: bool, device: torch.device) -> Tensor:
    """Return the 256 values of the codes in ascending order, with about equal relative precision over seven decades.

    The decade from ``10^-(k+1)`` to ``10^-k``, k = 0 ... 6, is cut into ``2^(6-k)`` equal cells (twice as many without a
    sign); their midpoints are values. So are 0 and 1. Signed codes have the negatives of the midpoints, too.
    """
    positive = []
    for k in range(7):
        cells = 2 ** (6 - k) * (1 if signed else 2)
        middles = 0.1 + 0.9 * (torch.arange(cells, dtype=torch.float64, device="cpu") + 0.5) / cells
        positive.append(middles * 10.0**-k)
    half = torch.cat(positive)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64, device="cpu")
    values = torch.cat([-half, half, ends] if signed else [half, ends])
    return values.sort().values.to(device, torch.float32)


@functools.lru_cache
def nearest_code(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return two tables that give the nearest code of a value without a search.

    The high 16 bits of a float32 in [-1, 1] narrow the choice to two neighbouring codes. The first table, uint8 ``[65536]``
    and indexed by ``(bits >> 16) + 32768``, holds the lower code. The second, float32 ``[256]``, holds the threshold above
    which the next code is nearer.
    """
    values = code_values(signed, torch.device("cpu"))
    middles = torch.cat([(values[:-1] + values[1:]) / 2, values.new_tensor([torch.inf])])
    highs = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32, device="cpu") << 16
    # The smallest number with these high bits.
    least = torch.where(highs < 0, highs | 0xFFFF, highs).view(torch.float32)
    lower = torch.bucketize(least.nan_to_num(), middles[:-1])
    return lower.to(device, torch.uint8), middles.to(device)


def quantize_(x: Tensor, codes: Tensor, absmax: Tensor, signed: bool) -> None:
    """Quantize a matrix into codes and block maxima.

    A positive second moment never becomes 0, because Adam divides by its root; it becomes the smallest code instead.

    Args:
        x: Finite float32 ``[rows, n]``, contiguous; overwritten.
        codes: Uint8 ``[rows, n]``.
        absmax: Float32 ``[rows, ceil(n / 256)]``.
        signed: Whether these are first moments.
    """
    for part, most in _blocks(x, absmax):
        most.copy_(torch.maximum(part.amax(-1), part.amin(-1).neg_()) if signed else part.amax(-1))
        part.div_(most.where(most > 0, 1.0)[..., None])
    lower, middles = nearest_code(signed, x.device)
    high = x.view(torch.int32).bitwise_right_shift(16).add_(1 << 15).view(-1)
    found = lower.index_select(0, high)
    above = x.view(-1) > middles.index_select(0, found.int())
    found += above
    if not signed:
        torch.maximum(found, x.view(-1) > 0, out=found)
    codes.copy_(found.view_as(codes))


def dequantize(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """Return the float32 matrix ``[rows, n]`` of codes and block maxima.

    Args:
        codes: Uint8 ``[rows, n]``.
        absmax: Float32 ``[rows, ceil(n / 256)]``.
        signed: Whether these are first moments.
    """
    x = code_values(signed, codes.device).index_select(0, codes.reshape(-1).int()).view(codes.shape)
    for part, most in _blocks(x, absmax):
        part.mul_(most[..., None])
    return x


def _blocks(x: Tensor, absmax: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return views ``[rows, blocks, b]`` of a matrix with their maxima: the full blocks, then each row's shorter last one."""
    whole = x.shape[1] // BLOCK
    parts = [(x[:, : whole * BLOCK].view(len(x), whole, BLOCK), absmax[:, :whole])] if whole else []
    if x.shape[1] % BLOCK:
        parts.append((x[:, whole * BLOCK :].unsqueeze(1), absmax[:, whole:]))
    return parts
