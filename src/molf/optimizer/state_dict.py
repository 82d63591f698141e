"""Optimizer state on disk: check that a loaded one fits, keep its dtypes, and count skipped steps in the groups."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from molf.errors import MolfError
from molf.layers.base import quantized_params
from molf.numerics.bf16 import master_dtype
from molf.numerics.distributed import is_sharded, shard_like
from molf.numerics.param_names import ParamNames

__all__ = ["SkippedSteps", "check_compatible", "restore_state", "with_tuples"]

# Entries that are replicated under sharding, unless they are stacks: A and its moments.
_REPLICATED = (".A", ".A.exp_avg", ".A.exp_avg_sq")
_TAGS = ("module", "form", "ranks", "experts", "transposed")
_SCALES = ("scales", "b_factors")  # compared last: with matched rates they follow from the shapes


def with_tuples(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return the state with tuples in its groups: sending it from rank to rank has turned them into lists.

    Raises:
        MolfError: If it is no optimizer's state.
    """
    if missing := [key for key in ("state", "param_groups") if key not in state_dict]:
        raise MolfError(
            f"this is no optimizer state: it has no {missing[0]!r}; load what optimizer.state_dict() returned"
        )
    groups = [
        {key: tuple(value) if isinstance(value, list) and key != "params" else value for key, value in group.items()}
        for group in state_dict["param_groups"]
    ]
    return {**state_dict, "param_groups": groups}


def check_compatible(
    groups: list[dict[str, Any]], state_dict: dict[str, Any], optim_bits: int, names: ParamNames | None
) -> None:
    """Check that a state is whole and belongs to this model, these experts and this precision.

    Args:
        groups: The optimizer's groups.
        state_dict: The state to load.
        optim_bits: The optimizer's.
        names: Of the parameters in the model, if that is known.

    Raises:
        MolfError: If it does not; the message names the difference.
    """
    saved = state_dict["param_groups"]
    here, there = ([group["module"] for group in side if "module" in group] for side in (groups, saved))
    if here != there:
        missing, extra = sorted(set(here) - set(there)), sorted(set(there) - set(here))
        raise MolfError(
            f"this optimizer state belongs to another model: it has {len(there)} routed modules, this optimizer has {len(here)}; "
            + (
                f"missing in the state: {missing[:5] or 'none'}, unknown here: {extra[:5] or 'none'}"
                if missing or extra
                else "their order differs"
            )
        )
    _check_counts(groups, saved)
    for own, other in zip(groups, saved, strict=True):
        _check_tags(own, other, _TAGS)
    for i, (own, other) in enumerate(zip(groups, saved, strict=True)):
        keys = zip(own["params"], quantized_params(own, optim_bits), other["params"], strict=True)
        for j, (p, quantized, key) in enumerate(keys):
            if not (entries := state_dict["state"].get(key)):
                continue
            name = None if names is None else names.of(i, j)
            where, shapes = own.get("module") or name or f"parameter {j} of group {i}", _shapes(own, p)
            _check_shapes(where, shapes, entries)
            _check_precision(where, p, quantized, entries)
            _check_whole(where, _entries(own, p, quantized, shapes), entries)
    for own, other in zip(groups, saved, strict=True):
        _check_tags(own, other, _SCALES)


def _check_counts(groups: list[dict[str, Any]], saved: list[dict[str, Any]]) -> None:
    """Check that the same parameters trained, as far as their number tells; the routed layers are the same."""
    counts = [[(group.get("module"), len(group["params"])) for group in side] for side in (groups, saved)]
    here, there = ([n for module, n in side if module is None] for side in counts)
    differing = [f"outside of routed layers, groups of {there} parameters in the state and of {here} here"]
    if here == there:
        routed = zip(*([own for own in side if own[0] is not None] for side in counts), strict=True)
        differing = [
            f"{name} has {there} parameters in the state and {here} here"
            for (name, here), (_, there) in routed
            if here != there
        ]
    if differing:
        raise MolfError(
            f"this optimizer state belongs to a run that trained other parameters: {differing[0]}. Freeze and unfreeze the same, "
            "and add the same groups, before loading it"
        )


def _check_tags(own: dict[str, Any], saved: dict[str, Any], tags: Sequence[str]) -> None:
    for tag in tags:
        if own.get(tag) != saved.get(tag):
            raise MolfError(
                f"this optimizer state belongs to other experts: {own.get('module')} has {tag}={saved.get(tag)} in the state "
                f"and {tag}={own.get(tag)} here; construct MoLF with the values of the saved run"
            )


def _shapes(group: dict[str, Any], p: Tensor) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a parameter's entries in the state, 8-bit maxima apart."""
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("exp_avg", "exp_avg_sq", "low"), tuple(p.shape))
    if group.get("form") in ("merged", "stacked") and p is group["params"][0]:
        *stack, n_out, n_in = p.shape if not group.get("transposed") else p.mT.shape
        for name, r in zip(group["experts"][1:], group["ranks"], strict=True):
            for end in ("", ".exp_avg", ".exp_avg_sq"):
                shapes |= {f"{name}.A{end}": (*stack, r, n_in), f"{name}.B{end}": (*stack, n_out, r)}
    return shapes


def _entries(group: dict[str, Any], p: Tensor, quantized: bool, shapes: Iterable[str]) -> set[str]:
    """Return what a parameter has in the state, but low parts: a run with stochastic rounding has none."""
    counts = [f"{name}.wins" for name in group.get("experts", ()) if f"{name}.A" in shapes]
    counts += ["step"] if "module" not in group or p is group["params"][0] else []
    maxima = ["exp_avg.absmax", "exp_avg_sq.absmax"] if quantized else []
    return {*shapes, *counts, *maxima} - {"low"}


def _check_whole(where: str, wanted: set[str], saved: dict[str, Any]) -> None:
    if missing := sorted(wanted - saved.keys()):
        raise MolfError(
            f"this optimizer state is not whole: {where} has no {missing[0]}; load what optimizer.state_dict() returned"
        )


def _check_shapes(where: str, shapes: dict[str, tuple[int, ...]], saved: dict[str, Any]) -> None:
    for key, shape in shapes.items():
        if key in saved and saved[key].shape != shape:
            what = f"{where} {key}" if key.startswith("lora_") else where
            raise MolfError(
                f"this optimizer state does not fit: {what} is {list(shape)} here and {list(saved[key].shape)} in the state"
            )


def _check_precision(where: str, p: Tensor, quantized: bool, saved: dict[str, Any]) -> None:
    if "exp_avg" not in saved:
        return
    dtype = saved["exp_avg"].dtype
    if quantized != (dtype == torch.uint8):
        saved_bits, ours = (32, 8) if quantized else (8, 32)
        raise MolfError(
            f"this optimizer state has another precision: {where} has moments of {saved_bits} bits in the state and of "
            f"{ours} bits here; construct MoLF with optim_bits={saved_bits}, as the saved run did"
        )
    if dtype not in (master_dtype(p.dtype), torch.uint8) or ("low" in saved and p.dtype != torch.bfloat16):
        theirs = "bfloat16 weights with low parts" if "low" in saved else f"{dtype} moments"
        raise MolfError(
            f"this optimizer state has another precision: {where} has {theirs} in the state, and its weights are {p.dtype} "
            "here; load the model in the dtype of the saved run"
        )


def restore_state(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any], keep_low: bool) -> None:
    """Copy saved tensors into an optimizer without state, in their own dtypes.

    ``Optimizer.load_state_dict`` would cast them to the parameter's dtype: float32 moments of a bf16 weight would become bf16,
    and 8-bit moments would need four times their memory meanwhile. Whole tensors of sharded parameters are sharded. Low parts are
    left out unless they are kept: weights round stochastically from here on.
    """
    saved = state_dict["state"]
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    owners = [(group, p) for group in optimizer.param_groups for p in group["params"]]
    for key, (group, p) in zip(keys, owners, strict=True):
        for name, value in saved.get(key, {}).items():
            if name == "low" and not keep_low:
                continue
            if name == "step" or name.endswith(".wins"):  # counts live on the host
                optimizer.state[p][name] = value.detach().clone().cpu()
                continue
            here = value.detach().to(p.device, copy=True)
            replicated = name.endswith(_REPLICATED) and group["form"] != "stacked"
            whole = replicated or not is_sharded(p)
            optimizer.state[p][name] = here if whole else shard_like(here, p)


class SkippedSteps:
    """Counts skipped steps in the groups, where checkpoints keep them; counts of fused steps stay on the device until read."""

    def __init__(self) -> None:
        self._on_device: Tensor | None = None

    def record(self, taken: bool | Tensor, groups: Sequence[dict[str, Any]]) -> None:
        """Count a step that was not taken. ``taken`` is a 0-dim tensor after a fused step."""
        if isinstance(taken, Tensor):
            if self._on_device is None or self._on_device.device != taken.device:
                self.flush(groups)
                self._on_device = torch.zeros((), dtype=torch.int64, device=taken.device)
            self._on_device += taken.logical_not()  # in place: a CUDA graph that holds this step keeps counting
        elif not taken:
            _add(groups, 1)

    def flush(self, groups: Sequence[dict[str, Any]]) -> int:
        """Add the device's count to the groups and return the total. May sync."""
        if self._on_device is not None:
            _add(groups, int(self._on_device))
            self._on_device.zero_()
        return int(groups[0]["skipped_steps"])


def _add(groups: Sequence[dict[str, Any]], steps: int) -> None:
    for group in groups:
        group["skipped_steps"] += steps
