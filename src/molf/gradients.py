"""What happens to gradients before the step: unscale, measure, clip."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from molf.layers import RoutedLayer

__all__ = ["prepare_gradients", "total_norm"]


def prepare_gradients(
    dense: Sequence[Tensor], layers: Sequence[RoutedLayer], max_grad_norm: float | None, grad_scale: Tensor | None
) -> Tensor:
    """Return the gradients' norm after unscaling and before clipping, 0-dim; a non-finite one means a non-finite gradient.

    Clipping counts the gradients of all experts, ``dW``, ``dA`` and ``dB``: in the merged form nobody outside can see the
    LoRA ones. Dense gradients are scaled in place, like ``torch.nn.utils.clip_grad_norm_`` does.

    Args:
        dense: Gradients that backward left on parameters.
        layers: The routed layers, whose LoRA gradients join in when clipping.
        max_grad_norm: Largest norm to let through, None to measure only (dense gradients then).
        grad_scale: The loss scale to divide by, from a GradScaler.

    Raises:
        ValueError: If a gradient is sparse.
    """
    if any(grad.is_sparse for grad in dense):
        raise ValueError("sparse gradients can't be used: construct embeddings with sparse=False")
    if not dense:
        return torch.zeros(())
    if grad_scale is not None:
        torch._foreach_mul_(list(dense), grad_scale.double().reciprocal())
    norm = total_norm(dense)
    if max_grad_norm is None or not norm.isfinite():
        return norm
    lora = [grad for layer in layers for grad in layer.derived_gradients()]
    norm = total_norm([*dense, *lora])
    torch._foreach_mul_([*dense, *lora], (max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the norm of all tensors together, 0-dim float64 on the device of the first."""
    norms = torch._foreach_norm(list(tensors))
    total: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device, torch.float64) for norm in norms]))
    return total
