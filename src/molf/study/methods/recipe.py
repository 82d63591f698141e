"""Each method as settings of the libraries that run it: the Trainer, MoLF and PEFT."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molf.errors import MolfError
from molf.integrations.trainer import check_release_settings
from molf.study.config.fields import STATIC
from molf.study.config.method_config import MethodConfig
from molf.study.methods.recipe_file import SCALE as LORA_SCALE
from molf.study.methods.recipe_file import lora_arguments, read_recipe
from molf.study.methods.trainable import target_modules

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a Llama block, which the published LoRA baseline adapts."""

MOLF_ALPHA = 32.0
LORA_DROPOUT = 0.05
ADALORA_START = 1.5
"""AdaLoRA starts at this multiple of its final mean rank, as published."""

# What sets a variant apart from plain LoRA. PiSSA's adapter starts as the largest singular directions of the weight: dropout
# would remove some of them at random, and any scale but 1 would change the weight.
_VARIANTS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "eva": {"init_lora_weights": "eva"},
}


@dataclass(frozen=True)
class Recipe:
    """A method as settings of the libraries that run it.

    Attributes:
        train: Trainer settings that the method overrides.
        molf: Arguments of ``MoLF``; None for the baselines.
        experts: Arguments of ``add_lora_experts`` if MoLF's experts are PEFT adapters (branched form), else None.
        lora: Arguments of ``peft.LoraConfig``, or None.
        adalora: Arguments of ``peft.AdaLoraConfig`` without its schedule, or None.
        loraplus: Arguments of LoRA+'s optimizer, or None.
        static: Arguments of ``StaticFactory``, or None.
        whole: Layers that train whole beside the adapters, while all others are frozen; None if the method has no such list.
    """

    train: dict[str, Any]
    molf: dict[str, Any] | None = None
    experts: dict[str, Any] | None = None
    lora: dict[str, Any] | None = None
    adalora: dict[str, Any] | None = None
    loraplus: dict[str, Any] | None = None
    static: dict[str, Any] | None = None
    whole: tuple[str, ...] | None = None

    @property
    def merged(self) -> bool:
        """Whether the LoRA experts live in MoLF's state and the model's weights are the effective ones."""
        return self.molf is not None and self.experts is None

    @property
    def adapted(self) -> bool:
        """Whether the model trains PEFT adapters."""
        return any(arguments is not None for arguments in (self.experts, self.lora, self.adalora))


def method_recipe(method: MethodConfig, train: Mapping[str, Any], modules: Collection[str]) -> Recipe:
    """Turn a method into settings of the libraries.

    Args:
        method: The method and its settings.
        train: The Trainer's settings, including ``learning_rate``, ``weight_decay`` and ``max_grad_norm``.
        modules: Names of the model's linear layers; they decide what the PEFT baselines adapt by default.
    """
    if method.method == "fft":
        return Recipe(train={})
    rate = train["learning_rate"] if method.lora_learning_rate is None else method.lora_learning_rate
    adam = {
        "betas": (float(train.get("adam_beta1", 0.9)), float(train.get("adam_beta2", 0.999))),
        "eps": float(train.get("adam_epsilon", 1e-8)),
    }
    if method.routes:
        return _molf_recipe(method, train, adam, lora_lr=float(rate))
    if method.method == STATIC:
        return _static_recipe(method, train, adam, lora_lr=float(rate))
    rates = {"learning_rate": float(rate), "weight_decay": method.lora_weight_decay}
    if method.method == "adalora":
        return Recipe(train=rates, adalora=_adalora_arguments(method, train, modules))
    lora = _lora_arguments(method, modules)
    if method.method != "lora_plus":
        return Recipe(train=rates, lora=lora)
    loraplus = {"loraplus_lr_ratio": method.loraplus_lr_ratio, "loraplus_weight_decay": method.lora_weight_decay}
    return Recipe(train=rates, lora=lora, loraplus={"lr": float(rate), **loraplus, **adam})


def _molf_recipe(method: MethodConfig, train: Mapping[str, Any], adam: dict[str, Any], lora_lr: float) -> Recipe:
    """Use the merged form if the base trains without dropout, else PEFT adapters as experts (branched form)."""
    if method.optimizer_in_backward:
        check_release_settings(train)
    optimizer = {
        "lr": float(train["learning_rate"]),
        "lora_lr": "matched" if method.match_lora_rate else lora_lr,
        "weight_decay": float(train["weight_decay"]),
        **adam,
        "max_grad_norm": float(train["max_grad_norm"]) if train["max_grad_norm"] else None,
        **{name: getattr(method, name) for name in _MOLF_OPTIONS},
    }
    experts = {
        "ranks": tuple(method.ranks or ()),
        "lora_alpha": MOLF_ALPHA if method.lora_alpha is None else method.lora_alpha,
        "use_rslora": method.use_rslora,
        "target_modules": target_modules(method),
        "exclude_modules": tuple(method.exclude_modules),
    }
    settings = {"max_grad_norm": 0.0}  # MoLF clips all experts' gradients itself; the Trainer sees only the model's
    frozen, dropout = method.method == "molf_e", method.lora_dropout or 0.0
    if not frozen and not dropout:
        experts["target_parameters"] = tuple(method.target_parameters)
        return Recipe(train=settings, molf=optimizer | experts)
    if method.target_parameters:
        raise MolfError(
            f"target_parameters={method.target_parameters} with experts as adapters (a frozen base, or lora_dropout > 0): "
            "adapters are for linear layers; leave one of them out"
        )
    return Recipe(train=settings, molf=optimizer, experts={**experts, "lora_dropout": dropout, "freeze_base": frozen})


def _static_recipe(method: MethodConfig, train: Mapping[str, Any], adam: dict[str, Any], lora_lr: float) -> Recipe:
    if method.allocation is None:
        raise MolfError("method static needs to know what trains: give --recipe FILE, which `molf recipe` writes")
    found = read_recipe(Path(method.allocation))
    dropout = LORA_DROPOUT if method.lora_dropout is None else method.lora_dropout
    optimizer = {"lr": float(train["learning_rate"]), "weight_decay": float(train["weight_decay"])}
    optimizer |= {"lora_lr": lora_lr, "lora_weight_decay": method.lora_weight_decay}
    lora = lora_arguments(found.ranks, dropout) if found.ranks else None
    return Recipe(train={}, lora=lora, static=optimizer | adam, whole=tuple(found.whole))


_MOLF_OPTIONS = ("lora_weight_decay", "top_k", "score", "optim_bits", "bf16_update", "optimizer_in_backward", "fused")


def _lora_arguments(method: MethodConfig, modules: Collection[str]) -> dict[str, Any]:
    pissa = method.method == "pissa"
    scale = 1.0 if pissa else LORA_SCALE
    growth = math.sqrt(method.lora_rank) if method.use_rslora else method.lora_rank
    return {
        "r": method.lora_rank,
        "use_rslora": bool(method.use_rslora),
        "lora_alpha": scale * growth if method.lora_alpha is None else method.lora_alpha,
        **_adapter_arguments(method, modules, 0.0 if pissa else LORA_DROPOUT),
        **_VARIANTS.get(method.method, {}),
    }


def _adalora_arguments(method: MethodConfig, train: Mapping[str, Any], modules: Collection[str]) -> dict[str, Any]:
    if train.get("fp16"):
        raise MolfError(
            "fp16 with method adalora: AdaLoRA allocates ranks by gradients, which fp16 scales; use bf16 instead"
        )
    start = math.ceil(ADALORA_START * method.lora_rank)
    return {
        "init_r": start,
        "target_r": method.lora_rank,
        "lora_alpha": LORA_SCALE * start if method.lora_alpha is None else method.lora_alpha,
        "orth_reg_weight": 0.0,  # AdaLoraAllocation adds the term: TRL does not use the loss that PEFT adds it to
        **_adapter_arguments(method, modules, LORA_DROPOUT),
    }


def _adapter_arguments(method: MethodConfig, modules: Collection[str], dropout: float) -> dict[str, Any]:
    targets = target_modules(method)
    if targets == "all-linear" and set(PROJECTIONS) <= {name.rpartition(".")[2] for name in modules}:
        targets = list(PROJECTIONS)
    return {
        "lora_dropout": dropout if method.lora_dropout is None else method.lora_dropout,
        "target_modules": targets,
        "exclude_modules": list(method.exclude_modules),
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
