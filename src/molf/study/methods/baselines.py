"""The adapter baselines in PEFT's terms: LoRA and its kind, and AdaLoRA."""

import math
from collections.abc import Collection, Mapping
from typing import Any

from molf.study.config.method_config import MethodConfig

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a Llama-style block, which the published LoRA baseline adapts."""

LORA_DROPOUT = 0.05
ADALORA_START = 1.5
"""AdaLoRA starts with this many times the rank that it ends with on average, as its authors do."""


def lora_arguments(method: MethodConfig, modules: Collection[str]) -> dict[str, Any]:
    """Return the arguments of ``peft.LoraConfig`` for lora, rslora, dora, pissa, eva and lora_plus.

    PiSSA's adapter starts as the largest singular parts of the weight, so by default it has no dropout, which would take
    these away at random, and scale 1, as published. EVA's start is computed from training data later.

    Args:
        method: The method and its settings.
        modules: Names of the model's linear layers.
    """
    rank, use_rslora = method.lora_rank, bool(method.use_rslora)
    pissa = method.method == "pissa"
    scale = 1.0 if pissa else 2.0
    return {
        "r": rank,
        "lora_alpha": lora_alpha(rank, use_rslora, scale) if method.lora_alpha is None else method.lora_alpha,
        "use_rslora": use_rslora,
        **_common(method, modules, 0.0 if pissa else LORA_DROPOUT),
        **_VARIANTS.get(method.method, {}),
    }


_VARIANTS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "eva": {"init_lora_weights": "eva"},
}


def adalora_arguments(method: MethodConfig, train: Mapping[str, Any], modules: Collection[str]) -> dict[str, Any]:
    """Return the arguments of ``peft.AdaLoraConfig`` but those of its schedule, which follow the trainer's.

    The ranks start at 1.5 times ``lora_rank`` and are cut to ``lora_rank`` on average. Its orthogonality is left to
    ``AdaLoraAllocation``, since a trainer may take its loss from elsewhere than PEFT's forward pass, and TRL's does.

    Args:
        method: The method and its settings.
        train: The trainer's settings.
        modules: Names of the model's linear layers.

    Raises:
        ValueError: The trainer's settings ask for what AdaLoRA cannot do.
    """
    if train.get("fp16"):
        raise ValueError("fp16 with method adalora: its gradients are scaled where the ranks are decided; use bf16")
    start = math.ceil(ADALORA_START * method.lora_rank)
    return {
        "init_r": start,
        "target_r": method.lora_rank,
        "lora_alpha": lora_alpha(start, use_rslora=False) if method.lora_alpha is None else method.lora_alpha,
        "orth_reg_weight": 0.0,
        **_common(method, modules, LORA_DROPOUT),
    }


def lora_alpha(rank: int, use_rslora: bool, scale: float = 2.0) -> float:
    """Return the alpha that gives an adapter a certain scale at every rank; 2 is that of the published LoRA baseline.

    Args:
        rank: Rank r of the adapter.
        use_rslora: Whether the scale is alpha / sqrt(r) instead of alpha / r.
        scale: The scale.
    """
    return scale * (math.sqrt(rank) if use_rslora else rank)


def _common(method: MethodConfig, modules: Collection[str], dropout: float) -> dict[str, Any]:
    return {
        "lora_dropout": dropout if method.lora_dropout is None else method.lora_dropout,
        "target_modules": _targets(method, modules),
        "exclude_modules": list(method.exclude_modules),
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }


def _targets(method: MethodConfig, modules: Collection[str]) -> str | list[str]:
    if method.target_modules != ["all-linear"]:
        return list(method.target_modules)
    present = {name.rpartition(".")[2] for name in modules}
    return list(PROJECTIONS) if set(PROJECTIONS) <= present else "all-linear"
