"""Checks of the optimizer's options at construction, so that a wrong one fails before anything moves."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from molf.errors import MolfError
from molf.layers.base import quantized_params
from molf.layers.fit import check_parameter
from molf.numerics.bf16 import BF16_UPDATES
from molf.numerics.distributed import Ranks
from molf.numerics.quantization import OPTIM_BITS
from molf.setup.param_groups import check_numbers, is_integer, is_number, param_groups

__all__ = [
    "NO_GRADIENTS_KEPT",
    "check_added_group",
    "check_alike",
    "check_backward_step",
    "check_given_groups",
    "check_optim_bits",
    "check_options",
    "check_top_k",
]

NO_GRADIENTS_KEPT = "optimizer_in_backward=True moves a layer as soon as its gradient is complete and keeps none, so "
"""Error prefix for settings that are incompatible with ``optimizer_in_backward``."""


def check_options(
    betas: Sequence[float],
    eps: float,
    max_grad_norm: float | None = None,
    bf16_update: str = "split",
    fused: bool | None = None,
    optimizer_in_backward: bool = False,
) -> None:
    """Check options that need no model.

    Raises:
        MolfError: If one has a value that is not allowed.
    """
    if not isinstance(betas, Sequence) or len(betas) != 2 or not all(is_number(b) and 0 <= b < 1 for b in betas):
        raise MolfError(f"betas={betas!r}: give two numbers in [0, 1)")
    if not (is_number(eps) and eps > 0):
        raise MolfError(f"eps={eps!r}: must be above 0, because the scores divide by sqrt(v) + eps")
    if max_grad_norm is not None and not (is_number(max_grad_norm) and max_grad_norm > 0):
        raise MolfError(f"max_grad_norm={max_grad_norm!r}: must be above 0 and finite, or None for no clipping")
    if bf16_update not in BF16_UPDATES:
        raise MolfError(f"bf16_update={bf16_update!r}: use one of {list(BF16_UPDATES)}")
    if not (fused is None or isinstance(fused, bool)):
        raise MolfError(f"fused={fused!r}: use True, False, or None, which decides by itself")
    if not isinstance(optimizer_in_backward, bool):
        raise MolfError(f"optimizer_in_backward={optimizer_in_backward!r}: use True or False")


def check_optim_bits(optim_bits: int, groups: list[dict[str, Any]]) -> int:
    """Return ``optim_bits`` if the moments of these groups can have that many.

    Raises:
        MolfError: For another number than 32 or 8, or for 8 if weights are float64 or no matrix would use it.
    """
    if type(optim_bits) is not int or optim_bits not in OPTIM_BITS:
        raise MolfError(f"optim_bits={optim_bits!r}: use one of {list(OPTIM_BITS)}")
    _check_precision(optim_bits, [p for group in groups for p in group["params"]])
    if optim_bits == 8 and not any(any(quantized_params(group, 8)) for group in groups):
        raise MolfError(
            "optim_bits=8 would change nothing: no matrix of 4,096 or more elements trains with full rank, and everything else "
            "keeps float32 moments; use optim_bits=32"
        )
    return optim_bits


def _check_precision(optim_bits: int, params: Iterable[torch.Tensor]) -> None:
    if optim_bits == 8 and any(p.dtype == torch.float64 for p in params):
        raise MolfError(
            "optim_bits=8 with float64 weights: 8-bit moments would void their precision; use float32 or bfloat16 weights, or "
            "optim_bits=32"
        )


def check_top_k(top_k: int, groups: list[dict[str, Any]]) -> int:
    """Return ``top_k`` if there are that many experts.

    Raises:
        MolfError: If there are not.
    """
    experts = next(group["experts"] for group in groups if "module" in group)
    if not is_integer(top_k) or not 1 <= top_k <= len(experts):
        raise MolfError(
            f"top_k={top_k}: choose between 1 and {len(experts)}, the number of experts ({', '.join(experts)})"
        )
    return int(top_k)


def check_given_groups(
    groups: Iterable[Any], grouping: dict[str, Any], defaults: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return copies of groups that ``param_groups`` made before, and of others, with lists of parameters.

    Args:
        groups: What the user gave in place of the model.
        grouping: Options that take effect in ``param_groups`` only, by name.
        defaults: ``lr`` and ``weight_decay``, which groups without their own take.

    Raises:
        TypeError: For bare parameters.
        MolfError: For an option that would be ignored, or groups with different experts or of equal names.
    """
    groups = list(groups)
    if not all(isinstance(group, dict) for group in groups) or not any("module" in group for group in groups):
        raise TypeError(
            "MoLF needs to know the layers: pass the model, MoLF(model, ...), or MoLF(molf.param_groups(model, ...)), not bare "
            "parameters"
        )
    options = inspect.signature(param_groups).parameters
    check_numbers(**defaults)
    routed = [group for group in groups if "module" in group]
    for name, value in defaults.items():
        differs = any(float(group.get(name, value)) != float(value) for group in routed)
        if differs and all(name in group for group in groups):
            grouping = {**grouping, name: value}
    for name, value in grouping.items():
        if value != options[name].default:
            raise MolfError(f"the groups are given, so {name} belongs to param_groups(model, {name}=...)")
    check_alike(routed)
    return [{**group, "params": _listed(group["params"])} for group in groups]


def check_alike(routed: Sequence[dict[str, Any]]) -> None:
    """Check that routed groups have the same experts and names of their own.

    Raises:
        MolfError: If they have not.
    """
    if len({group["experts"] for group in routed}) > 1:
        raise MolfError(
            "all routed groups must have the same experts: build them by param_groups with the same ranks, on models of one form"
        )
    modules = Counter(group["module"] for group in routed)
    if twice := [name for name, count in modules.items() if count > 1]:
        raise MolfError(
            f"{len(twice)} routed layers have the same name as another ({twice[0]}): routing, views and checkpoints tell layers "
            "apart by name. Several models in one optimizer need one module around them: "
            "MoLF(nn.ModuleDict({'first': first, 'second': second}))"
        )


def _listed(params: Any) -> Any:
    """Return a group's parameters as torch does; a generator could be looked through only once, and torch refuses a set."""
    if isinstance(params, torch.Tensor):
        return [params]
    return params if isinstance(params, set) else list(params)


def check_added_group(group: dict[str, Any], optim_bits: int) -> None:
    """Check a group that the base class has accepted, and make plain numbers of its numbers: states hash, compare and save them.

    Raises:
        MolfError: If a parameter cannot be trained, or a rate, a decay or another option has a value that is not allowed.
    """
    for i, p in enumerate(group["params"]):
        if p.requires_grad:
            check_parameter(group.get("module", f"parameter {i} of the group"), p)
    _check_precision(optim_bits, group["params"])
    check_numbers(lr=group["lr"], weight_decay=group["weight_decay"])
    check_options(group["betas"], group["eps"])
    plain = {"betas": tuple(map(float, group["betas"])), "eps": float(group["eps"])}
    group.update(plain, weight_decay=float(group["weight_decay"]))
    if not isinstance(group["lr"], torch.Tensor):
        group["lr"] = float(group["lr"])


def check_backward_step(max_grad_norm: float | None, compares_modules: bool, ranks: Ranks, model: Any = None) -> None:
    """Check that ``optimizer_in_backward`` can work: nothing may need all gradients before the first layer moves.

    Args:
        max_grad_norm: The optimizer's.
        compares_modules: Whether the optimizer's score does.
        ranks: The ranks that train the model together.
        model: What the optimizer was built for, if that is known.

    Raises:
        MolfError: If gradients are clipped or summed over ranks, or the score compares modules.
    """
    if compares_modules:
        raise MolfError(
            f"{NO_GRADIENTS_KEPT}a score that compares modules (shuffled) is impossible, which needs all of them first: choose "
            "another score"
        )
    if max_grad_norm is not None:
        raise MolfError(
            f"{NO_GRADIENTS_KEPT}max_grad_norm={max_grad_norm} is impossible, which needs the norm of all gradients first: "
            "leave one of them out"
        )
    if ranks.replica_groups or ranks.shards is not None or isinstance(model, nn.parallel.DistributedDataParallel):
        raise MolfError(
            f"{NO_GRADIENTS_KEPT}it cannot be summed over ranks first (DDP, FSDP): train on one device with the plain model, or "
            "use optimizer_in_backward=False"
        )
