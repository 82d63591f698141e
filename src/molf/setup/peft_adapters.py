"""Find the experts of a PEFT model: its LoRA adapters. PEFT's layers are recognised by their attributes, without importing it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from molf.errors import MolfError
from molf.layers.fit import check_not_split
from molf.setup.discovery import check_not_tied, module_names, unwrapped

__all__ = ["adapted_groups", "base_parameters", "is_adapted", "target_name"]


logger = logging.getLogger(__name__)


def is_adapted(model: nn.Module) -> bool:
    """Return whether the model has PEFT adapters."""
    return any(hasattr(module, "peft_config") or _is_lora(module) for module in model.modules())


def adapted_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return one group, without learning rates, for every layer with active adapters.

    ``params`` are weight and bias of the base where its weight trains (the ``fft`` expert), then A and B of each active adapter.
    Whatever else PEFT trains is ordinary: biases of frozen weights and of B, ``modules_to_save`` (heads of classifiers too),
    ``trainable_token_indices`` and LoRA on embeddings.

    Raises:
        MolfError: If the adapters are not LoRA on linear layers, can't be told apart by rank, or differ between layers.
    """
    for adapter, config in getattr(unwrapped(model), "peft_config", {}).items():
        if getattr(config, "target_modules_to_tie", None):
            raise MolfError(
                f"the adapter {adapter!r} ties LoRA of the embedding to that of the output (ensure_weight_tying), which would "
                "move twice: leave ensure_weight_tying out, or take both out of target_modules"
            )
    modules = module_names(model)
    layers: dict[str, Any] = {target_name(name, module): module for name, module in modules.items() if _is_lora(module)}
    groups = [group for name, layer in layers.items() if (group := _group(name, layer)) is not None]
    if not groups:
        raise MolfError(
            "the model carries PEFT adapters, but none is active, trains, and is LoRA on a linear layer: make one per rank with "
            "molf.add_lora_experts(model, ranks=(32, 128)), or activate yours with base_model.set_adapter([...])"
        )
    _warn_of_idle(layers.values(), groups)
    different = [group for group in groups if group["experts"] != groups[0]["experts"]]
    if different:
        raise MolfError(
            f"all layers must have the same experts, but {groups[0]['module']} has {groups[0]['experts']} and "
            f"{different[0]['module']} has {different[0]['experts']}"
        )
    bases = {group["module"]: base_parameters(layers[group["module"]]) for group in groups if "fft" in group["experts"]}
    check_not_tied(modules, bases)
    return groups


def _warn_of_idle(layers: Iterable[Any], groups: Sequence[dict[str, Any]]) -> None:
    """Warn of adapters that will not train beside those that do: PEFT's loading leaves one active."""
    own = {id(p) for group in groups for p in group["params"]}
    idle = {name for layer in layers for name, A in layer.lora_A.items() if id(A.weight) not in own}
    if idle:
        logger.warning(
            "The adapters %s are no experts: they are not active, or frozen. If they should be, activate all before making the "
            "optimizer: model.base_model.set_adapter([...])",
            ", ".join(sorted(idle)),
        )


def _is_lora(module: nn.Module) -> bool:
    return hasattr(module, "lora_A") and hasattr(module, "lora_B") and hasattr(module, "base_layer")


def base_parameters(layer: Any) -> list[nn.Parameter]:
    """Return what a LoRA layer adapts: weight and bias of its base layer, or the stacked tensor that it was made for."""
    base, key = layer.get_base_layer(), getattr(layer, "parameter_name", "weight")
    # Some quantised layers have no weight.
    found = [getattr(base, key, None), getattr(base, "bias", None) if key == "weight" else None]
    return [p for p in found if p is not None]


def target_name(name: str, layer: Any) -> str:
    """Return the name of what a LoRA layer adapts: PEFT wraps a module once for each adapted parameter."""
    key = getattr(layer, "parameter_name", "weight")
    return re.sub(r"(\.base_layer)+$", "", name) + ("" if key == "weight" else f".{key}")


def _group(name: str, layer: Any) -> dict[str, Any] | None:
    if not isinstance(layer.lora_A, nn.ModuleDict):
        raise MolfError(f"{name} has adapters of another kind ({type(layer).__name__}): experts are plain LoRA")
    adapters = [a for a in layer.active_adapters if a in layer.lora_A and layer.lora_A[a].weight.requires_grad]
    if not adapters:
        return None
    if variants := [layer.lora_variant[a] for a in adapters if a in layer.lora_variant]:
        raise MolfError(
            f"{name} has LoRA adapters of another kind ({type(variants[0]).__name__}): experts are plain LoRA; turn use_dora and "
            "the like off"
        )
    pairs = [(layer.lora_A[a].weight, layer.lora_B[a].weight) for a in adapters]
    own: list[Any] = [p for pair in pairs for p in pair]
    for p in own:
        check_not_split(name, p)
    if any(p.ndim != 2 for p in own):
        raise MolfError(
            f"{name} is no linear layer ({type(layer.get_base_layer()).__name__}): only those can be routed; leave it out of the "
            "adapters' target_modules"
        )
    ranks = tuple(layer.r[a] for a in adapters)
    if len(set(ranks)) < len(ranks):
        raise MolfError(f"the adapters {adapters} of {name} have ranks {ranks}: experts are told apart by their rank")
    base = base_parameters(layer)
    trained = [p for p in base if p.requires_grad] if base and base[0].requires_grad else []  # fft needs the weight
    return {
        "params": [*trained, *own],
        "module": name,
        "form": "branched",
        "experts": (*(("fft",) if trained else ()), *(f"lora_r{r}" for r in ranks)),
        "ranks": ranks,
        "scales": tuple(float(layer.scaling[a]) for a in adapters),
    }
