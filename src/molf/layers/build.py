"""From a parameter group to its layer and its state."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

from molf.layers.base import Matrix, RoutedLayer, init_moments, init_step, quantized_params
from molf.layers.branched import BranchedLayer
from molf.layers.fit import check_fit, fits
from molf.layers.merged import MergedLayer
from molf.layers.stacked import StackedLayer, matrix_names
from molf.layers.stacked_matrix import StackedMatrix
from molf.numerics.bf16 import Noise
from molf.numerics.context import StepContext

__all__ = ["LAYER_TYPES", "active_layers", "init_state_", "matrix_of", "modules_of", "routed_layer"]

LAYER_TYPES: dict[str, type[RoutedLayer]] = {"merged": MergedLayer, "stacked": StackedLayer, "branched": BranchedLayer}
"""The ways of holding the experts, by the ``form`` of a parameter group."""


def routed_layer(
    group: dict[str, Any], state: MutableMapping[Any, dict[str, Any]], noise: Noise | None = None
) -> RoutedLayer:
    """Return the layer of a routed group whose state exists."""
    return LAYER_TYPES[group["form"]](group, state, noise)


def active_layers(
    groups: Sequence[dict[str, Any]], state: MutableMapping[Any, dict[str, Any]], noise: Noise | None = None
) -> list[RoutedLayer]:
    """Return the layers of the routed groups among some that have gradients.

    Raises:
        MolfError: If an expert of such a layer has none.
    """
    layers = [routed_layer(group, state, noise) for group in groups if "module" in group]
    active = [layer for layer in layers if layer.active]
    for layer in active:
        layer.check_experts()
    return active


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


def init_state_(groups: Sequence[dict[str, Any]], context: StepContext) -> None:
    """Create missing state: of every routed layer, and of ordinary parameters that have a gradient.

    Args:
        groups: All groups of the optimizer, some of them, or parts of ordinary ones.
        context: Of the step.

    Raises:
        MolfError: If state or a gradient does not fit its parameter any more; nothing has changed then.
    """
    incomplete = [group for group in groups if not _is_complete(group, context)]
    for p in (p for group in incomplete for p in group["params"]):
        check_fit(p, context.state.get(p, {}), context.name_of)
    for group in incomplete:
        _init_group_(group, context.state, not context.stochastic, context.optim_bits)


def _is_complete(group: dict[str, Any], context: StepContext) -> bool:
    """Return whether all of a group's state is there and fits."""
    state, keep_low, routed = context.state, not context.stochastic, "module" in group
    for p in group["params"]:
        entries = state.get(p)
        if not fits(p, entries, keep_low) if entries else routed or p.grad is not None:
            return False
    return True


def _init_group_(
    group: dict[str, Any], state: MutableMapping[Any, dict[str, Any]], keep_low: bool, optim_bits: int
) -> None:
    if "module" in group:
        LAYER_TYPES[group["form"]].init_state(group, state, keep_low, optim_bits)
        return
    for p, quantized in zip(group["params"], quantized_params(group, optim_bits), strict=True):
        if p.grad is not None:
            init_step(state[p])
            init_moments(p, state[p], keep_low, quantized)
