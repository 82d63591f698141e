"""LoRA experts exported for other programs: as one plain PEFT adapter, or as a merged checkpoint."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn

from molf.errors import MolfError
from molf.files import atomic_folder
from molf.integrations.lora_experts import trained_adapters, unsaved_parameters
from molf.integrations.merge import cast_error, merge
from molf.setup.discovery import module_names, unwrapped
from molf.setup.peft_adapters import target_name

Pair: TypeAlias = tuple[Tensor, Tensor]

_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Values of init_lora_weights that leave the base weights as they are.
_KEEP_BASE = (True, False, "gaussian", "orthogonal", "eva")


def concatenate_pairs(layer: LoraLayer, adapters: Sequence[str]) -> Pair:
    """Write the sum of a layer's LoRA pairs as one pair of scale 1: ``sum_i s_i B_i A_i = B A``.

    Returns:
        ``A = [A_1; A_2; ...] [sum r_i, in]`` and ``B = [s_1 B_1, s_2 B_2, ...] [out, sum r_i]``, in float32 on the CPU. For
        a stack of ``n`` matrices they are ``[n sum r_i, in]`` and ``[out, n sum r_i]``, as PEFT holds them.
    """
    own, n = [name for name in adapters if name in layer.lora_A], _stack_size(layer)
    # PEFT's order in a stack: A by matrix, then rank; B by rank, then matrix.
    downs = [layer.lora_A[name].weight.detach().float().unflatten(0, (n, -1)) for name in own]
    ups = [layer.scaling[name] * layer.lora_B[name].weight.detach().float().unflatten(1, (-1, n)) for name in own]
    down, up = torch.cat(downs, dim=1).flatten(0, 1), torch.cat(ups, dim=1).flatten(1, 2)
    return down.cpu().contiguous(), up.cpu().contiguous()


def _stack_size(layer: LoraLayer) -> int:
    """Return the number of matrices that a layer adapts: 1 unless they are stacked."""
    return getattr(layer, "num_experts", 1)


def export_peft(model: PeftModel, folder: str | Path) -> int:
    """Write all LoRA experts of a model, and what else is active, as one plain PEFT LoRA that computes the same.

    Its rank is the sum of the experts' ranks and its scale is 1, written as ``lora_alpha = r`` without rank stabilisation: some
    programs ignore ``use_rslora``. ``PeftModel.from_pretrained(base, folder)`` loads it.

    Args:
        model: A base model with LoRA adapters; not changed. DDP and ``torch.compile`` are taken off.
        folder: Where to write; it must be empty or not exist.

    Returns:
        The rank of the adapter (the largest one if layers differ).

    Raises:
        MolfError: One LoRA without bias cannot express the model's adapters, the base trains, too, or the folder is not empty.
        TypeError: The model is no ``PeftModel``.
    """
    model = unwrapped(model)
    if not isinstance(model, PeftModel):
        raise TypeError(
            f"export_peft takes a PeftModel, got {type(model).__name__}: save a plain model by model.save_pretrained(folder)"
        )
    adapters = trained_adapters(model)
    layers = _plain_lora_layers(model, adapters)
    pairs = {name: concatenate_pairs(layer, adapters) for name, layer in layers.items()}
    ranks = {name: len(down) // _stack_size(layers[name]) for name, (down, _) in pairs.items()}
    config = _one_adapter_config(model, model.peft_config[adapters[0]], layers, ranks)
    with whole_folder(folder) as partial:
        tensors = {
            f"base_model.model.{name}.lora_{letter}.weight": tensor
            for name, pair in pairs.items()
            for letter, tensor in zip("AB", pair, strict=True)
        }
        save_file(tensors, partial / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config.save_pretrained(partial)
    return max(ranks.values())


def vllm_max_lora_rank(rank: int) -> int | None:
    """Return the smallest ``max_lora_rank`` of vLLM that serves an adapter; None if all are below its rank."""
    return min((allowed for allowed in _VLLM_RANKS if allowed >= rank), default=None)


def export_merged(model: PeftModel, folder: str | Path, dtype: torch.dtype = torch.float32) -> float:
    """Merge all LoRA experts into the weights and write a plain ``transformers`` checkpoint.

    Args:
        model: A base model with LoRA adapters; do not use it afterwards.
        folder: Where to write; it must be empty or not exist.
        dtype: Type of the written weights, which are merged in float32 and cast once.

    Returns:
        The largest difference that the cast makes to a weight: 0 for float32.

    Raises:
        MolfError: The base is quantised, a merged weight is not finite, or the folder is not empty.
    """
    with whole_folder(folder) as partial:
        merged: Any = merge(model.float())
        lost = max((cast_error(p.detach(), dtype) for p in merged.parameters()), default=0.0)
        merged.to(dtype).save_pretrained(partial)
    return lost


@contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``folder``, empty or missing, at the end, or is removed after an error."""
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise MolfError(f"{target} exists and is not empty; choose another folder or remove it first")
    with atomic_folder(target) as partial:
        yield partial


def _one_adapter_config(
    model: PeftModel, first: LoraConfig, layers: dict[str, LoraLayer], ranks: dict[str, int]
) -> LoraConfig:
    common = Counter(ranks.values()).most_common(1)[0][0]
    names = {name: _peft_name(name, layer) for name, layer in layers.items()}
    others = {names[name]: rank for name, rank in ranks.items() if rank != common}
    stacks = [name for name, layer in layers.items() if hasattr(layer, "parameter_name")]
    return LoraConfig(
        r=common,
        lora_alpha=common,
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=_targets(model.get_base_model(), layers.keys() - stacks),
        target_parameters=[names[name] for name in stacks] or None,
        fan_in_fan_out=first.fan_in_fan_out,
        base_model_name_or_path=first.base_model_name_or_path,
        task_type=first.task_type,
        inference_mode=True,
    )


def _peft_name(name: str, layer: LoraLayer) -> str:
    """Return the name by which PEFT finds what a layer adapts: a module, or a parameter with its own last part."""
    return target_name(name, layer) + (".weight" if getattr(layer, "parameter_name", "") == "weight" else "")


def _targets(base: nn.Module, adapted: set[str]) -> list[str]:
    """Name the adapted layers by the last parts of their names if these match no other layer, else in full."""
    endings = {name.rpartition(".")[2] for name in adapted}
    matching = {name for name in module_names(base) if name.rpartition(".")[2] in endings}
    return sorted(endings) if matching == adapted else sorted(adapted)


def _plain_lora_layers(model: PeftModel, adapters: Sequence[str]) -> dict[str, LoraLayer]:
    """Return the layers that have one of the adapters, or raise an error if one plain LoRA cannot express them."""
    for name in adapters:
        config = model.peft_config[name]
        for what, found in (
            (f"a {config.peft_type} adapter", not isinstance(config, LoraConfig) or config.peft_type != "LORA"),
            ("modules_to_save", bool(getattr(config, "modules_to_save", None))),
            ("trainable_token_indices", bool(getattr(config, "trainable_token_indices", None))),
            ("trained biases", getattr(config, "bias", "none") != "none" or getattr(config, "lora_bias", False)),
            ("DoRA", getattr(config, "use_dora", False)),
            (
                f"init_lora_weights={getattr(config, 'init_lora_weights', None)!r}, which changes the base weights,",
                getattr(config, "init_lora_weights", True) not in _KEEP_BASE,
            ),
        ):
            if found:
                raise MolfError(
                    f"the adapter {name!r} has {what} and is not a plain LoRA, so it cannot be part of one; export the merged "
                    "checkpoint instead"
                )
    if trained := unsaved_parameters(model, adapters):
        raise MolfError(
            f"{len(trained)} parameters of the base model train, too ({trained[0]}, ...), so that one LoRA is not what was "
            "learnt; export the merged checkpoint instead"
        )
    layers = {
        name: layer
        for name, layer in module_names(model.get_base_model()).items()
        if isinstance(layer, LoraLayer) and any(own in layer.r for own in adapters)
    }
    if not layers:
        raise MolfError("the model has no LoRA layers, so there is nothing to export")
    for name, layer in layers.items():
        matrices = all(module.weight.ndim == 2 for module in layer.lora_A.values())
        if layer.lora_embedding_A or layer.lora_variant or not matrices:
            raise MolfError(
                f"{name} is not a linear layer with plain LoRA ({type(layer).__name__}); export the merged checkpoint instead"
            )
    return layers
