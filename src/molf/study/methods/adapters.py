"""PEFT adapters on the model, as a recipe asks for them."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from molf.integrations.lora_experts import add_lora_experts
from molf.integrations.trainer import MoLFFactory
from molf.optimizer import MoLF
from molf.study.methods.eva import add_eva_adapter
from molf.study.methods.recipe import Recipe

ADAPTERS_FOLDER = "adapters"
"""Inside a run's folder: MoLF-Efficient's experts, a folder each, as PEFT saves several adapters."""


def add_adapters(model: Any, recipe: Recipe, freeze_rest: bool) -> Any:
    """Give a model the adapters of a recipe.

    Args:
        model: The plain model; it is changed in place.
        recipe: The method.
        freeze_rest: For MoLF's experts, whether all that is neither an expert nor adapted (norms, embeddings, biases) is
            frozen. The baselines always freeze it.

    Raises:
        ValueError: The model cannot have such adapters.
    """
    if recipe.experts is not None:
        return _add_experts(model, recipe.experts, freeze_rest)
    if recipe.adalora is not None:
        # The schedule is the trainer's: AdaLoraAllocation fills it in when training starts.
        return get_peft_model(model, AdaLoraConfig(**recipe.adalora, total_step=1))
    if recipe.lora is None:
        return model
    if recipe.lora.get("init_lora_weights") == "eva":
        return add_eva_adapter(model, recipe.lora)
    return get_peft_model(model, LoraConfig(**recipe.lora))


def _add_experts(model: nn.Module, arguments: dict[str, Any], freeze_rest: bool) -> PeftModel:
    trained = [p for p in model.parameters() if p.requires_grad]
    adapted = add_lora_experts(model, **arguments)
    layers = [module.get_base_layer() for module in adapted.modules() if hasattr(module, "lora_A")]
    weights = {id(layer.weight) for layer in layers}
    routed = {id(p) for layer in layers for p in layer.parameters(recurse=False)}
    for p in trained:
        if id(p) not in (weights if freeze_rest else routed):
            p.requires_grad_(not freeze_rest)
    return adapted


class ExpertsFactory(MoLFFactory):
    """Builds MoLF for a model with adapters as experts, all of them: a Trainer that resumes leaves only one active."""

    def __call__(self, model: nn.Module, **options: Any) -> MoLF:
        """Activate all adapters and build the optimizer."""
        adapted: Any = model
        adapted.base_model.set_adapter(list(adapted.peft_config))
        return super().__call__(model, **options)


class LoraPlusFactory:
    """Builds LoRA+ (Hayou et al. 2024), AdamW with a higher learning rate for B than for A, when the Trainer asks."""

    def __call__(self, model: nn.Module, **options: Any) -> torch.optim.Optimizer:
        """Build the optimizer of this model."""
        optimizer: torch.optim.Optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, **options)
        return optimizer


def optimizer_of(recipe: Recipe) -> tuple[type, dict[str, Any]] | None:
    """Return what ``Trainer(optimizer_cls_and_kwargs=...)`` takes, or None for the Trainer's own optimizer."""
    if recipe.molf is not None:
        return (MoLFFactory if recipe.merged else ExpertsFactory), recipe.molf
    if recipe.loraplus is not None:
        return LoraPlusFactory, recipe.loraplus
    return None


def save_adapters(model: PeftModel, folder: Path) -> None:
    """Save all adapters of a model, a folder each, whole or not at all.

    Args:
        model: The model, its adapters not merged.
        folder: Their parent, replaced if it is there.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial, save_embedding_layers=False)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)
