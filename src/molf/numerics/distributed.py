"""What the optimizer has to know about ranks: which tensors are shards, sums over them, and one decision for all.

FSDP2 (``torch.distributed.fsdp.fully_shard``) makes every parameter a ``DTensor``, of which each rank holds some rows. MoLF keeps
``W_eff [out, in]``, ``B [out, r]`` and their moments and low parts as such row shards, and ``A [r, in]`` whole on every rank:

    dW, dB = s G A^T    local          dA = s B^T G    a sum over the shards, all layers in one all-reduce
    scores              a sum over the shards, all layers in one all-reduce

Under DDP and on one device nothing is sharded. Wherever several ranks train one model, the first one's decision holds for all.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from molf.numerics.bf16 import master_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "Ranks",
    "agree_on_seeds",
    "find_ranks",
    "full",
    "is_sharded",
    "like_rows",
    "local",
    "part_of",
    "refuse_column_shards",
    "sharded_like",
]


def is_sharded(x: Tensor) -> bool:
    """Say whether a tensor is a ``DTensor``, of which this rank holds a part."""
    # Importing the class takes more than a second; where nobody has, there is no such tensor.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def local(x: Tensor) -> Tensor:
    """Return the part of a tensor that this rank holds, its memory shared: a shard's rows, or all of an unsharded one."""
    return x._local_tensor if is_sharded(x) else x  # type: ignore[attr-defined]


def full(x: Tensor) -> Tensor:
    """Return the whole of a tensor; if it is sharded a copy, gathered from all ranks, every one of which has to ask for it."""
    return x.full_tensor() if is_sharded(x) else x  # type: ignore[attr-defined]


def sharded_like(whole: Tensor, like: Tensor) -> Tensor:
    """Shard a tensor that every rank holds as another of its shape is sharded, without communication; or return it as it is."""
    if not is_sharded(like) or is_sharded(whole):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """Return what this rank holds of a tensor that is given whole, if it is sharded as ``like`` is."""
    return local(sharded_like(whole, like))


def like_rows(rows: Tensor, like: Tensor) -> Tensor:
    """Make one tensor of the rows that each rank holds, sharded as ``like`` is; or return them if that is not sharded.

    Args:
        rows: This rank's part ``[own rows, n]``.
        like: A tensor ``[all rows, m]``, sharded by rows or not at all.
    """
    if not is_sharded(like):
        return rows
    from torch.distributed.tensor import DTensor

    shape = torch.Size((like.shape[0], *rows.shape[1:]))
    stride = tuple(int(shape[i + 1 :].numel()) for i in range(len(shape)))
    mesh: Any = like.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(rows, mesh, like.placements, run_check=False, shape=shape, stride=stride)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Ranks:
    """The ranks that train a model together, as seen from one of them.

    Attributes:
        shards: Those that hold shards of it; None where nothing is sharded.
        alike: Groups through which what the first rank of each has becomes everyone's, one after the other.
    """

    shards: ProcessGroup | None = None
    alike: tuple[ProcessGroup, ...] = ()

    @property
    def index(self) -> int:
        """This rank's place among the shards."""
        return 0 if self.shards is None else torch.distributed.get_rank(self.shards)

    @property
    def size(self) -> int:
        """The number of shards."""
        return 1 if self.shards is None else torch.distributed.get_world_size(self.shards)

    @property
    def first(self) -> bool:
        """Whether this is the rank that decides."""
        return all(torch.distributed.get_rank(group) == 0 for group in self.alike)

    def sum_(self, x: Tensor) -> None:
        """Add up a tensor over the shards, in place, in one all-reduce."""
        assert self.shards is not None, "there is something to add up where there are shards"
        torch.distributed.all_reduce(x, group=self.shards)

    def sum_parts(self, parts: Tensor, sharded: Sequence[bool]) -> Tensor:
        """Return the sums over the shards of numbers, in one all-reduce; what is not sharded is on every rank and counts once.

        Args:
            parts: This rank's numbers, 1-D.
            sharded: Which of them are of a shard.
        """
        if self.shards is None:
            return parts
        counted = torch.tensor(sharded, device=parts.device) if self.index else torch.ones_like(parts, dtype=torch.bool)
        total = parts.double().where(counted, 0.0)
        self.sum_(total)
        return total

    def agree(self, x: Tensor, device: torch.device) -> Tensor:
        """Return the tensor that the deciding rank has: one broadcast, none where there is one rank.

        Args:
            x: On the host, or on the device, which is then not waited for.
            device: Of the parameters; the process group works there.
        """
        if not self.alike:
            return x
        shared = x.to(device, torch.uint8 if x.dtype == torch.bool else x.dtype, copy=True)
        for group in self.alike:
            torch.distributed.broadcast(shared, group=group, group_src=0)
        return shared.to(x.device, x.dtype)

    def all_say(self, yes: bool, device: torch.device) -> bool:
        """Say whether all ranks say yes: one small all-reduce, none where there is one rank.

        Args:
            yes: This rank's answer.
            device: Of the parameters; the process group works there.
        """
        if not self.alike:
            return yes
        least = torch.full((), yes, dtype=torch.int32, device=device)
        for group in self.alike:
            torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN, group=group)
        return bool(least)


def find_ranks(groups: Iterable[dict[str, Any]], process_group: ProcessGroup | None) -> Ranks:
    """Find the ranks that train together from the parameters as they are now.

    Args:
        groups: The optimizer's; sharded parameters know their mesh.
        process_group: Ranks that hold the same unsharded model; None for all there are.

    Raises:
        ValueError: If parameters are sharded in a way that can't be used; the reason is given.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return Ranks()
    sharded = [(group, p) for group in groups for p in group["params"] if is_sharded(p)]
    if not sharded:
        together = process_group or torch.distributed.group.WORLD
        assert together is not None, "a process group is initialised"
        return Ranks(alike=(together,) if torch.distributed.get_world_size(together) > 1 else ())
    for group, p in sharded:
        _check_placement(group, p, sharded[0][1])
    first: Any = sharded[0][1]
    mesh, dims = first.device_mesh, _sharded_dims(first)
    every = tuple(mesh.get_group(i) for i in range(mesh.ndim))
    return Ranks(every[dims[0]], every)


def refuse_column_shards(p: Tensor) -> None:
    """Refuse a parameter that is sharded otherwise than by rows.

    Raises:
        ValueError: Saying why.
    """
    if is_sharded(p) and any(x.is_shard() and not x.is_shard(0) for x in p.placements):  # type: ignore[attr-defined]
        raise ValueError(
            f"a matrix {list(p.shape)} is sharded {p.placements}: moments in 8 bits need row shards, Shard(0); leave out "  # type: ignore[attr-defined]
            "shard_placement_fn or use optim_bits=32"
        )


def agree_on_seeds(groups: Sequence[dict[str, Any]], state: dict[Any, Any], ranks: Ranks) -> None:
    """Give all ranks the first one's seeds, from which the LoRA experts start.

    Raises:
        RuntimeError: If experts have started from others before.
    """
    routed = [group for group in groups if "module" in group]
    own = torch.tensor([group["lora_seed"] for group in routed], device="cpu")
    seeds = ranks.agree(own, routed[0]["params"][0].device)
    if state and not own.equal(seeds):
        raise RuntimeError(
            "this rank's LoRA experts have started from another torch seed than the first rank's: seed all ranks alike "
            "(torch.manual_seed), or don't look at optimizer.experts before the first step"
        )
    for group, seed in zip(routed, seeds.tolist(), strict=True):
        group["lora_seed"] = seed


def _sharded_dims(p: Any) -> Sequence[int]:
    """Return the dimensions of the mesh that a parameter is sharded over."""
    return [i for i, placement in enumerate(p.placements) if placement.is_shard()]


def _check_placement(group: dict[str, Any], p: Any, first: Any) -> None:
    """Refuse what sums over one group of row shards can't serve."""
    name = group.get("module", "an ordinary parameter")
    dims = _sharded_dims(p)
    if len(dims) != 1 or any(not (x.is_shard() or x.is_replicate()) for x in p.placements):
        raise ValueError(
            f"{name} is placed {p.placements} on its mesh: shard over one dimension of the mesh and replicate over others, as "
            "fully_shard does; tensor parallelism can't be combined with MoLF"
        )
    if group.get("form") == "merged" and not p.placements[dims[0]].is_shard(0):
        raise ValueError(
            f"{name} is sharded {p.placements}: the merged form needs row shards, Shard(0); leave out shard_placement_fn"
        )
    if master_dtype(p.dtype) != master_dtype(first.dtype):
        raise ValueError(f"{name} is {p.dtype}, others {first.dtype}: sharded, all must be float64 or none")
    if p.device_mesh != first.device_mesh or dims != _sharded_dims(first):
        raise ValueError(
            f"{name} is sharded over {p.device_mesh}, others over {first.device_mesh}: use one mesh for all"
        )
