"""Which parameters are adapters, which layers MoLF routes, and which parameters train."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from molf.setup.parameters import RoutedParameter, routed_weights
from molf.study.config.method_config import MethodConfig


def is_adapter(name: str) -> bool:
    """Tell a parameter of PEFT's from the base model's by its name; AdaLoRA's rank counter is one that never trains."""
    return ".lora_" in name or ".ranknum." in name


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that train, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def trained_base(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the base model's parameters that train, by name."""
    return {name: p for name, p in trained(model).items() if not is_adapter(name)}


def rounded_steps(model: nn.Module) -> list[str]:
    """Say that AdamW loses small steps of bfloat16 weights, which MoLF keeps, if the model trains any."""
    if not any(p.dtype == torch.bfloat16 for p in trained(model).values()):
        return []
    return [
        "the weights that train are bfloat16, and AdamW rounds every step to their 8 significant bits, so most small steps are "
        "lost: use --dtype float32 (with --bf16 True), or --method molf, whose --ranks [] is AdamW that keeps the low bits"
    ]


def target_modules(method: MethodConfig) -> str | Sequence[str]:
    """Return the target modules in the notation of ``MoLF`` and PEFT."""
    return "all-linear" if method.target_modules == ["all-linear"] else method.target_modules


def routed_layers(model: nn.Module, method: MethodConfig) -> dict[str, RoutedParameter]:
    """Return what MoLF routes, by name."""
    return routed_weights(model, target_modules(method), method.exclude_modules, method.target_parameters)


def freeze_all_but_routed(model: nn.Module, method: MethodConfig) -> None:
    """Freeze everything but the weights that are routed: norms, embeddings and biases."""
    routed = {id(own.weight) for own in routed_layers(model, method).values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in routed)


def lora_pairs(model: nn.Module, method: MethodConfig) -> int:
    """Return the elements of the LoRA pairs in MoLF's optimizer: the sum of ``r (in + out)`` over matrices and ranks."""
    shapes = [own.weight.shape for own in routed_layers(model, method).values()]
    return sum(math.prod(shape[:-2]) * sum(shape[-2:]) for shape in shapes) * sum(method.ranks or ())
