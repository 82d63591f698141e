"""What happens to gradients before the step: unscale, measure, clip."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from molf.layers.base import RoutedLayer
from molf.numerics.bf16 import master_dtype
from molf.numerics.distributed import Ranks, is_sharded, local

__all__ = ["all_zero", "norm_over_shards", "prepare_gradients", "refuse_sparse", "total_norm"]


def prepare_gradients(
    dense: Sequence[Tensor],
    layers: Sequence[RoutedLayer],
    max_grad_norm: float | None,
    grad_scale: Tensor | None,
    overflow: Tensor | None,
    ranks: Ranks,
) -> Tensor:
    """Return the gradients' norm after unscaling and before clipping, 0-dim; a non-finite one means a non-finite gradient.

    Clipping counts the gradients of all experts, ``dW``, ``dA`` and ``dB``: in the merged form nobody outside can see the
    LoRA ones. Dense gradients are scaled in place, like ``torch.nn.utils.clip_grad_norm_`` does.

    Args:
        dense: Gradients that backward left on parameters.
        layers: The routed layers, whose LoRA gradients join in when clipping.
        max_grad_norm: Largest norm to let through, None to measure only (dense gradients then).
        grad_scale: The loss scale to divide by, from a GradScaler.
        overflow: Not 0 if the GradScaler found a gradient that is not finite; if it is of a shard, no rank's norm is finite then.
        ranks: Those that hold shards. Gradients of A are summed over them, so that all have them whole, and so is the norm.

    Raises:
        ValueError: If a gradient is sparse.
    """
    refuse_sparse(dense)
    if not dense:
        return torch.zeros(())
    here, clipped = [local(grad) for grad in dense], max_grad_norm is not None
    if grad_scale is not None:
        torch._foreach_mul_(here, grad_scale.double().reciprocal())
    sharded = ranks.shards is not None
    norm = _sum_over_shards(dense, layers, clipped, overflow, ranks) if sharded else total_norm(here)
    if max_grad_norm is None or not norm.isfinite():
        return norm
    lora = [slot.grad for layer in layers for slot in layer.derived_slots() if slot.grad is not None]
    if not sharded:
        norm = total_norm([*here, *lora])
    torch._foreach_mul_([*here, *lora], (max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _sum_over_shards(
    dense: Sequence[Tensor], layers: Sequence[RoutedLayer], clipped: bool, overflow: Tensor | None, ranks: Ranks
) -> Tensor:
    """Sum the gradients of A over the shards and return the norm of all gradients, in one all-reduce."""
    sizes = [layer.shared_numel for layer in layers]
    device, dtype = dense[0].device, master_dtype(dense[0].dtype)
    flat = torch.zeros(sum(sizes) + ranks.size, device=device, dtype=dtype)
    *rooms, norms = torch.split(flat, [*sizes, ranks.size])
    for layer, room in zip(layers, rooms, strict=True):
        layer.lend(room)
    lora = [slot for layer in layers for slot in layer.derived_slots()] if clipped else []
    parts = [(local(grad), is_sharded(grad)) for grad in dense]
    parts += [(slot.grad, is_sharded(slot.param)) for slot in lora if slot.grad is not None]
    own, whole = ([grad for grad, sharded in parts if sharded is wanted] for wanted in (True, False))
    return norm_over_shards(own, whole, overflow, flat, norms, ranks)


def norm_over_shards(
    sharded: Sequence[Tensor],
    whole: Sequence[Tensor],
    overflow: Tensor | None,
    flat: Tensor,
    norms: Tensor,
    ranks: Ranks,
) -> Tensor:
    """Sum what has to be summed over the shards and return the norm of all gradients, in one all-reduce.

    Every rank has a place of its own for the norm of its shards, so the sum gathers the norms.

    Args:
        sharded: The parts that are here of gradients.
        whole: Gradients that every rank has whole, at the latest after the sum.
        overflow: Not 0 if the GradScaler found a gradient that is not finite here: the norm is infinite on all ranks then.
        flat: What is summed.
        norms: Where in it the norms are, one a shard; zeros.
        ranks: Those that hold shards.
    """
    if sharded:
        norms[ranks.index] = total_norm(sharded)
    if overflow is not None:
        norms[ranks.index].masked_fill_(overflow.to(norms.device).bool().view(()), torch.inf)
    ranks.sum_(flat)
    return total_norm([norms, *whole])


def refuse_sparse(gradients: Sequence[Tensor]) -> None:
    """Refuse sparse gradients.

    Raises:
        ValueError: If there is one.
    """
    if any(grad.layout != torch.strided for grad in gradients):
        raise ValueError("sparse gradients can't be used: construct embeddings with sparse=False")


def all_zero(gradients: Sequence[Tensor], ranks: Ranks) -> bool:
    """Say whether all gradients are zero on all ranks."""
    found = any(bool(local(grad).any()) for grad in gradients)
    if ranks.shards is None:
        return not found
    device = gradients[0].device if gradients else torch.device("cpu")
    anywhere = torch.full((), float(found), device=device)
    ranks.sum_(anywhere)
    return not anywhere


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the norm of all tensors together, 0-dim float64 on the device of the first."""
    norms = torch._foreach_norm(list(tensors))
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for norm in norms:
        kinds.setdefault((norm.device, norm.dtype), []).append(norm)
    together = [torch.stack(own).to(norms[0].device, torch.float64) for own in kinds.values()]
    total: Tensor = torch.linalg.vector_norm(torch.cat(together))
    return total
