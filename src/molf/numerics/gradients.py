"""Checks and norms of gradients, whole or sharded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from molf.errors import MolfError
from molf.numerics.distributed import Ranks, local

__all__ = ["all_zero", "check_dense", "norm_over_shards", "total_norm"]


def norm_over_shards(
    sharded: Sequence[Tensor],
    whole: Sequence[Tensor],
    overflow: Tensor | None,
    flat: Tensor,
    norms: Tensor,
    ranks: Ranks,
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
    """
    if sharded:
        norms[ranks.shard_index] = total_norm(sharded)
    if overflow is not None:
        norms[ranks.shard_index].masked_fill_(overflow.to(norms.device).bool().view(()), torch.inf)
    ranks.sum_(flat)
    return total_norm([norms, *whole])


def check_dense(gradients: Sequence[Tensor]) -> None:
    """Check that no gradient is sparse.

    Raises:
        MolfError: If one is.
    """
    if any(grad.layout != torch.strided for grad in gradients):
        raise MolfError("sparse gradients are not supported: construct embeddings with sparse=False")


def all_zero(gradients: Sequence[Tensor], ranks: Ranks) -> bool:
    """Return whether all gradients are zero on all ranks."""
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
