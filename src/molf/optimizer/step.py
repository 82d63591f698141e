"""Taking a step of all or some groups of an optimizer, by PyTorch's kernels or by MoLF's own, with the optimizer's settings.

Both leave the same state behind, so that any step may be taken by either; only counts may be on the device or on the host.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from molf.kernels.checks import check_gradients, check_groups
from molf.layers.base import RoutedLayer
from molf.layers.forms import FORMS
from molf.numerics.bf16 import Noise
from molf.numerics.distributed import Ranks, is_sharded
from molf.numerics.gradients import all_zero
from molf.optimizer.torch_step import PlainStep
from molf.routing import Outcome

if TYPE_CHECKING:
    from molf.optimizer import MoLF

__all__ = ["is_dry", "noise_of", "take", "take_whole"]

logger = logging.getLogger(__name__)

# Between the seeds of parts that are moved one by one: that many steps have noise of their own.
_APART = 1 << 16


def noise_of(optimizer: MoLF, ranks: Ranks) -> Noise | None:
    """Return the noise of this step's stochastic rounding by PyTorch's kernels, None where low parts are kept.

    Args:
        optimizer: Before any of its layers has counted the step.
        ranks: Those that train the model together.
    """
    if optimizer.bf16_update == "split":
        return None
    routed = [group for group in optimizer.param_groups if "module" in group]
    steps = max(int(optimizer.state.get(group["params"][0], {}).get("step", 0)) for group in routed)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    # What is whole on every rank is rounded alike on all; a shard has a number of its own.
    apart = (ranks.index + 1) * len(params)
    streams = {p: i + apart * is_sharded(p) for i, p in enumerate(params)}
    return Noise((routed[0]["lora_seed"] * 1_000_003 + steps) % 2**63, streams)


def is_dry(optimizer: MoLF, ranks: Ranks) -> bool:
    """Tell a dry step, with which distributed checkpointing creates optimizer state: rates and gradients all zero."""
    if any(float(group["lr"]) for group in optimizer.param_groups):
        return False
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return all_zero(grads, ranks)


def take_whole(optimizer: MoLF, ranks: Ranks) -> Outcome:
    """Take the step of everything that has a gradient, or leave it out whole and say so."""
    fused = optimizer.choose(ranks)
    noise = None if fused else noise_of(optimizer, ranks)
    outcome = take(optimizer, optimizer.param_groups, ranks, fused, noise)
    if outcome.taken is False and ranks.first:
        logger.warning(
            "step left out: a gradient is not finite (%d left out so far). Weights and moments are unchanged.",
            optimizer.skipped_steps + 1,
        )
    return outcome


def take(
    optimizer: MoLF, groups: Sequence[dict[str, Any]], ranks: Ranks, fused: bool, noise: Noise | None, part: int = 0
) -> Outcome:
    """Take the step of the layers and ordinary parameters in these groups that have gradients.

    Args:
        optimizer: Its state of them is there.
        groups: All of its groups, or some, or parts of ordinary ones.
        ranks: Those that train the model together.
        fused: Whether MoLF's kernels are to take it. If that was not asked for, PyTorch's take it where those can't read a
            gradient; all ranks see the same, because gradients lie alike on all.
        noise: Of this step, for PyTorch's kernels.
        part: Which groups these are, a number of their own: kernels keep their tables from step to step.

    Raises:
        ValueError: If kernels are asked for that can't take the step; the reason is given.
    """
    device = groups[0]["params"][0].device
    if optimizer.fused:
        check_groups(groups, optimizer.score)
    active, ordinary = _parts(optimizer, groups, noise)
    if fused and not _readable(optimizer, active, ordinary, device):
        fused, noise = False, noise_of(optimizer, ranks)
        active, ordinary = _parts(optimizer, groups, noise)
    scale, overflow = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    if not fused:
        plain = PlainStep(optimizer.score, optimizer.top_k, optimizer.max_grad_norm)
        return plain.take(active, ordinary, optimizer.state, scale, overflow, ranks, noise)
    from molf.kernels.step import FusedStep, Settings

    kernels = optimizer.kernels.get(part)
    if kernels is None or kernels.device != device:
        kernels = optimizer.kernels[part] = FusedStep(device)
    seed = next(group["lora_seed"] for group in optimizer.param_groups if "module" in group) + part * _APART
    settings = Settings(optimizer.score, optimizer.top_k, optimizer.max_grad_norm)
    return kernels.take(active, ordinary, optimizer.state, settings, scale, overflow, ranks, seed)


def _parts(
    optimizer: MoLF, groups: Sequence[dict[str, Any]], noise: Noise | None
) -> tuple[list[RoutedLayer], list[dict[str, Any]]]:
    """Return the layers that have gradients, and the groups of other parameters."""
    layers = [FORMS[group["form"]](group, optimizer.state, noise) for group in groups if "module" in group]
    return [layer for layer in layers if layer.active], [group for group in groups if "module" not in group]


def _readable(
    optimizer: MoLF, layers: Sequence[RoutedLayer], ordinary: Sequence[dict[str, Any]], device: torch.device
) -> bool:
    """Say whether kernels can read all gradients.

    Raises:
        ValueError: If they can't, and are asked for.
    """
    try:
        check_gradients(layers, ordinary, device)
    except ValueError as unreadable:
        if optimizer.fused:
            raise
        logger.debug("PyTorch's kernels take a step: %s", unreadable)
        return False
    return True
