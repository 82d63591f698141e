"""PEFT adapters of a recipe, and the optimizers that train them."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from molf.errors import MolfError
from molf.files import atomic_folder
from molf.integrations.lora_experts import add_lora_experts
from molf.integrations.lora_targets import find_targets
from molf.integrations.trainer import MoLFFactory
from molf.setup.param_groups import expert_names
from molf.setup.peft_adapters import base_parameters
from molf.study.methods.eva import add_eva_adapter
from molf.study.methods.recipe import Recipe
from molf.study.methods.static import StaticFactory, parameters_of, train_only

ADAPTERS_FOLDER = "adapters"
"""Folder of MoLF-Efficient's experts inside a run's folder, with a subfolder for each adapter as PEFT saves them."""


def add_adapters(model: Any, recipe: Recipe, freeze_rest: bool) -> Any:
    """Add the adapters of a recipe to a model, in place.

    With ``freeze_rest``, MoLF freezes everything that is not routed (norms, embeddings, biases), as PEFT's baselines always do.
    """
    try:
        return _add_adapters(model, recipe, freeze_rest)
    except ValueError as error:
        if isinstance(error, MolfError):
            raise
        given = recipe.experts or recipe.adalora or recipe.lora or {}
        raise MolfError(
            f"PEFT cannot add adapters with target_modules={given['target_modules']!r} and "
            f"exclude_modules={given['exclude_modules']!r} to this model: {error}"
        ) from error


def _add_adapters(model: Any, recipe: Recipe, freeze_rest: bool) -> Any:
    if recipe.experts is not None:
        return _add_experts(model, recipe.experts, freeze_rest)
    if recipe.adalora is not None:
        # AdaLoraAllocation sets the schedule when training starts.
        return get_peft_model(model, AdaLoraConfig(**_named_targets(model, recipe.adalora, stacks=False), total_step=1))
    if recipe.whole is not None:
        return _add_static(model, recipe.whole, recipe.lora)
    if recipe.lora is None:
        return model
    plain = not recipe.lora.get("use_dora") and recipe.lora.get("init_lora_weights", True) is True
    arguments = _named_targets(model, recipe.lora, stacks=plain and not recipe.lora["lora_dropout"])
    if recipe.lora.get("init_lora_weights") == "eva":
        return add_eva_adapter(model, arguments)
    return get_peft_model(model, LoraConfig(**arguments))


def _add_static(model: nn.Module, whole: Sequence[str], lora: dict[str, Any] | None) -> Any:
    parameters_of(model, lora["target_modules"] if lora else ())  # for its error
    layers = parameters_of(model, whole)
    train_only(model, layers)
    if lora is None:
        return model
    adapted = get_peft_model(model, LoraConfig(**lora))  # which freezes the rest
    for p in (p for own in layers.values() for p in own):
        p.requires_grad_()
    return adapted


def _named_targets(model: nn.Module, arguments: dict[str, Any], stacks: bool) -> dict[str, Any]:
    """Write out what "all-linear" adapts, the same for every method: PEFT refuses mixtures and state-space models there."""
    if arguments["target_modules"] != "all-linear":
        return arguments
    targets = find_targets(model, "all-linear", arguments["exclude_modules"], stacks=stacks)
    targets.log()
    parameters = {"target_parameters": targets.parameters} if targets.parameters else {}
    return {**arguments, **parameters, "target_modules": targets.modules, "exclude_modules": None}


def _add_experts(model: nn.Module, arguments: dict[str, Any], freeze_rest: bool) -> PeftModel:
    trained = [p for p in model.parameters() if p.requires_grad]
    adapted = add_lora_experts(model, **arguments)
    layers = [base_parameters(module) for module in adapted.modules() if hasattr(module, "lora_A")]
    weights = {id(weight) for weight, *_ in layers}
    routed = {id(p) for layer in layers for p in layer}
    for p in trained:
        if id(p) not in (weights if freeze_rest else routed):
            p.requires_grad_(not freeze_rest)
    return adapted


class LoraPlusFactory:
    """Builds LoRA+ (Hayou et al. 2024): AdamW with a higher learning rate for B than for A."""

    def __call__(self, model: nn.Module, **options: Any) -> torch.optim.Optimizer:
        """Build the optimizer of a model."""
        optimizer: torch.optim.Optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, **options)
        return optimizer


def optimizer_of(recipe: Recipe) -> tuple[type, dict[str, Any]] | None:
    """Return what ``Trainer(optimizer_cls_and_kwargs=...)`` takes, or None for the Trainer's own optimizer."""
    if recipe.molf is not None:
        # A Trainer that resumes leaves only one adapter active.
        adapters = () if recipe.experts is None else expert_names(recipe.experts["ranks"])[1:]
        return MoLFFactory, {**recipe.molf, "adapters": adapters}
    if recipe.static is not None:
        return StaticFactory, recipe.static
    return None if recipe.loraplus is None else (LoraPlusFactory, recipe.loraplus)


def save_adapters(model: PeftModel, folder: Path) -> None:
    """Save all adapters of a model, all or none."""
    with atomic_folder(folder) as partial:
        model.save_pretrained(partial, save_embedding_layers=False)
        shutil.rmtree(folder, ignore_errors=True)
