"""What the optimizer asks of a routed layer, whichever way its experts are held."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from molf.numerics.adamw import Rates, Slot
from molf.numerics.bf16 import Noise, load, master_dtype, store
from molf.numerics.distributed import like_rows, local, part_of, refuse_column_shards
from molf.numerics.quantization import block_count, is_large_matrix

__all__ = ["Pair", "RoutedLayer", "in_8_bits", "init_moments", "init_step"]


class Pair(NamedTuple):
    """A LoRA expert's live tensors: ``A [r, in]``, ``B [out, r]`` and the scale of their product.

    ``started`` is False as long as ``B`` is still zero because the expert never won: ``B A`` and the gradient of ``A`` are zero
    then, and need not be computed.
    """

    A: Tensor
    B: Tensor
    scale: float
    started: bool = True


class RoutedLayer(abc.ABC):
    """One routed layer at one step. Looks everything up in its group and the optimizer's state; keeps nothing itself.

    The order of calls in a step: ``count_step``, ``slots`` of every expert, ``release``, ``begin_update``, ``finish_update``.

    Args:
        group: The layer's parameter group.
        state: The optimizer's state, where the layer's own was made by ``init_state``.
        noise: For stochastic rounding, None where low parts are kept.
    """

    def __init__(self, group: dict[str, Any], state: dict[Any, dict[str, Any]], noise: Noise | None):
        self.group, self._state, self._noise = group, state, noise
        self.name: str = group["module"]
        self.experts: tuple[str, ...] = group["experts"]
        self.lr_ratios = tuple(1.0 if name == "fft" else float(group["lora_lr_ratio"]) for name in self.experts)
        self.numel = sum(p.numel() for p in group["params"])  # of all shards, so that all ranks make the same chunks
        self._slots: dict[int, list[Slot]] = {}

    @cached_property
    def lrs(self) -> tuple[float, ...]:
        """The experts' learning rates; asking waits for the device where ``lr`` is a tensor there."""
        lr = float(self.group["lr"])
        return tuple(lr * ratio for ratio in self.lr_ratios)

    @staticmethod
    @abc.abstractmethod
    def init_state(group: dict[str, Any], state: dict[Any, dict[str, Any]], keep_low: bool, optim_bits: int) -> None:
        """Create the state of a group where it is missing."""

    @property
    @abc.abstractmethod
    def pairs(self) -> list[Pair]:
        """The live pairs of the LoRA experts, in their order, as they are held (sharded or not)."""

    @property
    @abc.abstractmethod
    def base(self) -> list[Tensor]:
        """The parameters of the model that the ``fft`` expert moves: weight, then bias; none where there is no such expert."""

    @abc.abstractmethod
    def base_weight(self) -> Tensor:
        """Return ``W`` without the LoRA parts, in full precision, sharded as the weight is."""

    @abc.abstractmethod
    def set_base_weight(self, value: Tensor) -> None:
        """Set ``W`` to a whole matrix; the LoRA parts stay."""

    @abc.abstractmethod
    def set_pair(self, i: int, A: Tensor, B: Tensor) -> None:  # noqa: N803 - the paper's letters
        """Set the i-th pair to whole matrices; ``W`` stays."""

    @property
    def active(self) -> bool:
        """Whether backward left gradients to route by."""
        return any(p.grad is not None for p in self.group["params"])

    def gradients(self) -> list[Tensor]:
        """Return the gradients that backward left on parameters."""
        return [p.grad for p in self.group["params"] if p.grad is not None]

    def derived_slots(self) -> list[Slot]:
        """Return the tensors whose gradients no parameter carries, because they follow from others."""
        return []

    def lend(self, room: Tensor) -> None:
        """Compute the gradients that have to be summed over the shards into the memory given, ``shared_numel`` elements."""
        assert not room.numel(), "by default there are none"

    @property
    def shared_numel(self) -> int:
        """How many elements of gradients have to be summed over the shards, beyond what backward has summed."""
        return 0

    def count_step(self) -> None:
        """Count this step: there is one count for all experts of the layer."""
        self._state[self.group["params"][0]]["step"] += 1

    def slots(self, i: int) -> list[Slot]:
        """Return the tensors of the i-th expert with their gradients, those that have one; found out at the first call."""
        if i not in self._slots:
            self._slots[i] = self._find_slots(i)
        return self._slots[i]

    @abc.abstractmethod
    def _find_slots(self, i: int) -> list[Slot]:
        """Find the i-th expert's tensors and gradients."""

    def release(self) -> None:
        """Drop the gradients that phase 2 does not need: it moves 8-bit moments once more."""
        for i, slots in self._slots.items():
            self._slots[i] = [slot if slot.in_8_bits else slot._replace(grad=None) for slot in slots]

    @abc.abstractmethod
    def begin_update(self, winners: Sequence[int]) -> list[tuple[Rates, Slot]]:
        """Prepare the step of the winners (indices into ``experts``) and return what AdamW has to move."""

    @abc.abstractmethod
    def finish_update(self) -> None:
        """Do what is left after AdamW has moved the winners' tensors."""

    def set_bias(self, value: Tensor) -> None:
        """Set the bias, given whole."""
        self._write(self.base[1], part_of(value, self.base[1]))

    def _rates(self, i: int, decayed: bool = True) -> Rates:
        decay = self.group["weight_decay" if self.experts[i] == "fft" else "lora_weight_decay"] if decayed else 0.0
        step = float(self._state[self.group["params"][0]]["step"])
        return Rates(self.lrs[i], decay, self.group["betas"], self.group["eps"], step)

    def _slot(self, p: Tensor) -> Slot:
        return Slot.of(p, self._state[p])

    def _full(self, p: Tensor) -> Tensor:
        """Return the full-precision value of what is here of a parameter."""
        low = self._state[p].get("low")
        return load(local(p.detach()), None if low is None else local(low))

    def _write(self, p: Tensor, value: Tensor) -> None:
        """Give what is here of a parameter a value."""
        self._put_back(p, self._full(p).copy_(value))

    def _put_back(self, p: Tensor, value: Tensor) -> None:
        """Put a changed full-precision value back where ``_full`` took it from."""
        low = self._state[p].get("low")
        store(value, local(p.detach()), None if low is None else local(low), self._noise, p)


def in_8_bits(group: dict[str, Any], optim_bits: int) -> list[bool]:
    """Say of every parameter of a group whether its moments are kept in 8 bits: large matrices that train with full rank."""
    adapters = 2 * len(group["ranks"]) if group.get("form") == "branched" else 0
    full_rank = len(group["params"]) - adapters
    return [optim_bits == 8 and i < full_rank and is_large_matrix(p) for i, p in enumerate(group["params"])]


def init_moments(p: Tensor, state: dict[str, Any], keep_low: bool, packed: bool) -> None:
    """Create AdamW's moments of one parameter, and the low part of a bf16 one, where they are missing.

    Args:
        p: The parameter.
        state: Its own.
        keep_low: Whether bf16 weights have low parts.
        packed: Whether the moments are in 8 bits: codes, and beside them block maxima, which are zero at first.
    """
    if "exp_avg" not in state:
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = torch.zeros_like(p, dtype=torch.uint8 if packed else master_dtype(p.dtype))
            if packed:
                state[f"{key}.absmax"] = _no_maxima(p)
    if keep_low and p.dtype == torch.bfloat16 and "low" not in state:
        state["low"] = torch.zeros_like(p, dtype=torch.int16)


def _no_maxima(p: Tensor) -> Tensor:
    """Return block maxima of a matrix of zeros, sharded as the parameter is."""
    refuse_column_shards(p)
    blocks = block_count(p.numel() // len(p))
    return like_rows(torch.zeros(len(local(p)), blocks, dtype=torch.float32, device=p.device), p)


def init_step(state: dict[str, Any]) -> bool:
    """Create the step count of a layer or parameter where it is missing, and return whether it was."""
    fresh = "step" not in state
    if fresh:
        state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
    return fresh
