"""The optimizer's state where it is missing: that of every routed layer, and of ordinary parameters that have a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from molf.layers.base import in_8_bits, init_moments, init_step
from molf.layers.forms import FORMS
from molf.numerics.resharding import refuse_orphans

__all__ = ["init_group", "init_states"]


def init_states(
    groups: Sequence[dict[str, Any]], state: dict[Any, dict[str, Any]], keep_low: bool, optim_bits: int
) -> None:
    """Create what is missing.

    Args:
        groups: The optimizer's.
        state: The optimizer's.
        keep_low: Whether bf16 weights have low parts.
        optim_bits: Of the moments of large matrices.

    Raises:
        RuntimeError: If there is state of parameters that are in no group any more.
    """
    refuse_orphans(groups, state)
    for group in groups:
        init_group(group, state, keep_low, optim_bits)


def init_group(group: dict[str, Any], state: dict[Any, dict[str, Any]], keep_low: bool, optim_bits: int) -> None:
    """Create what is missing of one group."""
    if "module" in group:
        FORMS[group["form"]].init_state(group, state, keep_low, optim_bits)
        return
    for p, packed in zip(group["params"], in_8_bits(group, optim_bits), strict=True):
        if p.grad is not None:
            init_step(state[p])
            init_moments(p, state[p], keep_low, packed)
