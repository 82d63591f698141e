"""Norms of gradients, whole or sharded."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from molf.numerics.bf16 import master_dtype
from molf.numerics.distributed import Ranks, local

__all__ = ["all_zero", "exact_norm", "norm_over_shards", "total_norm"]


def norm_over_shards(
    sharded: Sequence[Tensor],
    whole: Sequence[Tensor],
    overflow: Tensor | None,
    flat: Tensor,
    norms: Tensor,
    ranks: Ranks,
    exact: Callable[[Sequence[Tensor]], Tensor] | None = None,
) -> Tensor:
    """All-reduce a flat buffer and return the norm of all gradients, in one collective.

    Each rank writes the norm of its shards into its own element of ``norms``, so the sum gathers all of them.

    Args:
        sharded: This rank's shards of gradients.
        whole: Gradients that are equal on every rank, at the latest after the all-reduce.
        overflow: Nonzero if the GradScaler found a non-finite gradient here; the norm is then infinite on all ranks.
        flat: The buffer to sum over the shards.
        norms: The part of ``flat`` for the norms, one element a shard, zeros.
        ranks: The ranks that hold shards.
        exact: Computes the norm where float32 overflows, with a sync; None for ``total_norm`` alone.
    """
    if sharded:
        norms[ranks.shard_index] = (exact or total_norm)(sharded)
    if overflow is not None:
        norms[ranks.shard_index].masked_fill_(overflow.to(norms.device).bool().view(()), torch.inf)
    ranks.sum_(flat)
    norm = total_norm([norms, *whole])
    return norm if exact is None or norm.isfinite() else exact([norms.double(), *whole])


def all_zero(gradients: Sequence[Tensor], ranks: Ranks) -> bool:
    """Return whether all gradients are zero on all ranks."""
    found = any(bool(local(grad).any()) for grad in gradients)
    if ranks.shards is None:
        return not found
    device = gradients[0].device if gradients else torch.device("cpu")
    anywhere = torch.full((), float(found), dtype=torch.float32, device=device)
    ranks.sum_(anywhere)
    return not anywhere


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the norm of all tensors together, 0-dim float64 on the device of the first; infinite if their dtype overflows.

    The norm of each bf16 tensor is rounded to bf16, as in ``torch.nn.utils.clip_grad_norm_``, which rounds their sum once more.
    """
    kinds: dict[torch.dtype, list[Tensor]] = {tensors[0].dtype: list(tensors)}
    if any(map(operator.ne, [x.dtype for x in tensors], [tensors[0].dtype] * len(tensors))):
        kinds = {}
        for x in tensors:  # a list of several dtypes would be taken tensor by tensor
            kinds.setdefault(x.dtype, []).append(x)
    return _joined([norm for own in kinds.values() for norm in torch._foreach_norm(own)])


def exact_norm(gradients: Sequence[Tensor], clipped: bool) -> Tensor:
    """Return ``total_norm`` of gradients, also where sums of their squares overflow float32. Syncs.

    Args:
        gradients: At least one.
        clipped: Whether the gradients will be clipped. If not, one whose own square overflows counts as infinite: so would its
            second moment be, for good.
    """
    norm = total_norm(gradients)
    if norm.isfinite():
        return norm
    largest = torch._foreach_norm([grad for grad in gradients if grad.numel()], torch.inf)
    if clipped or all(x.to(master_dtype(x.dtype)).square().isfinite() for x in largest):
        norm = _joined(torch._foreach_norm(list(gradients), dtype=torch.float64))
    return norm


def _joined(norms: Sequence[Tensor]) -> Tensor:
    if len(norms) == 1:  # as of a layer that moves alone
        return norms[0].double()
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for kind in dict.fromkeys([(norm.device, norm.dtype) for norm in norms]):
        kinds[kind] = [norm for norm in norms if (norm.device, norm.dtype) == kind]
    together = [torch.stack(own).to(norms[0].device, torch.float64) for own in kinds.values()]
    total: Tensor = torch.linalg.vector_norm(torch.cat(together) if len(together) > 1 else together[0])
    return total
