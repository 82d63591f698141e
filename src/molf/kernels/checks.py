"""Checks of what the kernels support, before anything moves."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from molf.errors import MolfError
from molf.numerics.distributed import local
from molf.scores import SCORES, Score

__all__ = ["check_gradients", "check_groups", "check_options", "share_betas_and_eps"]

DTYPES = (torch.float32, torch.bfloat16)


def check_options(groups: Sequence[dict[str, Any]], score: Score) -> None:
    """Check conditions of the kernels that do not depend on the device, and raise a ``MolfError`` if one is not met."""
    if importlib.util.find_spec("triton") is None:
        raise _refusal("Triton is not installed; PyTorch's CUDA builds for Linux bring it")
    if type(score) not in {type(known) for known in SCORES.values()}:
        raise _refusal(f"the kernels know the scores {', '.join(SCORES)}, not {type(score).__name__}")
    routed = [group for group in groups if "module" in group]
    if stacks := [group["module"] for group in routed if group["form"] == "stacked"]:
        raise _refusal(f"the kernels know no stacked matrices, and {stacks[0]} is a stack")
    weights = {group["params"][0].dtype for group in routed}
    if any(p.dtype not in DTYPES for group in groups for p in group["params"]) or len(weights) > 1:
        found = ", ".join(sorted({str(p.dtype) for group in groups for p in group["params"]}))
        raise _refusal(f"the kernels need weights that are all float32 or all bfloat16, and these are {found}")
    for group in routed:
        adapters = len(group["params"]) - 2 * len(group["ranks"]) * (group["form"] == "branched")
        dtypes = [p.dtype for p in group["params"]]
        if len({*dtypes[:adapters]}) > 1 or dtypes[adapters::2] != dtypes[adapters + 1 :: 2]:
            found = ", ".join(str(p.dtype) for p in group["params"])
            raise _refusal(
                f"the kernels need one dtype in each expert, and the tensors of {group['module']} are {found}"
            )


def check_groups(groups: Sequence[dict[str, Any]], score: Score) -> None:
    """Check all conditions of the kernels for groups where they are now, and raise a ``MolfError`` if one is not met."""
    check_options(groups, score)
    params = [p for group in groups for p in group["params"]]
    devices = sorted({str(p.device) for p in params})
    if len(devices) > 1:
        raise _refusal(f"the kernels work on one device, and the parameters are on {', '.join(devices)}")
    interpreted = params[0].device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if params[0].device.type != "cuda" and not interpreted:
        raise _refusal(f"the kernels run on CUDA devices, and the parameters are on {devices[0]}")
    if not share_betas_and_eps(groups):
        raise _refusal("the kernels work with one setting of betas and eps, and groups differ in it")


def share_betas_and_eps(groups: Sequence[dict[str, Any]]) -> bool:
    """Return whether all groups have the same, as the kernels need. Schedules may change them at every step."""
    return len({(*group["betas"], group["eps"]) for group in groups}) == 1


def check_gradients(params: Iterable[Tensor]) -> None:
    """Raise a ``MolfError`` if kernels cannot read a gradient; that it is dense and fits was checked before."""
    for p in (p for p in params if p.grad is not None):
        assert p.grad is not None
        if p.grad.dtype != p.dtype or not local(p.grad).is_contiguous():
            raise _refusal(
                f"the gradient of a parameter {list(p.shape)} is {p.grad.dtype} with strides {local(p.grad).stride()}, and the "
                f"kernels need {p.dtype} and contiguous memory"
            )


def _refusal(reason: str) -> MolfError:
    return MolfError(f"fused=True: {reason}; use fused=False")
