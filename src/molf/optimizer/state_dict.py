"""Loading optimizer state: refuse what does not fit, and keep every dtype as it was saved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from molf.layers.base import in_8_bits
from molf.numerics.bf16 import master_dtype
from molf.numerics.distributed import is_sharded, sharded_like

__all__ = ["check_compatible", "restore_state", "with_tuples"]

# Entries that every rank holds whole: A and its moments.
_WHOLE = (".A", ".A.exp_avg", ".A.exp_avg_sq")
_TAGS = ("module", "form", "ranks", "experts", "scales")


def with_tuples(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a state whose groups have tuples again where one that was sent from rank to rank has lists."""
    groups = [
        {key: tuple(value) if isinstance(value, list) and key != "params" else value for key, value in group.items()}
        for group in state_dict["param_groups"]
    ]
    return {**state_dict, "param_groups": groups}


def check_compatible(groups: list[dict[str, Any]], state_dict: dict[str, Any], optim_bits: int) -> None:
    """Refuse a state of another model, of other experts, or of moments kept in another way.

    Args:
        groups: The optimizer's.
        state_dict: What is to be loaded.
        optim_bits: The optimizer's.

    Raises:
        ValueError: Naming what differs.
    """
    saved = state_dict["param_groups"]
    here, there = ([group["module"] for group in side if "module" in group] for side in (groups, saved))
    if here != there:
        missing, extra = sorted(set(here) - set(there)), sorted(set(there) - set(here))
        raise ValueError(
            f"this optimizer state is of another model: it has {len(there)} routed modules, this optimizer has {len(here)}; "
            + (
                f"missing in the state: {missing[:5] or 'none'}, unknown here: {extra[:5] or 'none'}"
                if missing or extra
                else "their order differs"
            )
        )
    for own, other in zip(groups, saved, strict=False):
        for tag in _TAGS:
            if own.get(tag) != other.get(tag):
                raise ValueError(
                    f"this optimizer state is of other experts: {own.get('module')} has {tag}={other.get(tag)} in the state and "
                    f"{tag}={own.get(tag)} here; construct MoLF with the values of the saved run"
                )
    for own, other in zip(groups, saved, strict=False):
        for p, packed, key in zip(own["params"], in_8_bits(own, optim_bits), other["params"], strict=False):
            _check_tensors(own.get("module", "an ordinary parameter"), p, packed, state_dict["state"].get(key, {}))


def _check_tensors(where: str, p: Tensor, packed: bool, saved: dict[str, Any]) -> None:
    if "exp_avg" not in saved:
        return
    shape, dtype = saved["exp_avg"].shape, saved["exp_avg"].dtype
    if shape != p.shape:
        raise ValueError(
            f"this optimizer state does not fit: {where} is {list(p.shape)} here and {list(shape)} in the state"
        )
    if packed != (dtype == torch.uint8):
        saved_bits, ours = (32, 8) if packed else (8, 32)
        raise ValueError(
            f"this optimizer state is of another precision: {where} has moments of {saved_bits} bits in the state and of "
            f"{ours} bits here; construct MoLF with optim_bits={saved_bits}, as the saved run did"
        )
    if dtype not in (master_dtype(p.dtype), torch.uint8) or ("low" in saved and p.dtype != torch.bfloat16):
        theirs = "bfloat16 weights with low parts" if "low" in saved else f"{dtype} moments"
        raise ValueError(
            f"this optimizer state is of another precision: {where} has {theirs} in the state, and its weights are {p.dtype} "
            "here; load the model in the dtype of the saved run"
        )


def restore_state(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Put the saved tensors into an optimizer without state, in their own dtypes.

    ``Optimizer.load_state_dict`` would cast them to the parameter's dtype: float32 moments of a bf16 weight would come back as
    bf16, and 8-bit ones would take four times their memory meanwhile. What is given whole and belongs to a sharded parameter is
    sharded.
    """
    saved = state_dict["state"]
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for key, p in zip(keys, params, strict=True):
        for name, value in saved.get(key, {}).items():
            if value.ndim == 0:  # a count, which lives on the host
                optimizer.state[p][name] = value.detach().clone().cpu()
                continue
            here = value.detach().to(p.device, copy=True)
            whole = name.endswith(_WHOLE) or not is_sharded(p)
            optimizer.state[p][name] = here if whole else sharded_like(here, p)
