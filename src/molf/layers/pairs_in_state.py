"""What the two merged forms share: the parameter is the effective weight, and the LoRA pairs are entries of its state."""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from molf.layers.base import LoraPair, RoutedLayer, init_moments, init_step, quantized_params
from molf.numerics.adamw import TensorState
from molf.numerics.bf16 import master_dtype
from molf.numerics.distributed import first_row, local, shard_rows_like

__all__ = ["PairsInState"]


class PairsInState(RoutedLayer):
    """A layer, or a stack of matrices, whose pairs live in the state of its weight.

    State entries are flat tensors by name: ``lora_r8.A``, ``lora_r8.A.exp_avg``, ..., and ``lora_r8.wins``, how often a pair was
    updated.
    """

    @staticmethod
    def init_state(
        group: dict[str, Any], state: MutableMapping[Any, dict[str, Any]], keep_low: bool, optim_bits: int
    ) -> None:
        """Create missing moments, low parts, LoRA pairs and their moments.

        ``A`` starts Kaiming-uniform (a = sqrt 5), ``B`` at zero. The start depends on the group's seed only.
        """
        weight = group["params"][0]
        fresh = init_step(state[weight])
        for p, quantized in zip(group["params"], quantized_params(group, optim_bits), strict=True):
            init_moments(p, state[p], keep_low, quantized)
        if not fresh:
            return
        *stack, n_out, n_in = weight.shape
        if group.get("transposed"):
            n_out, n_in = n_in, n_out
        dtype, first, held = master_dtype(weight.dtype), first_row(weight), len(local(weight))
        generator = torch.Generator("cpu").manual_seed(group["lora_seed"])
        for name, r in zip(group["experts"][1:], group["ranks"], strict=True):
            bound = 1 / math.sqrt(n_in)
            A = torch.empty(*stack, r, n_in, dtype=torch.float32, device="cpu").uniform_(
                -bound, bound, generator=generator
            )
            B = torch.zeros(held, *([n_out] if stack else []), r, dtype=dtype, device=weight.device)
            if stack:  # all is sharded by matrices; A of a single matrix is replicated
                A = shard_rows_like(A[first : first + held].to(weight.device, dtype), weight)
            for key, value in (("A", A.to(weight.device, dtype)), ("B", shard_rows_like(B, weight))):
                entries = {"": value, ".exp_avg": torch.zeros_like(value), ".exp_avg_sq": torch.zeros_like(value)}
                state[weight].update({f"{name}.{key}{entry}": content for entry, content in entries.items()})
            state[weight][f"{name}.wins"] = torch.zeros((), dtype=torch.float32, device="cpu")

    @property
    def base(self) -> list[Tensor]:
        """The weight, which is ``W_eff``, and its bias if that trains."""
        return list(self.group["params"])

    @property
    def pairs(self) -> list[LoraPair]:
        """The live pairs in the order of the ranks."""
        entries, scales = self._state[self.base[0]], self.group["scales"]
        return [
            LoraPair(entries[f"{name}.A"], entries[f"{name}.B"], scale, b_is_nonzero=bool(entries[f"{name}.wins"]))
            for name, scale in zip(self.experts[1:], scales, strict=True)
        ]

    @property
    def active(self) -> bool:
        """Whether the weight has a gradient, from which all experts' gradients follow."""
        return self.base[0].grad is not None

    def derived_tensors(self) -> list[TensorState]:
        """Return A and B of all pairs."""
        return [tensor for i in range(1, len(self.experts)) for tensor in self.tensors(i)]

    def pair_tensor(self, i: int, key: str) -> TensorState:
        """Return A or B (``key``) of the i-th expert with its moments and without a gradient."""
        entries, name = self._state[self.base[0]], f"{self.experts[i]}.{key}"
        return TensorState(entries[name], None, entries[f"{name}.exp_avg"], entries[f"{name}.exp_avg_sq"])

    def _count_updates(self, i: int, count: int = 1) -> None:
        """Count updates of pairs. The count is on the host, so asking whether B is nonzero needs no sync."""
        self._state[self.base[0]][f"{self.experts[i]}.wins"] += count
