"""From a model to flat, plain parameter groups: ordinary ones first, then one per routed layer.

A routed group holds ``params=[weight]`` or ``[weight, bias]`` and scalars only: the module's name, the LoRA ranks and
alphas, the ratio of the LoRA rate to ``lr`` and a seed for the LoRA start. So schedulers, checkpoints and sharding tools
can treat it like any other group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from molf.discovery import check_rank, routed_linears

__all__ = ["expert_names", "lora_scales", "param_groups"]


def expert_names(ranks: Sequence[int]) -> tuple[str, ...]:
    """Return the experts' names in routing order: ``fft``, then ``lora_r{rank}`` as given."""
    return ("fft", *(f"lora_r{r}" for r in ranks))


def lora_scales(group: dict[str, Any]) -> tuple[float, ...]:
    """Return the scale ``s`` of every LoRA expert of a group: ``alpha / sqrt(r)`` rank-stabilised, else ``alpha / r``."""
    power = 0.5 if group["use_rslora"] else 1.0
    return tuple(alpha / r**power for alpha, r in zip(group["lora_alpha"], group["ranks"], strict=True))


def param_groups(
    model: nn.Module,
    *,
    ranks: Sequence[int] | None = None,
    lr: float | torch.Tensor = 5e-5,
    lora_lr: float | None = None,
    weight_decay: float = 0.1,
    lora_weight_decay: float = 0.01,
    lora_alpha: float | Sequence[float] = 32.0,
    use_rslora: bool = True,
    target_modules: str | Sequence[str] = "all-linear",
    exclude_modules: str | Sequence[str] = ("lm_head",),
) -> list[dict[str, Any]]:
    """Build the parameter groups of a plain model for ``MoLF`` (merged form).

    Every trainable parameter lands in exactly one group. Linear layers that are targeted and whose weight requires a
    gradient get a group each; the rest goes to two ordinary AdamW groups, matrices with decay and vectors (norms, biases)
    without. The LoRA start depends on torch's seed and the module order only; no random number is drawn here.

    Args:
        model: Any module; wrappers of torch.compile and DDP are looked through.
        ranks: Rank of each LoRA expert beside ``fft``; None means ``(128,)``, ``()`` means none.
        lr: Learning rate of ``fft`` experts and of everything that is not routed.
        lora_lr: Learning rate of the LoRA experts, None for ``lr``. Kept as a ratio to ``lr``, so it follows its schedule.
        weight_decay: Decoupled decay of ``fft`` weights and ordinary matrices.
        lora_weight_decay: Decoupled decay of A and B.
        lora_alpha: LoRA's alpha, one for all or one per rank.
        use_rslora: Scale by ``alpha / sqrt(r)`` instead of ``alpha / r``.
        target_modules: ``"all-linear"``, a regular expression for the whole module name, or names or their last parts.
        exclude_modules: Modules never routed, in the same notation. "all-linear" leaves out the output embedding too.

    Raises:
        ValueError: If nothing matches, a rank is too large, a weight is tied, of the wrong shape or dtype, and the like.
        TypeError: If ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"param_groups needs the model (an nn.Module), got {type(model).__name__}")
    if isinstance(ranks, int | str):
        raise TypeError(f"ranks={ranks!r}: give one rank per LoRA expert, for example ranks=(128,)")
    ranks = (128,) if ranks is None else tuple(ranks)
    alphas = tuple(map(float, lora_alpha)) if isinstance(lora_alpha, Sequence) else (float(lora_alpha),) * len(ranks)
    _check_numbers(ranks, alphas, float(lr), lora_lr, weight_decay, lora_weight_decay)
    _refuse_adapters(model, ranks)
    linears = routed_linears(model, target_modules, exclude_modules)
    for name, linear in sorted(linears.items(), key=lambda item: max(item[1].weight.shape)):
        check_rank(name, linear, ranks)

    routed = {id(p) for linear in linears.values() for p in linear.parameters(recurse=False)}
    rest = [(n, p) for n, p in model.named_parameters() if p.requires_grad and id(p) not in routed]
    for name, p in model.named_parameters():
        if p.requires_grad:
            _check_parameter(name, p)
    ordinary = [
        {"params": [p for _, p in rest if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for _, p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    seed = torch.initial_seed() * 1_000_003
    groups: list[dict[str, Any]] = [group for group in ordinary if group["params"]]
    groups += [
        {
            "params": [p for p in (linear.weight, linear.bias) if p is not None and p.requires_grad],
            "weight_decay": weight_decay,
            "module": name,
            "ranks": ranks,
            "lora_alpha": alphas,
            "use_rslora": use_rslora,
            "lora_lr_ratio": 1.0 if lora_lr is None or lora_lr == float(lr) else lora_lr / float(lr),
            "lora_weight_decay": lora_weight_decay,
            "lora_seed": (seed + i) % 2**63,
        }
        for i, (name, linear) in enumerate(linears.items())
    ]
    for group in groups:
        group["lr"] = lr.clone() if isinstance(lr, torch.Tensor) else lr
    _check_coverage(model, groups)
    return groups


def _refuse_adapters(model: nn.Module, ranks: tuple[int, ...]) -> None:
    adapted = [n for n, m in model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]
    if hasattr(model, "peft_config") or adapted:
        where = f" (for example {adapted[0]})" if adapted else ""
        raise ValueError(
            f"the model already carries PEFT adapters{where}, and ranks={ranks} asks for LoRA experts inside the optimizer: "
            "one or the other. Call merge_and_unload() on it first, or build MoLF from the model before PEFT wraps it"
        )


def _check_parameter(name: str, p: torch.Tensor) -> None:
    if p.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        raise ValueError(f"{name} is {p.dtype}: train float32 weights (with autocast), or bfloat16 or float64 ones")
    if not p.is_contiguous():
        raise ValueError(f"{name} is not contiguous in memory: replace it by its .contiguous() copy")


def _check_numbers(
    ranks: tuple[int, ...],
    alphas: tuple[float, ...],
    lr: float,
    lora_lr: float | None,
    weight_decay: float,
    lora_weight_decay: float,
) -> None:
    if any(isinstance(r, bool) or not isinstance(r, int) or r < 1 for r in ranks):
        raise ValueError(f"ranks={ranks}: every rank must be a positive integer")
    if len(set(ranks)) < len(ranks):
        raise ValueError(f"ranks={ranks}: experts are told apart by their rank, so each may occur once")
    if len(alphas) != len(ranks):
        raise ValueError(f"lora_alpha={alphas}: give one number, or one for each of ranks={ranks}")
    numbers = {"lr": lr, "weight_decay": weight_decay, "lora_weight_decay": lora_weight_decay}
    numbers |= {} if lora_lr is None else {"lora_lr": lora_lr}
    for key, value in [*numbers.items(), *(("lora_alpha", alpha) for alpha in alphas)]:
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{key}={value}: must be a finite number, 0 or more")
    if lora_lr is not None and lora_lr != lr and lr == 0:
        raise ValueError(f"lr=0 with lora_lr={lora_lr}: LoRA's rate follows lr as a ratio, so lr must be above 0")


def _check_coverage(model: nn.Module, groups: list[dict[str, Any]]) -> None:
    counts: dict[int, int] = {}
    for group in groups:
        for p in group["params"]:
            counts[id(p)] = counts.get(id(p), 0) + 1
    wrong = [n for n, p in model.named_parameters() if p.requires_grad and counts.get(id(p)) != 1]
    assert not wrong, f"every trainable parameter must be in exactly one group, but {wrong} are not"
