"""Adam's moments in 8 bits: block-wise, with a dynamic map (Dettmers et al. 2022, https://arxiv.org/abs/2110.02861).

A matrix is cut into blocks of 256 elements along its rows; no block goes over the end of a row, so the last one of a row may be
shorter, and rows can be sharded. A block is its largest magnitude, ``absmax`` in float32, and one code per element, which
stands for one of 256 numbers between -1 and 1 (first moments) or 0 and 1 (second moments).

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
    "dequantise",
    "is_large_matrix",
    "nearest_code",
    "quantise_",
]

BLOCK = 256
OPTIM_BITS = (32, 8)
# Below this a matrix stays in float32: nothing to gain, and small ones (a score, a gate) are the touchy ones.
_FEWEST = 4096


def is_large_matrix(p: Tensor) -> bool:
    """Say whether a parameter is one whose moments are worth keeping in 8 bits: a matrix of 4096 elements or more."""
    return p.ndim >= 2 and p.numel() >= _FEWEST


def block_count(n: int) -> int:
    """Return the number of blocks in a row of n elements."""
    return -(-n // BLOCK)


@functools.lru_cache
def code_values(signed: bool, device: torch.device) -> Tensor:
    """Return the 256 numbers that the codes stand for, ascending: relative precision over seven powers of ten.

    The interval from ``10^-(k+1)`` to ``10^-k``, k = 0 ... 6, is cut into ``2^(6-k)`` equal cells, twice as many without a
    sign, and their middles are the values. With them come 0 and 1, and where there is a sign all but these negative too.
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
    """Return two tables by which the nearest of the code values is found without a search.

    The high 16 bits of a float32 in [-1, 1] leave two codes to choose from. The first table, uint8 ``[65536]``, holds the lower
    of the two, by ``(bits >> 16) + 32768`` with the bits as int32; the second, float32 ``[256]``, where the next code begins.
    """
    values = code_values(signed, torch.device("cpu"))
    middles = torch.cat([(values[:-1] + values[1:]) / 2, values.new_tensor([torch.inf])])
    highs = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32, device="cpu") << 16
    least = torch.where(highs < 0, highs | 0xFFFF, highs).view(
        torch.float32
    )  # the smallest number with these high bits
    lower = torch.bucketize(least.nan_to_num(), middles[:-1])
    return lower.to(device, torch.uint8), middles.to(device)


def quantise_(x: Tensor, codes: Tensor, absmax: Tensor, signed: bool) -> None:
    """Write a matrix into codes and block maxima.

    A second moment (without a sign) above 0 never becomes 0, but the smallest value there is: Adam divides by its root.

    Args:
        x: Finite float32 ``[rows, n]``, contiguous; its memory is used up.
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


def dequantise(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """Return the float32 matrix ``[rows, n]`` that codes and block maxima stand for.

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
    """Return views ``[rows, k, b]`` of a matrix as blocks beside their maxima: full ones, and each row's shorter last one."""
    whole = x.shape[1] // BLOCK
    parts = [(x[:, : whole * BLOCK].view(len(x), whole, BLOCK), absmax[:, :whole])] if whole else []
    if x.shape[1] % BLOCK:
        parts.append((x[:, whole * BLOCK :].unsqueeze(1), absmax[:, whole:]))
    return parts
