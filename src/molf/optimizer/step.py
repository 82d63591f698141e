"""One step of all or some parameter groups, by PyTorch's kernels or by MoLF's Triton kernels.

Both leave the same state, so consecutive steps may use either. Only step counts may be on the device or on the host.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch

from molf.errors import MolfError
from molf.layers.build import active_layers
from molf.numerics.context import StepContext
from molf.numerics.gradients import all_zero
from molf.optimizer.torch_step import torch_step
from molf.routing import Outcome

__all__ = ["only_creates_state", "step_all", "step_groups"]

logger = logging.getLogger(__name__)

# Distance between the noise seeds of units that move one by one, in steps.
_UNIT_STRIDE = 1 << 16


def only_creates_state(context: StepContext) -> bool:
    """Return whether all rates and gradients are zero: distributed checkpointing creates optimizer state by such a step."""
    if any(float(group["lr"]) for group in context.groups):
        return False
    return all_zero([p.grad for group in context.groups for p in group["params"] if p.grad is not None], context.ranks)


def step_all(context: StepContext) -> Outcome:
    """Take the step of everything that has a gradient. If a gradient is not finite, skip the step whole and log it."""
    outcome = step_groups(context.groups, context.with_noise())
    if outcome.taken is False and context.ranks.is_leader:
        logger.warning(
            "Skipped a step because a gradient, or its square, is not finite (%d skipped so far). Weights and moments are "
            "unchanged.",
            context.groups[0]["skipped_steps"] + 1,
        )
    return outcome


def step_groups(groups: Sequence[dict[str, Any]], context: StepContext, unit: int = 0) -> Outcome:
    """Take the step of the layers and ordinary parameters in these groups that have gradients.

    If kernels that the user did not insist on cannot read a gradient, PyTorch's take this step. All ranks decide alike,
    because gradients have the same layout on all of them. An autocast around the step, or around backward, has no say.

    Args:
        groups: All groups of the optimizer, some of them, or parts of ordinary ones; their state exists.
        context: Of this step.
        unit: A number for this selection of groups. Kernels cache their tables by it.

    Raises:
        MolfError: If ``fused=True`` and the kernels cannot take the step, or an expert of a layer with gradients has none.
    """
    with ExitStack() as without:
        for device in {group["params"][0].device.type for group in groups if group["params"]}:
            without.enter_context(torch.autocast(device, enabled=False))  # it would round the sums of scores
        if context.fused:
            fused_step = _prepared(groups, context, unit)
            if fused_step is not None:
                outcome: Outcome = fused_step.step(context, seed=context.seed + unit * _UNIT_STRIDE)
                return outcome
            context = context.without_fused()
        ordinary = [group for group in groups if "module" not in group]
        return torch_step(active_layers(groups, context.state, context.noise), ordinary, context)


def _prepared(groups: Sequence[dict[str, Any]], context: StepContext, unit: int) -> Any:
    """Return the fused step that is ready to take this step; None if the kernels cannot take it."""
    from molf.kernels.step import FusedStep

    device = next(p.device for group in groups for p in group["params"])
    fused_step = context.fused_steps.get(unit)
    if fused_step is None or fused_step.device != device:
        fused_step = context.fused_steps[unit] = FusedStep(device)
    try:
        fused_step.prepare(groups, context)
    except MolfError as unreadable:
        if context.fused_required:
            raise
        logger.debug("PyTorch's kernels take this step: %s", unreadable)
        return None
    return fused_step
