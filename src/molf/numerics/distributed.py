"""Sharded tensors and collectives: which tensors are shards, sums over them, and one decision for all ranks.

FSDP2 (``torch.distributed.fsdp.fully_shard``) turns every parameter into a ``DTensor`` sharded by rows. MoLF shards
``W_eff [out, in]``, ``B [out, r]``, their moments and low parts the same way and replicates ``A [r, in]``:

    dW, dB = s G A^T    local          dA = s B^T G    summed over the shards, all layers in one all-reduce
    scores              summed over the shards, all layers in one all-reduce

Under DDP and on one device nothing is sharded. Whenever several ranks train one model, rank 0's decision holds for all.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from molf.errors import MolfError
from molf.numerics.bf16 import master_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "Ranks",
    "broadcast_seeds",
    "check_no_orphaned_state",
    "check_row_sharded",
    "first_row",
    "find_ranks",
    "full",
    "is_sharded",
    "local",
    "local_part",
    "shard_as",
    "shard_like",
    "shard_rows_like",
]


def is_sharded(x: Tensor) -> bool:
    """Return whether a tensor is a ``DTensor``."""
    # Importing the class takes more than a second. If nobody has imported it, no such tensor exists.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def local(x: Tensor) -> Tensor:
    """Return this rank's shard, sharing memory, or the tensor itself."""
    return x._local_tensor if is_sharded(x) else x  # type: ignore[attr-defined]


def full(x: Tensor) -> Tensor:
    """Return the whole tensor. A sharded one is gathered into a copy, so every rank has to call this."""
    return x.full_tensor() if is_sharded(x) else x  # type: ignore[attr-defined]


def shard_like(whole: Tensor, like: Tensor) -> Tensor:
    """Shard a tensor that every rank holds like another of its shape, without communication."""
    if not is_sharded(like) or is_sharded(whole):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]


def local_part(whole: Tensor, like: Tensor) -> Tensor:
    """Return this rank's shard of a whole tensor, sharded like another of its shape."""
    return local(shard_like(whole, like))


def shard_rows_like(rows: Tensor, like: Tensor) -> Tensor:
    """Make one sharded tensor of the rows that each rank holds.

    Args:
        rows: This rank's rows ``[own rows, n]``.
        like: A tensor ``[all rows, m]``, sharded by rows; if it is not sharded, ``rows`` is returned.
    """
    if not is_sharded(like):
        return rows
    from torch.distributed.tensor import DTensor

    shape = torch.Size((like.shape[0], *rows.shape[1:]))
    stride = tuple(int(shape[i + 1 :].numel()) for i in range(len(shape)))
    mesh: Any = like.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(rows, mesh, like.placements, run_check=False, shape=shape, stride=stride)  # type: ignore[attr-defined]


def shard_as(part: Tensor, like: Tensor) -> Tensor:
    """Make one sharded tensor of the parts that each rank holds, of the shape of another that is sharded alike."""
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    mesh: Any = like.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(part, mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())  # type: ignore[attr-defined]


def first_row(x: Tensor) -> int:
    """Return the index of the first row that this rank holds of a tensor sharded by rows; 0 if it is not sharded."""
    if not is_sharded(x):
        return 0
    mesh: Any = x.device_mesh  # type: ignore[attr-defined]
    dim = _sharded_dims(x)[0]
    rows_a_rank = -(-len(x) // int(mesh.size(dim)))
    return min(len(x), int(mesh.get_coordinate()[dim]) * rows_a_rank)


@dataclass(frozen=True)
class Ranks:
    """The ranks that train a model together, seen from one of them.

    Attributes:
        shards: Process group of the ranks that hold shards; None if nothing is sharded.
        replica_groups: Process groups to broadcast rank 0's value over, in order.
    """

    shards: ProcessGroup | None = None
    replica_groups: tuple[ProcessGroup, ...] = ()

    @property
    def shard_index(self) -> int:
        """This rank's index among the shards."""
        return 0 if self.shards is None else torch.distributed.get_rank(self.shards)

    @property
    def shard_count(self) -> int:
        """The number of shards."""
        return 1 if self.shards is None else torch.distributed.get_world_size(self.shards)

    @property
    def is_leader(self) -> bool:
        """Whether this rank's decision holds for all."""
        return all(torch.distributed.get_rank(group) == 0 for group in self.replica_groups)

    def sum_(self, x: Tensor) -> None:
        """Sum a tensor over the shards in place: one all-reduce."""
        assert self.shards is not None, "only shards have something to sum"
        torch.distributed.all_reduce(x, group=self.shards)

    def sum_parts(self, parts: Tensor, sharded: Tensor) -> Tensor:
        """Sum numbers over the shards in one all-reduce; numbers of replicated tensors count once.

        Args:
            parts: This rank's numbers ``[n, k]``.
            sharded: Which of the n rows come from a shard, ``[n]`` bool on the host.
        """
        if self.shards is None:
            return parts
        mask = (sharded | (self.shard_index == 0)).to(parts.device)
        total = parts.double().where(mask[:, None], 0.0)
        self.sum_(total)
        return total

    def broadcast_decision(self, x: Tensor, device: torch.device) -> Tensor:
        """Return the leader's tensor: one broadcast per replica group, none for a single rank.

        Args:
            x: On the host or on the device; a device tensor causes no sync.
            device: The parameters' device, where the process group works.
        """
        if not self.replica_groups:
            return x
        shared = x.to(device, torch.uint8 if x.dtype == torch.bool else x.dtype, copy=True)
        for group in self.replica_groups:
            torch.distributed.broadcast(shared, group=group, group_src=0)
        return shared.to(x.device, x.dtype)

    def all_true(self, value: bool, device: torch.device) -> bool:
        """Return whether ``value`` is true on all ranks: one small all-reduce, none for a single rank."""
        if not self.replica_groups:
            return value
        least = torch.full((), value, dtype=torch.int32, device=device)
        for group in self.replica_groups:
            torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN, group=group)
        return bool(least)


def find_ranks(groups: Iterable[dict[str, Any]], process_group: ProcessGroup | None) -> Ranks:
    """Find the ranks that train together from the current parameters.

    Args:
        groups: The optimizer's groups; sharded parameters know their mesh.
        process_group: The ranks that hold the same unsharded model; None for all.

    Raises:
        MolfError: If parameters are sharded in an unsupported way.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return Ranks()
    sharded = [(group, p) for group in groups for p in group["params"] if is_sharded(p)]
    if not sharded:
        together = process_group or torch.distributed.group.WORLD
        assert together is not None, "a process group is initialised"
        return Ranks(replica_groups=(together,) if torch.distributed.get_world_size(together) > 1 else ())
    for group, p in sharded:
        _check_placement(group, p, sharded[0][1])
    first: Any = sharded[0][1]
    mesh, dims = first.device_mesh, _sharded_dims(first)
    every = tuple(mesh.get_group(i) for i in range(mesh.ndim))
    return Ranks(every[dims[0]], every)


def check_row_sharded(p: Tensor) -> None:
    """Check that a parameter is sharded by rows or not at all.

    Raises:
        MolfError: If it is sharded otherwise.
    """
    if is_sharded(p) and any(x.is_shard() and not x.is_shard(0) for x in p.placements):  # type: ignore[attr-defined]
        raise MolfError(
            f"a matrix {list(p.shape)} is sharded {p.placements}: 8-bit moments need row shards, Shard(0); leave out "  # type: ignore[attr-defined]
            "shard_placement_fn or use optim_bits=32"
        )


def broadcast_seeds(groups: Sequence[dict[str, Any]], state: Mapping[Any, Any], ranks: Ranks) -> None:
    """Give all ranks the leader's seeds, from which the LoRA experts are initialised.

    Raises:
        RuntimeError: If experts of this rank were already initialised from other seeds.
    """
    routed = [group for group in groups if "module" in group]
    own = torch.tensor([group["lora_seed"] for group in routed], device="cpu")
    seeds = ranks.broadcast_decision(own, routed[0]["params"][0].device)
    if any(group["params"][0] in state for group, same in zip(routed, own == seeds, strict=True) if not same):
        raise RuntimeError(
            "this rank initialised its LoRA experts from another torch seed than rank 0: seed all ranks alike "
            "(torch.manual_seed), or don't access optimizer.experts before the first step"
        )
    for group, seed in zip(routed, seeds.tolist(), strict=True):
        group["lora_seed"] = seed


def _sharded_dims(p: Any) -> Sequence[int]:
    """Return the mesh dimensions that a parameter is sharded over."""
    return [i for i, placement in enumerate(p.placements) if placement.is_shard()]


def _check_placement(group: dict[str, Any], p: Any, first: Any) -> None:
    """Check that sums over one group of row shards are enough for a parameter."""
    name = group.get("module", "an ordinary parameter")
    dims = _sharded_dims(p)
    if len(dims) != 1 or any(not (x.is_shard() or x.is_replicate()) for x in p.placements):
        raise MolfError(
            f"{name} is placed {p.placements} on its mesh: shard over one mesh dimension and replicate over the others, as "
            "fully_shard does; MoLF does not support tensor parallelism"
        )
    if group.get("form") in ("merged", "stacked") and not p.placements[dims[0]].is_shard(0):
        raise MolfError(
            f"{name} is sharded {p.placements}: the merged form needs row shards, Shard(0), which of a stack are whole "
            "matrices; leave out shard_placement_fn"
        )
    if master_dtype(p.dtype) != master_dtype(first.dtype):
        raise MolfError(
            f"{name} is {p.dtype}, others are {first.dtype}: sharded parameters must be float64 all or none"
        )
    if p.device_mesh != first.device_mesh or dims != _sharded_dims(first):
        raise MolfError(
            f"{name} is sharded over {p.device_mesh}, others over {first.device_mesh}: use one mesh for all parameters"
        )


def check_no_orphaned_state(groups: Sequence[dict[str, Any]], state: Mapping[Tensor, Any]) -> None:
    """Check that all state belongs to current parameters: state from before sharding cannot follow.

    Raises:
        RuntimeError: If some does not.
    """
    known = set(map(id, itertools.chain.from_iterable(group["params"] for group in groups)))
    if not known.issuperset(map(id, state)):
        raise RuntimeError(
            "this optimizer has state of parameters that are in none of its groups, which cannot follow: if fully_shard replaced "
            "them, shard first, then load the state, assign experts and take steps; with new layers, or groups removed from "
            "param_groups, make a new optimizer"
        )
