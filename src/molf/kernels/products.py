"""The gradients of all LoRA pairs of the merged form, from the dense gradients ``G [out, in]``, in two launches.

    dB_i = s_i G A_i^T  [out, r]        dA_i = s_i B_i^T G  [r, in]

``G`` is read in its dtype, float32 or bf16, without a copy. Tensor cores multiply and accumulate in float32. Factors are rounded
to the nearest TF32 (11 significant bits) first: the cores would truncate them, which makes all gradients of pairs too small.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from molf.kernels.addresses import aligned, pointer, size_in
from molf.kernels.tables import Tables, launch

__all__ = ["Product", "cuts_factors", "nearest_tf32", "pair_gradients"]

_TILE, _RANKS, _DEPTH = 64, 64, 32


class Product(NamedTuple):
    """A pair with the dense gradient of its layer.

    ``b_is_nonzero`` is a 0-dim float32 tensor on the device: how often the pair was updated. At 0, B and dA are zero.
    """

    G: Tensor
    A: Tensor
    B: Tensor
    scale: float
    b_is_nonzero: Tensor
    dA: Tensor
    dB: Tensor


@triton.jit
def nearest_tf32(x):
    """Round float32 to the nearest TF32 number; overflow becomes infinite or NaN."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def _grad_B(
    Gs,
    As,
    dBs,
    shapes,
    scales,
    tiles,
    GRAD: tl.constexpr,
    ROUND: tl.constexpr,
    ALIGNED: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    tile = tl.program_id(0)
    i = tl.load(tiles + 3 * tile)
    rows = tl.load(tiles + 3 * tile + 1) + tl.arange(0, BM)
    ranks = tl.multiple_of(tl.load(tiles + 3 * tile + 2), BR) + tl.arange(0, BR)
    n_out, n_in = tl.load(shapes + 3 * i), size_in(shapes + 3 * i + 1, ALIGNED)
    r = size_in(shapes + 3 * i + 2, ALIGNED)
    G = pointer(Gs + i, GRAD, ALIGNED)
    A, dB = pointer(As + i, tl.float32, ALIGNED), pointer(dBs + i, tl.float32, ALIGNED)
    total = tl.zeros((BM, BR), dtype=tl.float32)
    for k in range(0, n_in, BK):
        columns = k + tl.arange(0, BK)
        at = rows.to(tl.int64)[:, None] * n_in + columns[None, :]
        g = tl.load(G + at, mask=(rows < n_out)[:, None] & (columns < n_in)[None, :], other=0.0).to(tl.float32)
        at = ranks.to(tl.int64)[None, :] * n_in + columns[:, None]
        a = tl.load(A + at, mask=(ranks < r)[None, :] & (columns < n_in)[:, None], other=0.0)
        if ROUND:
            g, a = nearest_tf32(g), nearest_tf32(a)
        total = tl.dot(g, a, total, input_precision="tf32")
    at = rows.to(tl.int64)[:, None] * r + ranks[None, :]
    tl.store(dB + at, total * tl.load(scales + i), mask=(rows < n_out)[:, None] & (ranks < r)[None, :])


@triton.jit
def _grad_A(
    Gs,
    Bs,
    dAs,
    b_is_nonzeros,
    shapes,
    scales,
    tiles,
    GRAD: tl.constexpr,
    ROUND: tl.constexpr,
    ALIGNED: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    tile = tl.program_id(0)
    i = tl.load(tiles + 3 * tile)
    ranks = tl.load(tiles + 3 * tile + 1) + tl.arange(0, BR)
    columns = tl.multiple_of(tl.load(tiles + 3 * tile + 2), BN) + tl.arange(0, BN)
    n_out, n_in = tl.load(shapes + 3 * i), size_in(shapes + 3 * i + 1, ALIGNED)
    r = size_in(shapes + 3 * i + 2, ALIGNED)
    G = pointer(Gs + i, GRAD, ALIGNED)
    B, dA = pointer(Bs + i, tl.float32, ALIGNED), pointer(dAs + i, tl.float32, ALIGNED)
    total = tl.zeros((BR, BN), dtype=tl.float32)
    if tl.load(pointer(b_is_nonzeros + i, tl.float32, False)) != 0:
        for k in range(0, n_out, BK):
            rows = k + tl.arange(0, BK)
            at = rows.to(tl.int64)[None, :] * r + ranks[:, None]
            b = tl.load(B + at, mask=(rows < n_out)[None, :] & (ranks < r)[:, None], other=0.0)
            at = rows.to(tl.int64)[:, None] * n_in + columns[None, :]
            g = tl.load(G + at, mask=(rows < n_out)[:, None] & (columns < n_in)[None, :], other=0.0).to(tl.float32)
            if ROUND:
                g, b = nearest_tf32(g), nearest_tf32(b)
            total = tl.dot(b, g, total, input_precision="tf32")
    at = ranks.to(tl.int64)[:, None] * n_in + columns[None, :]
    tl.store(dA + at, total * tl.load(scales + i), mask=(ranks < r)[:, None] & (columns < n_in)[None, :])


def cuts_factors(device: torch.device) -> bool:
    """Return whether products run on tensor cores there; the interpreter multiplies in float32."""
    return device.type != "cpu"


def pair_gradients(products: Sequence[Product], tables: Tables) -> None:
    """Fill ``dA`` and ``dB`` of all pairs.

    Args:
        products: The pairs; the gradients of their layers are all float32 or all bf16.
        tables: Of this device.
    """
    if not products:
        return
    dtypes = {product.G.dtype for product in products}
    assert len(dtypes) == 1, "the dense gradients of one launch are of one dtype"
    grad = tl.bfloat16 if dtypes == {torch.bfloat16} else tl.float32
    shapes = tuple((p.G.shape[0], p.G.shape[1], p.A.shape[0]) for p in products)
    sizes = tables.numbers("products.shapes", tuple(n for shape in shapes for n in shape), torch.int32)
    scales = tables.numbers("products.scales", tuple(p.scale for p in products), torch.float32)
    together = aligned([n for _, *row in shapes for n in row], *([p.G, p.A, p.B, p.dA, p.dB] for p in products))
    Gs = tables.pointers("products.G", [p.G for p in products])
    tiles = tables.tiles("products.dB.tiles", tuple((n_out, r) for n_out, _, r in shapes), (_TILE, _RANKS))
    launch(
        _grad_B,
        len(tiles),
        Gs,
        tables.pointers("products.A", [p.A for p in products]),
        tables.pointers("products.dB", [p.dB for p in products]),
        sizes,
        scales,
        tiles,
        GRAD=grad,
        ROUND=cuts_factors(tables.device),
        ALIGNED=together,
        BM=_TILE,
        BR=_RANKS,
        BK=_DEPTH,
    )
    tiles = tables.tiles("products.dA.tiles", tuple((r, n_in) for _, n_in, r in shapes), (_RANKS, _TILE))
    launch(
        _grad_A,
        len(tiles),
        Gs,
        tables.pointers("products.B", [p.B for p in products]),
        tables.pointers("products.dA", [p.dA for p in products]),
        tables.pointers("products.started", [p.b_is_nonzero for p in products]),
        sizes,
        scales,
        tiles,
        GRAD=grad,
        ROUND=cuts_factors(tables.device),
        ALIGNED=together,
        BN=_TILE,
        BR=_RANKS,
        BK=_DEPTH,
    )
