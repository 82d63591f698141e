"""LoRA experts as PEFT adapters: the branched form, and with a frozen base MoLF-Efficient."""

from __future__ import annotations

from collections.abc import Sequence

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from molf.integrations.joint_forward import join_experts
from molf.setup.param_groups import expert_names

__all__ = ["add_lora_experts"]


def add_lora_experts(
    model: nn.Module,
    ranks: Sequence[int] = (32, 128),
    *,
    lora_alpha: float | Sequence[float] = 32.0,
    lora_dropout: float = 0.0,
    use_rslora: bool = True,
    freeze_base: bool = True,
    target_modules: str | Sequence[str] = "all-linear",
    exclude_modules: str | Sequence[str] = ("lm_head",),
) -> PeftModel:
    """Give a model one PEFT LoRA adapter per rank, named ``lora_r{rank}``, all active together.

    ``molf.MoLF(model)`` then routes between them, and with ``freeze_base=False`` the base weight too. The model is PEFT's:
    it saves, loads, merges and takes quantised bases as always. In training all experts of a layer run in one pass
    (``JointLinear``), with one dropout mask.

    Args:
        model: A plain model; it is changed in place.
        ranks: Rank of each LoRA expert, different from each other.
        lora_alpha: LoRA's alpha, one for all or one per rank.
        lora_dropout: Dropout before each A, in [0, 1).
        use_rslora: Scale by ``alpha / sqrt(r)`` instead of ``alpha / r``.
        freeze_base: Train the experts only (MoLF-Efficient); otherwise everything that trained before still does, and the
            adapted layers' own weights are the ``fft`` experts.
        target_modules: As in PEFT.
        exclude_modules: As in PEFT.

    Raises:
        ValueError: If the ranks are none, not positive or not different, or there are not as many alphas.
        TypeError: If the model is a PEFT model already.
    """
    if isinstance(model, PeftModel):
        raise TypeError(
            "the model is a PEFT model already: give the plain model, or add adapters with model.add_adapter"
        )
    ranks = tuple(ranks)
    alphas = tuple(lora_alpha) if isinstance(lora_alpha, Sequence) else (lora_alpha,) * len(ranks)
    if not ranks or len(set(ranks)) < len(ranks) or min(ranks) < 1:
        raise ValueError(f"ranks={ranks}: give one or more different positive ranks, one for each LoRA expert")
    if len(alphas) != len(ranks):
        raise ValueError(f"lora_alpha={alphas}: give one number, or one for each of ranks={ranks}")
    trained = [p for p in model.parameters() if p.requires_grad]
    names = expert_names(ranks)[1:]
    configs = [
        LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=lora_dropout,
            use_rslora=use_rslora,
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
            target_modules=_plain(target_modules),
            exclude_modules=_plain(exclude_modules),
            task_type="CAUSAL_LM" if hasattr(model, "get_output_embeddings") else None,
        )
        for rank, alpha in zip(ranks, alphas, strict=True)
    ]
    adapted = get_peft_model(model, configs[0], adapter_name=names[0])
    for name, config in zip(names[1:], configs[1:], strict=True):
        adapted.add_adapter(name, config)
    adapted.base_model.set_adapter(list(names))
    join_experts(adapted)
    if not freeze_base:
        for p in trained:
            p.requires_grad_(True)
    return adapted


def _plain(patterns: str | Sequence[str]) -> str | list[str]:
    return patterns if isinstance(patterns, str) else list(patterns)
