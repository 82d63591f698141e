"""What each method means in terms of the libraries: trainer settings, MoLF's arguments, PEFT's settings."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from molf.integrations.release_settings import check_release_settings
from molf.study.config.method_config import MethodConfig
from molf.study.methods.baselines import adalora_arguments, lora_arguments

MOLF_ALPHA = 32.0


@dataclass(frozen=True)
class Recipe:
    """A method, spelt out for the libraries that carry it out.

    Attributes:
        train: Trainer settings that the method changes.
        molf: Arguments of ``MoLF``, or None for the baselines.
        experts: Arguments of ``add_lora_experts`` where MoLF's experts are PEFT adapters (branched form), else None.
        lora: Arguments of ``peft.LoraConfig``, or None where no such adapter is trained.
        adalora: Arguments of ``peft.AdaLoraConfig`` but its schedule, or None.
        loraplus: Arguments of LoRA+'s optimizer, or None.
    """

    train: dict[str, Any]
    molf: dict[str, Any] | None = None
    experts: dict[str, Any] | None = None
    lora: dict[str, Any] | None = None
    adalora: dict[str, Any] | None = None
    loraplus: dict[str, Any] | None = None

    @property
    def merged(self) -> bool:
        """Whether MoLF keeps its LoRA experts in the optimizer, and the model's weights are the effective ones."""
        return self.molf is not None and self.experts is None

    @property
    def adapted(self) -> bool:
        """Whether the model is trained with PEFT adapters."""
        return any(arguments is not None for arguments in (self.experts, self.lora, self.adalora))


def method_recipe(method: MethodConfig, train: Mapping[str, Any], modules: Collection[str]) -> Recipe:
    """Spell a method out.

    Args:
        method: The method and its settings.
        train: The trainer's settings, with ``learning_rate``, ``weight_decay`` and ``max_grad_norm`` among them.
        modules: Names of the model's linear layers; they decide what PEFT's baselines adapt by default.

    Raises:
        ValueError: The settings ask for what the method cannot do.
    """
    if method.method == "fft":
        return Recipe(train={})
    if method.routes:
        return _molf(method, train)
    rates = {"learning_rate": _lora_rate(method, train), "weight_decay": method.lora_weight_decay}
    if method.method == "adalora":
        return Recipe(train=rates, adalora=adalora_arguments(method, train, modules))
    lora = lora_arguments(method, modules)
    if method.method == "lora_plus":
        return Recipe(train=rates, lora=lora, loraplus=_loraplus(method, train))
    return Recipe(train=rates, lora=lora)


def _lora_rate(method: MethodConfig, train: Mapping[str, Any]) -> float:
    rate = train["learning_rate"] if method.lora_learning_rate is None else method.lora_learning_rate
    return float(rate)


def _adam(train: Mapping[str, Any]) -> dict[str, Any]:
    betas = (float(train.get("adam_beta1", 0.9)), float(train.get("adam_beta2", 0.999)))
    return {"betas": betas, "eps": float(train.get("adam_epsilon", 1e-8))}


def _molf(method: MethodConfig, train: Mapping[str, Any]) -> Recipe:
    """Spell MoLF out: merged where the base trains without dropout, else with PEFT adapters as experts (branched)."""
    if method.optimizer_in_backward:
        check_release_settings(train)
    optimizer = {
        "lr": float(train["learning_rate"]),
        "lora_lr": _lora_rate(method, train),
        "weight_decay": float(train["weight_decay"]),
        "lora_weight_decay": method.lora_weight_decay,
        **_adam(train),
        "top_k": method.top_k,
        "score": method.score,
        "max_grad_norm": float(train["max_grad_norm"]) if train["max_grad_norm"] else None,
        "optim_bits": method.optim_bits,
        "bf16_update": method.bf16_update,
        "optimizer_in_backward": method.optimizer_in_backward,
        "fused": method.fused,
    }
    experts = {
        "ranks": tuple(method.ranks or ()),
        "lora_alpha": MOLF_ALPHA if method.lora_alpha is None else method.lora_alpha,
        "use_rslora": method.use_rslora,
        "target_modules": "all-linear" if method.target_modules == ["all-linear"] else list(method.target_modules),
        "exclude_modules": tuple(method.exclude_modules),
    }
    # MoLF clips the gradients of all experts inside its step; the trainer sees those of the model only and must not.
    settings = {"max_grad_norm": 0.0}
    frozen, dropout = method.method == "molf_e", method.lora_dropout or 0.0
    if not frozen and not dropout:
        return Recipe(train=settings, molf=optimizer | experts)
    return Recipe(train=settings, molf=optimizer, experts={**experts, "lora_dropout": dropout, "freeze_base": frozen})


def _loraplus(method: MethodConfig, train: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "lr": _lora_rate(method, train),
        "loraplus_lr_ratio": method.loraplus_lr_ratio,
        "loraplus_weight_decay": method.lora_weight_decay,
        **_adam(train),
    }
