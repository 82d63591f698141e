"""Whether a parameter's state and gradient fit it. Memory may be replaced between steps, and fused kernels check nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from molf.errors import MolfError
from molf.numerics.bf16 import master_dtype
from molf.numerics.distributed import local

__all__ = ["check_fit", "check_not_flat", "check_not_split", "check_parameter", "fits"]

# Of a parameter and its moments; uint8 are codes.
_DTYPES = {
    (torch.float64, torch.float64),
    *((dtype, moments) for dtype in (torch.float32, torch.bfloat16) for moments in (torch.float32, torch.uint8)),
}

_DENSE = torch.strided

_REPLACED = (
    "its memory was replaced after the optimizer had state (resize_token_embeddings does that). Make a new optimizer, "
    "MoLF(model, ...), give the parameter its old shape again, or load a state of the new shape"
)
_STALE = "its memory was replaced after backward. Call zero_grad() and backward again"
_MOVED = (
    "the model was moved. Move the state, too: optimizer.load_state_dict(optimizer.state_dict()), after zero_grad()"
)
_USE_FSDP2 = (
    "and MoLF routes matrices. Shard by FSDP2 instead, which keeps them: fully_shard(model), fsdp_version: 2 in accelerate, or "
    "TrainingArguments(fsdp=True)"
)


def fits(p: Tensor, entries: dict[str, Any], keep_low: bool) -> bool:
    """Return whether a parameter has all its moments, and they and the gradient fit it.

    Every step asks this of every parameter, so it is short and stays on the host.

    Args:
        p: The parameter.
        entries: Its entries of the optimizer's state.
        keep_low: Whether bf16 weights have low parts.
    """
    moments, grad, dtype = entries.get("exp_avg"), p.grad, p.dtype
    if moments is None or (dtype, moments.dtype) not in _DTYPES or moments.device != p.device or not p.is_contiguous():
        return False
    if ("low" in entries) if dtype is not torch.bfloat16 else (keep_low and "low" not in entries):
        return False
    shape = p.shape
    if moments.shape != shape or (grad is not None and (grad.shape != shape or grad.layout is not _DENSE)):
        return False
    whole = type(moments) is Tensor and type(p) is nn.Parameter
    return whole or _shards_fit(p, moments, grad)


def _shards_fit(p: Tensor, moments: Tensor, grad: Tensor | None) -> bool:
    shape = local(p).shape
    return local(moments).shape == shape and (grad is None or local(grad).shape == shape)


def check_fit(p: Tensor, entries: dict[str, Any], name_of: Callable[[Tensor], str]) -> None:
    """Check that a parameter can be trained, that its moments and its gradient fit it, if it has them, and the latter is dense.

    Args:
        p: The parameter.
        entries: Its entries of the optimizer's state.
        name_of: Returns its name, for the message.

    Raises:
        MolfError: If not; the message has both shapes, dtypes or devices.
    """
    if (p.dtype, master_dtype(p.dtype)) not in _DTYPES or not p.is_contiguous():
        check_parameter(name_of(p), p)
    if p.grad is not None and p.grad.layout is not _DENSE:
        raise MolfError(
            f"the gradient of {name_of(p)} is sparse, which is not supported: construct embeddings with sparse=False"
        )
    moments = entries.get("exp_avg")
    for what, x, reason in (("optimizer's state", moments, _REPLACED), ("gradient", p.grad, _STALE)):
        if x is None:
            continue
        if x.shape != p.shape:
            raise MolfError(
                f"the {what} of {name_of(p)} is {list(x.shape)}, and the parameter is {list(p.shape)}: {reason}"
            )
        own, whole = list(local(x).shape), list(local(p).shape)
        if own != whole:
            raise MolfError(
                f"the {what} of {name_of(p)} is {own} on this rank, and the parameter is {whole}: both must be sharded alike"
            )
        if x.device != p.device:
            raise MolfError(f"the {what} of {name_of(p)} is on {x.device}, and the parameter on {p.device}: {_MOVED}")
    if moments is None:
        return
    if (p.dtype, moments.dtype) not in _DTYPES or ("low" in entries and p.dtype != torch.bfloat16):
        was = "bfloat16" if "low" in entries else "float64" if moments.dtype == torch.float64 else "float32"
        raise MolfError(
            f"{name_of(p)} is {p.dtype}, and the optimizer's state of it is for {was} weights: the model was cast after the "
            "optimizer had state. Cast it back, or make a new optimizer, MoLF(model, ...)"
        )


def check_parameter(name: str, p: Tensor) -> None:
    """Check that a parameter has a dtype and a layout that can be trained.

    Raises:
        MolfError: If it has not.
    """
    if (p.dtype, master_dtype(p.dtype)) not in _DTYPES:
        raise MolfError(f"{name} is {p.dtype}: train float32 weights (with autocast), or bfloat16 or float64 ones")
    if not p.is_contiguous():
        raise MolfError(f"{name} is not contiguous in memory: replace it by its .contiguous() copy")


def check_not_split(name: str, p: Tensor) -> None:
    """Check that DeepSpeed's ZeRO-3 has not put an empty tensor in a parameter's place.

    Raises:
        MolfError: If it has.
    """
    if hasattr(p, "ds_id"):
        raise MolfError(f"DeepSpeed's ZeRO-3 has split {name} and left an empty tensor in its place, {_USE_FSDP2}")


def check_not_flat(groups: Sequence[dict[str, Any]]) -> None:
    """Check that routed layers still have their matrices.

    Raises:
        MolfError: If not: DeepSpeed's ZeRO and FSDP1 put flat pieces of many parameters into groups, or nothing, and ZeRO has
            groups stepped one by one.
    """
    if not any("module" in group for group in groups):
        raise MolfError(f"the groups of the routed layers are gone, which DeepSpeed's ZeRO takes apart, {_USE_FSDP2}")
    for group in groups:
        shape = list(group["params"][0].shape) if group["params"] else []
        if "module" in group and len(shape) < 2:
            raise MolfError(
                f"the parameters of {group['module']} were flattened into {shape}, as DeepSpeed's ZeRO and FSDP1 do, {_USE_FSDP2}"
            )
