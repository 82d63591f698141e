"""Loading optimizer state: refuse what does not fit, and keep every dtype as it was saved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["check_compatible", "restore_dtypes"]

_TAGS = ("module", "ranks", "use_rslora", "lora_alpha")


def check_compatible(groups: list[dict[str, Any]], state_dict: dict[str, Any]) -> None:
    """Refuse a state of another model or of other experts.

    Raises:
        ValueError: Naming what differs.
    """
    saved = state_dict["param_groups"]
    here, there = ([group["module"] for group in side if "module" in group] for side in (groups, saved))
    if here != there:
        missing, extra = sorted(set(here) - set(there)), sorted(set(there) - set(here))
        raise ValueError(
            f"this optimizer state is of another model: it has {len(there)} routed modules, this optimizer has {len(here)}; "
            f"missing in the state: {missing[:5] or 'none'}, unknown here: {extra[:5] or 'none'}"
        )
    for own, other in zip(groups, saved, strict=False):
        for tag in _TAGS:
            if own.get(tag) != other.get(tag):
                raise ValueError(
                    f"this optimizer state is of other experts: {own.get('module')} has {tag}={other.get(tag)} in the state and "
                    f"{tag}={own.get(tag)} here; construct MoLF with the values of the saved run"
                )
    for own, other in zip(groups, saved, strict=False):
        for p, key in zip(own["params"], other["params"], strict=False):
            shape = getattr(state_dict["state"].get(key, {}).get("exp_avg"), "shape", p.shape)
            if shape != p.shape:
                where = own.get("module", "an ordinary parameter")
                raise ValueError(
                    f"this optimizer state does not fit: {where} is {list(p.shape)} here and {list(shape)} in the state"
                )


def restore_dtypes(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Put the saved tensors back in their own dtypes.

    ``Optimizer.load_state_dict`` casts floating state to the parameter's dtype: float32 moments of a bf16 weight would
    come back as bf16, and its int16 low part too.
    """
    saved = state_dict["state"]
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for key, p in zip(keys, params, strict=True):
        for name, value in saved.get(key, {}).items():
            if isinstance(value, Tensor) and optimizer.state[p][name].dtype != value.dtype:
                optimizer.state[p][name] = value.detach().clone().to(p.device)
