"""LoRA experts merged into the weights of their base model."""

import logging

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from molf.errors import MolfError

logger = logging.getLogger(__name__)


def merge(model: nn.Module) -> nn.Module:
    """Merge all LoRA experts into the base weights and return the plain model.

    It works after training with either form of MoLF. A model without PEFT adapters, whose weights are merged at all times, is
    returned as it is. Otherwise each weight becomes ``W + sum_i s_i B_i A_i``, computed in float32 and cast to the weight's dtype
    once; the largest difference that the cast makes is logged. Tied weights stay tied.

    Args:
        model: The trained model. If it is a ``PeftModel``, do not use it afterwards: its layers become the merged ones.

    Raises:
        MolfError: The base is quantised, or a merged weight is not finite.
    """
    if not isinstance(model, PeftModel):
        return model
    if getattr(model.get_base_model(), "quantization_method", None) is not None:
        raise MolfError(
            "merging into a quantised base would round the experts away: load the base unquantised and the adapters on it, or "
            "export them as one PEFT adapter (molf export RUN --to peft)"
        )
    lost = 0.0
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, BaseTunerLayer):
            lost = max(lost, _merge_layer(name, layer, list(model.peft_config)))
    logger.info("merged %s; casting changed no weight by more than %.3g", ", ".join(model.peft_config), lost)
    plain: nn.Module = model.unload()
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
