"""LoRA experts as what other programs load: one plain PEFT adapter, or a merged checkpoint."""

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn

Pair: TypeAlias = tuple[Tensor, Tensor]

_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # those that leave the base weights as they are


def concatenated(layer: LoraLayer, adapters: list[str]) -> Pair:
    """Write the sum of a layer's LoRA pairs as one pair of scale 1: ``sum_i s_i B_i A_i = B A``.

    Args:
        layer: The layer with its pairs.
        adapters: The adapters to take; those that the layer does not have are left out.

    Returns:
        ``A = [A_1; A_2; ...] [sum r_i, in]`` and ``B = [s_1 B_1, s_2 B_2, ...] [out, sum r_i]``, in float32 on the CPU.
    """
    own = [name for name in adapters if name in layer.lora_A]
    downs = [layer.lora_A[name].weight.detach().float() for name in own]
    ups = [layer.scaling[name] * layer.lora_B[name].weight.detach().float() for name in own]
    return torch.cat(downs).cpu().contiguous(), torch.cat(ups, dim=1).cpu().contiguous()


def export_peft(model: PeftModel, folder: str | Path) -> int:
    """Write all LoRA experts of a model as one plain PEFT LoRA, which computes the same.

    Its rank is the sum of the experts' and its scale is 1, spelt ``lora_alpha = r`` without rank stabilisation because
    some programs ignore ``use_rslora``. ``PeftModel.from_pretrained(base, folder)`` loads it.

    Args:
        model: A base model with LoRA adapters, which stays as it is.
        folder: Where to write; it must be empty or not exist. It appears whole or not at all.

    Returns:
        The rank of the adapter (the largest, where layers differ).

    Raises:
        ValueError: The model has what one LoRA without bias cannot express, or the folder is in use.
    """
    _check_plain(model)
    adapters = list(model.peft_config)
    pairs = {name: concatenated(layer, adapters) for name, layer in _lora_layers(model).items()}
    config = _one_adapter_config(model, {name: len(down) for name, (down, _) in pairs.items()})
    with whole_folder(folder) as partial:
        tensors = {
            f"base_model.model.{name}.lora_{letter}.weight": tensor
            for name, pair in pairs.items()
            for letter, tensor in zip("AB", pair, strict=True)
        }
        save_file(tensors, partial / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config.save_pretrained(partial)
    return max(len(down) for down, _ in pairs.values())


def vllm_max_lora_rank(rank: int) -> int | None:
    """Return what vLLM's ``max_lora_rank`` must be for an adapter: it takes certain ranks only, None above all of them."""
    return min((allowed for allowed in _VLLM_RANKS if allowed >= rank), default=None)


def export_merged(model: PeftModel, folder: str | Path, dtype: torch.dtype = torch.float32) -> float:
    """Add all LoRA experts to the weights and write a plain ``transformers`` checkpoint.

    The weights are merged in float32 and cast once. The model is used up: its layers become the merged ones.

    Args:
        model: A base model with LoRA adapters.
        folder: Where to write; it must be empty or not exist. It appears whole or not at all.
        dtype: Type of the written weights.

    Returns:
        The largest difference that the cast makes to a weight: 0 for float32.

    Raises:
        ValueError: The base is quantised, a merged weight is not finite, or the folder is in use.
    """
    if getattr(model.get_base_model(), "quantization_method", None) is not None:
        raise ValueError(
            "merging into a quantised base would round the experts away; load the base unquantised (dtype=float32) and the "
            "adapters on it, or export them as a PEFT adapter"
        )
    with whole_folder(folder) as partial:
        adapters = list(model.peft_config)
        merged = model.float().merge_and_unload(safe_merge=True, adapter_names=adapters)
        lost = max((_largest_cast_error(p.detach(), dtype) for p in merged.parameters()), default=0.0)
        merged.to(dtype).save_pretrained(partial)
    return lost


@contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``folder`` at the end, or vanishes on an error.

    Raises:
        ValueError: The folder exists and is not empty.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not empty; choose another folder or remove it first")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        yield partial
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _largest_cast_error(weight: Tensor, dtype: torch.dtype) -> float:
    return float((weight - weight.to(dtype).float()).abs().max()) if weight.numel() else 0.0


def _lora_layers(model: PeftModel) -> dict[str, LoraLayer]:
    return {name: layer for name, layer in model.get_base_model().named_modules() if isinstance(layer, LoraLayer)}


def _one_adapter_config(model: PeftModel, ranks: dict[str, int]) -> LoraConfig:
    first = next(iter(model.peft_config.values()))
    common = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: rank for name, rank in ranks.items() if rank != common}
    return LoraConfig(
        r=common,
        lora_alpha=common,
        rank_pattern=others,
        alpha_pattern=dict(others),
        use_rslora=False,
        lora_dropout=0.0,
        bias="none",
        target_modules=_targets(model.get_base_model(), ranks),
        fan_in_fan_out=first.fan_in_fan_out,
        base_model_name_or_path=first.base_model_name_or_path,
        task_type=first.task_type,
        inference_mode=True,
    )


def _targets(base: nn.Module, adapted: dict[str, Any]) -> list[str]:
    """Name the adapted layers by their last words where these mean no other layer, else by their whole names."""
    endings = {name.rpartition(".")[2] for name in adapted}
    meant = {name for name, _ in base.named_modules() if name.rpartition(".")[2] in endings}
    return sorted(endings) if meant == set(adapted) else sorted(adapted)


def _check_plain(model: PeftModel) -> None:
    for name, config in model.peft_config.items():
        for what, there in (
            (f"a {config.peft_type} adapter", not isinstance(config, LoraConfig) or config.peft_type != "LORA"),
            ("modules_to_save", bool(getattr(config, "modules_to_save", None))),
            ("trained biases", getattr(config, "bias", "none") != "none" or getattr(config, "lora_bias", False)),
            ("DoRA", getattr(config, "use_dora", False)),
            (
                f"init_lora_weights={getattr(config, 'init_lora_weights', None)!r}, which changes the base weights,",
                getattr(config, "init_lora_weights", True) not in _PLAIN_STARTS,
            ),
        ):
            if there:
                raise ValueError(
                    f"the adapter {name!r} has {what} and is no plain LoRA, so it cannot be part of one; "
                    "export the merged checkpoint instead"
                )
    layers = _lora_layers(model)
    if not layers:
        raise ValueError("the model has no LoRA layer, so there is nothing to export")
    for name, layer in layers.items():
        if layer.lora_embedding_A or layer.lora_variant or not _is_matrix(layer):
            raise ValueError(
                f"{name} is no linear layer with plain LoRA ({type(layer).__name__}); export the merged checkpoint instead"
            )


def _is_matrix(layer: LoraLayer) -> bool:
    return all(module.weight.ndim == 2 for module in layer.lora_A.values())
