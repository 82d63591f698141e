"""Whose kernels take an optimizer's steps where ``fused`` is None: MoLF's if they apply and pass a trial, else PyTorch's."""

from __future__ import annotations

import functools
import logging
from collections.abc import Hashable
from typing import TYPE_CHECKING

import torch

from molf.kernels.checks import check_groups
from molf.kernels.kinds import Kind, kind_of
from molf.numerics.distributed import Ranks, is_sharded

if TYPE_CHECKING:
    from molf.optimizer import MoLF

__all__ = ["Choice", "is_for_kernels"]

logger = logging.getLogger(__name__)

_EITHER = "fused=True insists on MoLF's kernels, fused=False never tries them"


class Choice:
    """The choice of an optimizer: made at its first step, and again when parameters or settings are others.

    Attributes:
        made: Whether MoLF's kernels are to take the steps; None before the first.
    """

    def __init__(self) -> None:
        self.made: bool | None = None
        self._made_of: Hashable = None

    def make(self, optimizer: MoLF, ranks: Ranks) -> bool:
        """Return whether MoLF's kernels are to take the next step: what is asked for, or else what is chosen.

        Args:
            optimizer: With the parameters as they are at this step.
            ranks: Those that train the model together; all get the same answer, and all have to ask.
        """
        if optimizer.fused is not None:
            self.made = optimizer.fused
            return self.made
        made_of = _settings(optimizer, ranks)
        if self.made is None or self._made_of != made_of:
            self.made, self._made_of = _choose(optimizer, ranks), made_of
        return self.made


def is_for_kernels(device: torch.device) -> bool:
    """Say whether kernels may be chosen there unasked: never on a CPU, where they would be interpreted."""
    return device.type == "cuda"


def _settings(optimizer: MoLF, ranks: Ranks) -> Hashable:
    """Return all that a choice depends on, cheap to compare at every step."""
    groups = optimizer.param_groups
    return (
        [(p.device, p.dtype, is_sharded(p)) for group in groups for p in group["params"]],
        [(group["betas"], group["eps"]) for group in groups],
        (type(optimizer.score), optimizer.bf16_update, optimizer.optim_bits),
        len(ranks.alike),
    )


def _choose(optimizer: MoLF, ranks: Ranks) -> bool:
    device = optimizer.param_groups[0]["params"][0].device
    unmet = _unmet(optimizer, device)
    failure = None
    if unmet is None:
        score, keep_low = optimizer.score.name, optimizer.bf16_update == "split"
        failure = _failure(kind_of(optimizer.param_groups, score, keep_low, optimizer.optim_bits))
    if failure is not None:
        logger.warning(
            "MoLF's own kernels would be faster, but did not take the step of PyTorch's on %s, which take it then: %s (%s)",
            device,
            failure,
            _EITHER,
        )
    here = unmet is None and failure is None
    everywhere = ranks.all_say(here, device)
    if everywhere and ranks.first:
        logger.info("MoLF's own kernels take the steps on %s; %s", device, _EITHER)
    elif here and ranks.first:
        logger.warning(
            "MoLF's own kernels can't be used on all ranks, so none does: the log of another says why (%s)", _EITHER
        )
    elif unmet is not None:
        logger.debug("PyTorch's kernels take the steps: %s", unmet)
    return everywhere


def _unmet(optimizer: MoLF, device: torch.device) -> str | None:
    """Say which condition of the kernels is not met, None if all are."""
    if not is_for_kernels(device):
        return f"the parameters are on {device}"
    try:
        check_groups(optimizer.param_groups, optimizer.score)
    except ValueError as error:
        return str(error)
    return None


@functools.cache
def _failure(kind: Kind) -> str | None:
    """Say how the kernels failed to take a kind of step, None if they did not; tried once a process."""
    try:
        from molf.kernels.trial import trial

        return trial(kind)
    # Whatever comes of Triton, a compiler or a driver that can't do it: it can be done without them, only slower.
    except Exception as error:
        return f"{type(error).__name__}: {error}"
