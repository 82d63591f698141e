"""The interface between the optimizer and a routed layer, for either way of holding the experts."""

from __future__ import annotations

import abc
import functools
from collections.abc import Iterable, MutableMapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from molf.numerics.adamw import Rates, TensorState
from molf.numerics.bf16 import Noise, load, master_dtype, store
from molf.numerics.distributed import check_row_sharded, is_sharded, local, local_part, shard_as, shard_rows_like
from molf.numerics.quantization import block_count, is_quantizable

__all__ = [
    "LoraPair",
    "Matrix",
    "RoutedLayer",
    "init_moments",
    "init_step",
    "level_gradients",
    "quantized_params",
    "stand_in",
    "winners_of",
]


class LoraPair(NamedTuple):
    """A LoRA expert's live tensors: ``A [r, in]``, ``B [out, r]`` and the scale ``s`` of their product.

    While ``b_is_nonzero`` is False the pair was never updated, ``B A`` and ``dA`` are zero, and neither is computed.
    """

    A: Tensor
    B: Tensor
    scale: float
    b_is_nonzero: bool = True


class Matrix(Protocol):
    """Where the experts of one matrix are held: what the user reads and assigns."""

    experts: tuple[str, ...]

    @property
    def pairs(self) -> list[LoraPair]:
        """The live pairs of the LoRA experts in order, sharded as they are held."""
        ...

    @property
    def base(self) -> list[Tensor]:
        """The model's parameters of the ``fft`` expert: weight ``[out, in]``, then bias; empty without that expert."""
        ...

    def base_weight(self) -> Tensor:
        """Return ``W`` without the LoRA parts in full precision, sharded like the weight."""
        ...

    def set_base_weight(self, value: Tensor) -> None:
        """Set ``W`` from a whole matrix; the LoRA parts stay."""
        ...

    def set_bias(self, value: Tensor) -> None:
        """Set the bias from a whole vector."""
        ...

    def set_pair(self, i: int, A: Tensor | None, B: Tensor | None) -> None:  # noqa: N803 - the paper's letters
        """Set the i-th pair, or what is given of it, from whole matrices; ``W`` stays."""
        ...


class RoutedLayer(abc.ABC):
    """One routed layer, or a stack of matrices that are routed one by one, at one step.

    It looks everything up in its group and the optimizer's state and owns nothing.

    The order of calls in a step: ``count_step``, ``tensors`` of every expert, ``drop_grads``, ``begin_update``,
    ``finish_update``.

    Args:
        group: The layer's parameter group.
        state: The optimizer's state; ``init_state`` made the layer's entries.
        noise: For stochastic rounding, None if low parts are kept.

    Attributes:
        levelled: Gradients by the parameter's ``id``, in the units of levelled scales, where backward left others.
    """

    def __init__(self, group: dict[str, Any], state: MutableMapping[Any, dict[str, Any]], noise: Noise | None):
        self.group, self._state, self._noise = group, state, noise
        self.name: str = group["module"]
        self.experts: tuple[str, ...] = group["experts"]
        self.lr_ratios = tuple(1.0 if name == "fft" else float(group["lora_lr_ratio"]) for name in self.experts)
        self.numel = sum(p.numel() for p in group["params"])  # of all shards, so that all ranks make the same chunks
        self._tensors: dict[int, list[TensorState]] = {}
        self.levelled: dict[int, Tensor] = {}

    @property
    def modules(self) -> tuple[str, ...]:
        """The names of the matrices that are routed one by one: the layer's own, or those of a stack."""
        return (self.name,)

    def parts(self, budget: int) -> Sequence[RoutedLayer]:
        """Return the layer in parts of at most ``budget`` elements, as far as its matrices can be parted."""
        return [self]

    @property
    def step(self) -> float:
        """The layer's step count."""
        return float(self._state[self.group["params"][0]]["step"])

    @functools.cached_property
    def lrs(self) -> tuple[float, ...]:
        """The experts' learning rates. Syncs if ``lr`` is a tensor on a device."""
        lr = float(self.group["lr"])
        return tuple(lr * ratio for ratio in self.lr_ratios)

    @property
    def score_lrs(self) -> tuple[float, ...]:
        """The rates to score by: the experts' own, or what stands in for rates of 0."""
        if float(self.group["lr"]):
            return self.lrs
        return tuple(stand_in(self.group) * ratio for ratio in self.lr_ratios)

    @staticmethod
    @abc.abstractmethod
    def init_state(
        group: dict[str, Any], state: MutableMapping[Any, dict[str, Any]], keep_low: bool, optim_bits: int
    ) -> None:
        """Create missing state of a group."""

    @property
    @abc.abstractmethod
    def pairs(self) -> list[LoraPair]:
        """The live pairs of the LoRA experts in order, sharded as they are held."""

    @property
    @abc.abstractmethod
    def base(self) -> list[Tensor]:
        """The model's parameters of the ``fft`` expert: weight, then bias; empty without that expert."""

    @property
    def active(self) -> bool:
        """Whether backward left a gradient to route by."""
        return any(p.grad is not None for p in self.group["params"])

    def check_experts(self) -> None:  # noqa: B027 - only experts that are parameters can be idle
        """Check that every expert of a layer with gradients trains.

        Raises:
            MolfError: If one does not.
        """

    def gradients(self) -> list[Tensor]:
        """Return the gradients of parameters, in the units of levelled scales."""
        return [self.levelled.get(id(p), p.grad) for p in self.group["params"] if p.grad is not None]

    def unlevelled(self) -> list[tuple[Tensor, float]]:
        """Return parameters whose gradients have other units than those of levelled scales, with the factors to multiply by."""
        return []

    def derived_tensors(self) -> list[TensorState]:
        """Return the tensors whose gradients are computed from others, and not left on a parameter by backward."""
        return []

    @property
    def reduced_numel(self) -> int:
        """Number of gradient elements to sum over the shards, beyond what backward has summed."""
        return 0

    def write_grads_into(self, out: Tensor) -> None:
        """Compute the gradients that need a sum over the shards into ``out [reduced_numel]``."""
        assert not out.numel(), "this layer needs no sum"

    def count_step(self) -> None:
        """Increment the step count, which all experts of the layer share."""
        self._state[self.group["params"][0]]["step"] += 1

    def tensors(self, i: int) -> list[TensorState]:
        """Return the tensors of the i-th expert that have a gradient; computed at the first call."""
        if i not in self._tensors:
            self._tensors[i] = self._expert_tensors(i)
        return self._tensors[i]

    @abc.abstractmethod
    def _expert_tensors(self, i: int) -> list[TensorState]:
        """Compute the i-th expert's tensors and gradients."""

    def numel_of(self, tensors: Sequence[TensorState]) -> int:
        """Return the number of elements of an expert's tensors, of all shards; in a stack, of one matrix."""
        return sum(x.param.numel() for x in tensors)

    def is_sharded(self, tensor: TensorState) -> bool:
        """Return whether the sums of a tensor are those of a shard."""
        return is_sharded(tensor.param)

    def sums_of_all(self, sums: Tensor) -> Tensor:
        """Return sums of this rank's matrices as sums of all of the layer's matrices, zero for those of other ranks."""
        return sums

    def drop_grads(self) -> None:
        """Drop gradients after phase 1 to free memory; 8-bit moments need theirs again in phase 2."""
        for i, tensors in self._tensors.items():
            self._tensors[i] = [x if x.is_quantized else x._replace(grad=None) for x in tensors]

    @abc.abstractmethod
    def begin_update(self, chosen: Tensor) -> list[tuple[Rates, TensorState]]:
        """Prepare the step of the winners and return what AdamW has to move.

        Args:
            chosen: Whether each expert of each matrix won, ``[matrices, E]`` bool on the host.
        """

    def quantized_losers(self, chosen: Tensor) -> list[TensorState]:
        """Return the tensors with 8-bit moments that do not move; their moments were updated in scratch memory only."""
        lost = (i for i, won in enumerate(chosen[0].tolist()) if not won)
        return [x for i in lost for x in self.tensors(i) if x.is_quantized]

    @abc.abstractmethod
    def finish_update(self) -> None:
        """Complete the step after AdamW has moved the winners' tensors."""

    def set_bias(self, value: Tensor) -> None:
        """Set the bias from a whole vector."""
        self._write(self.base[1], local_part(value, self.base[1]))

    def _rates(self, i: int, decayed: bool = True) -> Rates:
        decay = self.group["weight_decay" if self.experts[i] == "fft" else "lora_weight_decay"] if decayed else 0.0
        return Rates(self.lrs[i], decay, tuple(self.group["betas"]), self.group["eps"], self.step)

    def _tensor(self, p: Tensor) -> TensorState:
        return TensorState.of(p, self._state[p])

    def _load(self, p: Tensor) -> Tensor:
        """Return this rank's part of a parameter in full precision."""
        low = self._state[p].get("low")
        return load(local(p.detach()), None if low is None else local(low))

    def _store(self, p: Tensor, value: Tensor) -> None:
        """Write back what ``_load`` returned, after a change."""
        low = self._state[p].get("low")
        store(value, local(p.detach()), None if low is None else local(low), self._noise, p)

    def _write(self, p: Tensor, value: Tensor) -> None:
        """Set this rank's part of a parameter."""
        self._store(p, self._load(p).copy_(value))


def stand_in(group: dict[str, Any]) -> float:
    """Return the rate to score by at a rate of 0, as where warm-ups start: the base rate of the schedule, else 1.

    Nothing moves then, and all steps promise 0: a tie, which says nothing of what the experts are worth.
    """
    return float(group.get("initial_lr", 0.0)) or 1.0


def winners_of(chosen: Tensor) -> list[int]:
    """Return the winners of a layer of one matrix from ``chosen [1, E]``."""
    return [i for i, won in enumerate(chosen[0].tolist()) if won]


def level_gradients(layers: Iterable[RoutedLayer]) -> list[Tensor]:
    """Give the layers copies of gradients that have other units than those of levelled scales, and return these gradients.

    Backward may add to them after the step, and users read them, so they stay as they are.
    """
    work = [(layer, p, factor) for layer in layers for p, factor in layer.unlevelled()]
    if not work:
        return []
    found: list[Tensor] = [local(p.grad) for _, p, _ in work]  # type: ignore[arg-type]
    for (layer, p, _), grad in zip(work, torch._foreach_mul(found, [factor for _, _, factor in work]), strict=True):
        layer.levelled[id(p)] = shard_as(grad, p)
    return found


def quantized_params(group: dict[str, Any], optim_bits: int) -> list[bool]:
    """Return for each parameter of a group whether its moments are 8-bit: large matrices that train with full rank."""
    adapters = 2 * len(group["ranks"]) if group.get("form") == "branched" else 0
    full_rank = 1 if group.get("form") == "stacked" else len(group["params"]) - adapters
    return [optim_bits == 8 and i < full_rank and is_quantizable(p) for i, p in enumerate(group["params"])]


def init_moments(p: Tensor, entries: dict[str, Any], keep_low: bool, quantized: bool) -> None:
    """Create the missing moments of a parameter, and the low part of a bf16 one.

    Args:
        p: The parameter.
        entries: Its entries of the optimizer's state.
        keep_low: Whether bf16 weights have low parts.
        quantized: Whether the moments are 8-bit codes with block maxima.
    """
    if "exp_avg" not in entries:
        for key in ("exp_avg", "exp_avg_sq"):
            entries[key] = torch.zeros_like(p, dtype=torch.uint8 if quantized else master_dtype(p.dtype))
            if quantized:
                entries[f"{key}.absmax"] = _zero_absmax(p)
    if keep_low and p.dtype == torch.bfloat16 and "low" not in entries:
        entries["low"] = torch.zeros_like(p, dtype=torch.int16)


def _zero_absmax(p: Tensor) -> Tensor:
    """Return block maxima of a zero matrix, sharded like the parameter."""
    check_row_sharded(p)
    blocks = block_count(p.numel() // len(p))
    return shard_rows_like(torch.zeros(len(local(p)), blocks, dtype=torch.float32, device=p.device), p)


def init_step(entries: dict[str, Any]) -> bool:
    """Create a missing step count and return whether it was missing."""
    fresh = "step" not in entries
    if fresh:
        entries["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
    return fresh
