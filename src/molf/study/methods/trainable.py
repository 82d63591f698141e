"""Which parameters are adapters, which layers MoLF routes, and which parameters train."""

from collections.abc import Sequence

from torch import nn

from molf.setup.discovery import routed_linears
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


def target_modules(method: MethodConfig) -> str | Sequence[str]:
    """Return the target modules in the notation of ``MoLF`` and PEFT."""
    return "all-linear" if method.target_modules == ["all-linear"] else method.target_modules


def routed_layers(model: nn.Module, method: MethodConfig) -> dict[str, nn.Linear]:
    """Return the layers that MoLF routes, by name."""
    return routed_linears(model, target_modules(method), method.exclude_modules)


def freeze_all_but_routed(model: nn.Module, method: MethodConfig) -> None:
    """Freeze everything but the weights of the routed layers: norms, embeddings and biases."""
    routed = {id(layer.weight) for layer in routed_layers(model, method).values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in routed)


def lora_pairs(model: nn.Module, method: MethodConfig) -> int:
    """Return the elements of the LoRA pairs in MoLF's optimizer: the sum of ``r (in + out)`` over layers and ranks."""
    widths = [layer.in_features + layer.out_features for layer in routed_layers(model, method).values()]
    return sum(widths) * sum(method.ranks or ())
