"""LoRA experts merged into the weights of their base model."""

import logging

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from molf.errors import MolfError
from molf.integrations.lora_experts import trained_adapters
from molf.setup.discovery import unwrapped

logger = logging.getLogger(__name__)


def merge(model: nn.Module) -> nn.Module:
    """Merge all LoRA experts into the base weights and return the plain model.

    It works after training with either form of MoLF. A model without PEFT adapters, whose weights are merged at all times, is
    returned as it is. Otherwise each weight becomes ``W + sum_i s_i B_i A_i``, computed in float32 and cast to the weight's dtype
    once; the largest difference that the cast makes is logged. Tied weights stay tied. Adapters that are neither active nor
    experts (``lora_r{rank}``) are dropped, and named in the log: TRL's ``ref``, for example.

    Args:
        model: The trained model; DDP and ``torch.compile`` are taken off. If it is a ``PeftModel``, do not use it afterwards:
            its layers become the merged ones.

    Raises:
        MolfError: The base is quantised, a merged weight is not finite, or the adapters are not those of a ``PeftModel``.
    """
    adapted = unwrapped(model)
    if not isinstance(adapted, PeftModel):
        if any(isinstance(module, BaseTunerLayer) for module in adapted.modules()):
            raise MolfError(
                "the model's adapters were added by its own add_adapter, which cannot be undone: save them with "
                "model.save_pretrained(folder), and merge molf.merge(PeftModel.from_pretrained(base, folder))"
            )
        return model
    if getattr(adapted.get_base_model(), "quantization_method", None) is not None:
        raise MolfError(
            "merging into a quantised base would round the experts away: load the base unquantised and the adapters on it, or "
            "export them as one PEFT adapter (molf export RUN --to peft)"
        )
    lost, adapters = 0.0, trained_adapters(adapted)
    for name, layer in adapted.get_base_model().named_modules():
        if isinstance(layer, BaseTunerLayer):
            lost = max(lost, _merge_layer(name, layer, list(adapters)))
    logger.info("merged %s; casting changed no weight by more than %.3g", ", ".join(adapters), lost)
    if dropped := adapted.peft_config.keys() - set(adapters):
        logger.info("dropped %s, which is not active", ", ".join(sorted(dropped)))
    plain: nn.Module = adapted.unload()
    return plain


def _merge_layer(name: str, layer: BaseTunerLayer, adapters: list[str]) -> float:
    """Merge one layer; return the largest difference that casting it back makes."""
    base = layer.get_base_layer()
    dtypes = [p.dtype for p in base.parameters()]
    layer.float()
    try:
        layer.merge(safe_merge=True, adapter_names=adapters)
    except ValueError as error:
        raise MolfError(f"cannot merge {name}: {error}") from error
    lost = 0.0
    for p, dtype in zip(base.parameters(), dtypes, strict=True):
        lost = max(lost, cast_error(p.data, dtype))
        p.data = p.data.to(dtype)
    return lost


def cast_error(weight: Tensor, dtype: torch.dtype) -> float:
    """Return the largest difference that casting makes to an element of a float32 weight."""
    return float((weight - weight.to(dtype).float()).abs().max()) if weight.numel() else 0.0
