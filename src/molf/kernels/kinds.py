"""What there is to a step that other kernels are launched for, or the same ones compiled otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from molf.numerics.distributed import local

__all__ = ["Held", "Kind", "LayerKind", "kind_of"]

_MULTIPLE = 16  # of elements: with sizes of such a multiple, kernels read several words at once


class Held(NamedTuple):
    """A parameter's number of dimensions and dtype."""

    ndim: int
    dtype: torch.dtype


class LayerKind(NamedTuple):
    """A routed layer: the tags of its group, and how the parameters of its experts are held."""

    form: str
    experts: tuple[str, ...]
    ranks: tuple[int, ...]
    params: tuple[Held, ...]


class Kind(NamedTuple):
    """A kind of step.

    Attributes:
        device: Where it is taken.
        layers: The kinds of routed layers.
        ordinary: The kinds of other parameters.
        score: Name of the score.
        keep_low: Whether bf16 weights have low parts.
        optim_bits: Of the moments of large matrices.
        odd: Whether some sizes are not multiples of 16.
    """

    device: torch.device
    layers: tuple[LayerKind, ...]
    ordinary: tuple[Held, ...]
    score: str
    keep_low: bool
    optim_bits: int
    odd: bool


def kind_of(groups: Sequence[dict[str, Any]], score: str, keep_low: bool, optim_bits: int) -> Kind:
    """Return the kind of an optimizer's step.

    Args:
        groups: The optimizer's, all parameters on one device.
        score: Name of the score.
        keep_low: Whether bf16 weights have low parts.
        optim_bits: Of the moments of large matrices.
    """
    layers = {
        LayerKind(group["form"], group["experts"], group["ranks"], tuple(_held(p) for p in group["params"]))
        for group in groups
        if "module" in group
    }
    ordinary = {_held(p) for group in groups if "module" not in group for p in group["params"]}
    params = [local(p) for group in groups for p in group["params"]]
    odd = any(p.numel() % _MULTIPLE or (p.ndim > 1 and p.shape[-1] % _MULTIPLE) for p in params)
    odd = odd or any(r % _MULTIPLE for layer in layers for r in layer.ranks)
    # In an order, so that equal kinds are equal.
    return Kind(
        params[0].device,
        tuple(sorted(layers, key=str)),
        tuple(sorted(ordinary, key=str)),
        score,
        keep_low,
        optim_bits,
        odd,
    )


def _held(p: Tensor) -> Held:
    return Held(min(p.ndim, 2), p.dtype)
