"""From a parameter group to its layer and its state."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

from molf.layers.base import Matrix, RoutedLayer, init_moments, init_step, quantized_params
from molf.layers.branched import BranchedLayer
from molf.layers.merged import MergedLayer
from molf.layers.stacked import StackedLayer, matrix_names
from molf.layers.stacked_matrix import StackedMatrix
from molf.numerics.bf16 import Noise
from molf.numerics.distributed import check_no_orphaned_state

__all__ = ["LAYER_TYPES", "init_group_", "init_state_", "matrix_of", "modules_of", "routed_layer"]

LAYER_TYPES: dict[str, type[RoutedLayer]] = {"merged": MergedLayer, "stacked": StackedLayer, "branched": BranchedLayer}
"""The ways of holding the experts, by the ``form`` of a parameter group."""


def routed_layer(
    group: dict[str, Any], state: MutableMapping[Any, dict[str, Any]], noise: Noise | None = None
) -> RoutedLayer:
    """Return the layer of a routed group whose state exists."""
    return LAYER_TYPES[group["form"]](group, state, noise)


def modules_of(group: dict[str, Any]) -> tuple[str, ...]:
    """Return the names of the matrices of a routed group."""
    name: str = group["module"]
    return matrix_names(name, len(group["params"][0])) if group["form"] == "stacked" else (name,)


def matrix_of(
    group: dict[str, Any], module: str, state: MutableMapping[Any, dict[str, Any]], noise: Noise | None
) -> Matrix:
    """Return the experts of a matrix of a routed group whose state exists, by the matrix's name."""
    if group["form"] == "stacked":
        return StackedMatrix(group, state, noise, modules_of(group).index(module))
    return MergedLayer(group, state, noise) if group["form"] == "merged" else BranchedLayer(group, state, noise)


def init_state_(
    groups: Sequence[dict[str, Any]], state: MutableMapping[Any, dict[str, Any]], keep_low: bool, optim_bits: int
) -> None:
    """Create missing state: of every routed layer, and of ordinary parameters that have a gradient.

    Args:
        groups: The optimizer's groups.
        state: The optimizer's state.
        keep_low: Whether bf16 weights have low parts.
        optim_bits: Bits of the moments of large matrices.

    Raises:
        RuntimeError: If there is state of parameters that are in no group any more.
    """
    check_no_orphaned_state(groups, state)
    for group in groups:
        init_group_(group, state, keep_low, optim_bits)


def init_group_(
    group: dict[str, Any], state: MutableMapping[Any, dict[str, Any]], keep_low: bool, optim_bits: int
) -> None:
    """Create missing state of one group."""
    if "module" in group:
        LAYER_TYPES[group["form"]].init_state(group, state, keep_low, optim_bits)
        return
    for p, quantized in zip(group["params"], quantized_params(group, optim_bits), strict=True):
        if p.grad is not None:
            init_step(state[p])
            init_moments(p, state[p], keep_low, quantized)
