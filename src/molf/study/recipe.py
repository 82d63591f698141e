"""What each method means in terms of the libraries: trainer settings, MoLF's arguments, PEFT's LoRA settings."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from molf.study.config import MethodConfig

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a Llama-style block, which the published LoRA baseline adapts."""

MOLF_ALPHA = 32.0
LORA_DROPOUT = 0.05


@dataclass(frozen=True)
class Recipe:
    """A method, spelt out for the libraries that carry it out.

    Attributes:
        train: Trainer settings that the method changes.
        molf: Arguments of ``MoLF``, or None for the baselines.
        lora: Arguments of ``peft.LoraConfig``, or None where no adapter is trained.
    """

    train: dict[str, Any]
    molf: dict[str, Any] | None = None
    lora: dict[str, Any] | None = None


def method_recipe(method: MethodConfig, train: Mapping[str, Any], modules: Collection[str]) -> Recipe:
    """Spell a method out.

    Args:
        method: The method and its settings.
        train: The trainer's settings, with ``learning_rate``, ``weight_decay`` and ``max_grad_norm`` among them.
        modules: Names of the model's linear layers; they decide what LoRA adapts by default.

    Raises:
        ValueError: The settings ask for what the method cannot do.
    """
    if method.method == "molf":
        return _molf(method, train)
    if method.method == "lora":
        return _lora(method, train, modules)
    return Recipe(train={})


def _lora_rate(method: MethodConfig, train: Mapping[str, Any]) -> float:
    rate = train["learning_rate"] if method.lora_learning_rate is None else method.lora_learning_rate
    return float(rate)


def _targets(method: MethodConfig) -> str | list[str]:
    return "all-linear" if method.target_modules == ["all-linear"] else list(method.target_modules)


def _molf(method: MethodConfig, train: Mapping[str, Any]) -> Recipe:
    if method.lora_dropout:
        raise ValueError(
            f"lora_dropout={method.lora_dropout} with method molf needs LoRA branches in the forward pass, which are "
            "not available yet; leave lora_dropout out (MoLF trains without dropout) or use --method lora"
        )
    if not method.fft_expert:
        raise ValueError(
            "fft_expert=False (molf_fft False, LoRA experts on a frozen base) is not available yet; "
            "leave it out to route between full fine-tuning and LoRA, or use --method lora for a frozen base"
        )
    # MoLF clips the gradients of all experts inside its step; the trainer sees those of the model only and must not.
    return Recipe(
        train={"max_grad_norm": 0.0},
        molf={
            "ranks": tuple(method.ranks),
            "lr": float(train["learning_rate"]),
            "lora_lr": _lora_rate(method, train),
            "weight_decay": float(train["weight_decay"]),
            "lora_weight_decay": method.lora_weight_decay,
            "betas": (float(train.get("adam_beta1", 0.9)), float(train.get("adam_beta2", 0.999))),
            "eps": float(train.get("adam_epsilon", 1e-8)),
            "lora_alpha": MOLF_ALPHA if method.lora_alpha is None else method.lora_alpha,
            "use_rslora": method.use_rslora,
            "top_k": method.top_k,
            "score": method.score,
            "target_modules": _targets(method),
            "exclude_modules": tuple(method.exclude_modules),
            "max_grad_norm": float(train["max_grad_norm"]) if train["max_grad_norm"] else None,
            "bf16_update": method.bf16_update,
        },
    )


def _lora(method: MethodConfig, train: Mapping[str, Any], modules: Collection[str]) -> Recipe:
    targets = _targets(method)
    if targets == "all-linear" and set(PROJECTIONS) <= {name.rpartition(".")[2] for name in modules}:
        targets = list(PROJECTIONS)
    return Recipe(
        train={"learning_rate": _lora_rate(method, train), "weight_decay": method.lora_weight_decay},
        lora={
            "r": method.lora_rank,
            "lora_alpha": lora_alpha(method.lora_rank, method.use_rslora)
            if method.lora_alpha is None
            else method.lora_alpha,
            "lora_dropout": LORA_DROPOUT if method.lora_dropout is None else method.lora_dropout,
            "use_rslora": method.use_rslora,
            "target_modules": targets,
            "exclude_modules": list(method.exclude_modules),
            "bias": "none",
            "task_type": "CAUSAL_LM",
        },
    )


def lora_alpha(rank: int, use_rslora: bool) -> float:
    """Return the alpha of the LoRA baseline, which makes its scale 2 at every rank.

    Args:
        rank: Rank r of the adapter.
        use_rslora: Whether the scale is alpha / sqrt(r) instead of alpha / r.
    """
    return 2 * math.sqrt(rank) if use_rslora else 2.0 * rank
