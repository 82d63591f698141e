"""What of a model is an adapter, what MoLF routes, and what is trained."""

from collections.abc import Sequence

from torch import Tensor, nn

from molf.setup.discovery import routed_linears
from molf.study.config.method_config import MethodConfig


def is_adapter(name: str) -> bool:
    """Tell a parameter of PEFT's from the model's own; AdaLoRA's rank count is one that does not train."""
    return ".lora_" in name or ".ranknum." in name


def trained_base(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights that are trained and belong to no adapter, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad and not is_adapter(name)}


def routed_layers(model: nn.Module, method: MethodConfig) -> dict[str, nn.Linear]:
    """Return the layers that MoLF routes, by name."""
    targets: str | Sequence[str] = method.target_modules
    return routed_linears(
        model, "all-linear" if method.target_modules == ["all-linear"] else targets, method.exclude_modules
    )


def freeze_all_but_routed(model: nn.Module, method: MethodConfig) -> None:
    """Leave nothing trainable but the weights of the routed layers: no norm, no embedding, no bias."""
    routed = {id(layer.weight) for layer in routed_layers(model, method).values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in routed)
