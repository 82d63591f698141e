"""A static allocation in training: whole layers and LoRA side by side, with AdamW at a rate for each."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from molf.errors import MolfError
from molf.study.methods.trainable import is_adapter


class StaticFactory:
    """Builds AdamW for whole layers and adapters, each with its rate and decay; biases are not decayed."""

    def __call__(self, model: nn.Module, **options: Any) -> torch.optim.Optimizer:
        """Build the optimizer of a model.

        Args:
            model: The model; what trains is found by ``requires_grad``.
            **options: ``lr``, ``weight_decay``, ``lora_lr``, ``lora_weight_decay``, and more arguments of ``torch.optim.AdamW``.
        """
        lr, decay = options.pop("lr"), options.pop("weight_decay")
        lora_lr, lora_decay = options.pop("lora_lr"), options.pop("lora_weight_decay")
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        lora = [p for name, p in trained.items() if is_adapter(name)]
        biases = [p for name, p in trained.items() if not is_adapter(name) and name.endswith("bias")]
        weights = [p for name, p in trained.items() if not is_adapter(name) and not name.endswith("bias")]
        groups = [
            {"params": weights, "lr": lr, "weight_decay": decay},
            {"params": biases, "lr": lr, "weight_decay": 0.0},
            {"params": lora, "lr": lora_lr, "weight_decay": lora_decay},
        ]
        return torch.optim.AdamW([group for group in groups if group["params"]], **options)


def parameters_of(model: nn.Module, names: Sequence[str]) -> dict[str, list[nn.Parameter]]:
    """Return the parameters of layers, or of stacks of experts, by name.

    Raises:
        MolfError: The model lacks one.
    """
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    if missing := [name for name in names if name not in modules and name not in parameters]:
        raise MolfError(
            f"the recipe names {missing[0]}, which this model does not have ({len(missing)} of {len(names)} names): make a "
            "recipe from a run of this model"
        )
    return {
        name: list(modules[name].parameters(recurse=False)) if name in modules else [parameters[name]] for name in names
    }


def train_only(model: nn.Module, layers: Mapping[str, list[nn.Parameter]]) -> None:
    """Freeze a model but for some layers."""
    chosen = {id(p) for own in layers.values() for p in own}
    for p in model.parameters():
        p.requires_grad_(id(p) in chosen)
