"""Checks of the optimizer's options, at construction rather than in the middle of a run."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from molf.layers.base import in_8_bits
from molf.numerics.bf16 import BF16_UPDATES
from molf.numerics.distributed import Ranks
from molf.numerics.quantization import OPTIM_BITS
from molf.setup.param_groups import param_groups

__all__ = ["RELEASED", "check_given_groups", "check_optim_bits", "check_options", "check_release", "check_top_k"]

RELEASED = "optimizer_in_backward=True moves a layer as soon as its gradient is there and keeps none, so "
"""How refusals begin that gradient release is the reason of."""


def check_options(
    betas: tuple[float, float], eps: float, max_grad_norm: float | None, bf16_update: str, fused: bool | None
) -> None:
    """Refuse values that can't work.

    Raises:
        ValueError: Naming the option, its value and what is allowed.
    """
    if not isinstance(betas, Sequence) or len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas={betas}: give two numbers in [0, 1)")
    if not eps > 0:
        raise ValueError(f"eps={eps}: must be above 0, the scores divide by sqrt(v) + eps")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm={max_grad_norm}: must be above 0, or None for no clipping")
    if bf16_update not in BF16_UPDATES:
        raise ValueError(f"bf16_update={bf16_update!r}: use one of {list(BF16_UPDATES)}")
    if not (fused is None or isinstance(fused, bool)):
        raise ValueError(f"fused={fused!r}: use True, False or None, which chooses")


def check_optim_bits(optim_bits: int, groups: list[dict[str, Any]]) -> int:
    """Return ``optim_bits`` if the moments of these groups can be kept so.

    Raises:
        ValueError: For another number of bits, or 8 bits beside float64 weights or where no moments would be kept in them.
    """
    if type(optim_bits) is not int or optim_bits not in OPTIM_BITS:
        raise ValueError(f"optim_bits={optim_bits!r}: use one of {list(OPTIM_BITS)}")
    if optim_bits == 8 and any(p.dtype == torch.float64 for group in groups for p in group["params"]):
        raise ValueError(
            "optim_bits=8 with float64 weights: moments of 8 bits would void their precision; use float32 or bfloat16 weights, "
            "or optim_bits=32"
        )
    if optim_bits == 8 and not any(packed for group in groups for packed in in_8_bits(group, 8)):
        raise ValueError(
            "optim_bits=8 would change nothing: no matrix of 4,096 elements or more trains with full rank, and all else keeps "
            "its moments in float32; use optim_bits=32"
        )
    return optim_bits


def check_top_k(top_k: int, groups: list[dict[str, Any]]) -> int:
    """Return ``top_k`` if there are that many experts.

    Raises:
        ValueError: Naming the experts there are.
    """
    experts = next(group["experts"] for group in groups if "module" in group)
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= len(experts):
        raise ValueError(
            f"top_k={top_k}: choose between 1 and {len(experts)}, the number of experts ({', '.join(experts)})"
        )
    return top_k


def check_given_groups(groups: Iterable[Any], grouping: dict[str, Any]) -> list[dict[str, Any]]:
    """Return groups that were made before, refusing what does not come from ``param_groups``.

    Args:
        groups: What was given in place of the model.
        grouping: Options that take effect in ``param_groups`` only, by name.

    Raises:
        TypeError: For bare parameters.
        ValueError: For an option that would be ignored, or groups of different experts.
    """
    groups = list(groups)
    if not any(isinstance(group, dict) and "module" in group for group in groups):
        raise TypeError(
            "MoLF has to know the layers: pass the model, MoLF(model, ...), or MoLF(molf.param_groups(model, ...)), not bare "
            "parameters"
        )
    options = inspect.signature(param_groups).parameters
    for name, value in grouping.items():
        if value != options[name].default:
            raise ValueError(f"the groups are given, so {name} belongs to param_groups(model, {name}=...)")
    if len({group["experts"] for group in groups if "module" in group}) > 1:
        raise ValueError("all routed groups must have the same experts")
    return groups


def check_release(max_grad_norm: float | None, ranks: Ranks, model: Any = None) -> None:
    """Refuse what needs all gradients before the first layer moves.

    Args:
        max_grad_norm: The optimizer's.
        ranks: Those that train the model together.
        model: What the optimizer was made for, where that is known.

    Raises:
        ValueError: Naming the setting, with the reason and what to do.
    """
    if max_grad_norm is not None:
        raise ValueError(
            f"{RELEASED}max_grad_norm={max_grad_norm} can't be had, which needs the norm of all gradients first: leave one of "
            "them out"
        )
    if ranks.alike or ranks.shards is not None or isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(
            f"{RELEASED}it can't be summed over ranks first (DDP, FSDP): train on one device with the plain model, or use "
            "optimizer_in_backward=False"
        )
