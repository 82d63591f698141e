"""The tensors of a fused step, as the lists that kernel tables are made of."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from molf.kernels.grad_buffer import GradBuffer
from molf.kernels.merged_update import Effective, UpdatedPair
from molf.kernels.moments import Moments
from molf.kernels.products import Product
from molf.kernels.quantized import Quantized
from molf.kernels.requantize import QuantizedStep
from molf.kernels.tables import Rate
from molf.kernels.winners import Step
from molf.layers.base import RoutedLayer
from molf.layers.branched import BranchedLayer
from molf.layers.merged import MergedLayer
from molf.numerics.adamw import TensorState
from molf.numerics.bf16 import SEED_STRIDE
from molf.numerics.context import StepContext
from molf.numerics.distributed import is_sharded, local

__all__ = ["StepPlan", "TensorEntry"]


class TensorEntry(NamedTuple):
    """One tensor that an expert moves.

    Attributes:
        tensor: This rank's part, with gradient and moments.
        size: Elements of the whole tensor.
        sharded: Whether other ranks hold other parts of it.
        stream: Selects its random numbers; equal on all ranks for replicated tensors.
        expert: Number of its expert: ``l * E + e`` for routed ones, then one for each ordinary parameter, which always wins.
        layer: Number of its step count: the layers', then one for each ordinary parameter.
        lr: Learning rate.
        weight_decay: Decoupled decay.
        derived: Whether it belongs to a pair of the merged form, whose gradient is computed from the dense one.
        effective: Whether it is an effective weight, which ``merged_update`` moves.
    """

    tensor: TensorState
    size: int
    sharded: bool
    stream: int
    expert: int
    layer: int
    lr: float | Rate
    weight_decay: float
    derived: bool = False
    effective: bool = False


class StepPlan:
    """The tensors of all layers and ordinary parameters that have gradients.

    Args:
        layers: The L routed layers, all with E experts; merged ones have weights of one dtype.
        ordinary: Groups of parameters that take plain AdamW.
        context: Of the step; counts in its state are moved to the device the first time.
        device: The model's.

    Attributes:
        entries: Every tensor.
        buffer: Memory for the gradients of the merged form's pairs.
        counts: Step counts, first those of the layers, then those of ordinary parameters.
        products: The inputs of these pairs' gradients.
        update_counts: How often each of these pairs was updated, and the numbers of their experts.
        effective: The merged form's weights.
        rates: The learning rates of all experts of all layers.
        routed: The number of experts of all layers together, ``L * E``.
        experts: The same, plus one for each ordinary parameter.
    """

    def __init__(
        self,
        layers: Sequence[RoutedLayer],
        ordinary: Sequence[dict[str, Any]],
        context: StepContext,
        device: torch.device,
    ):
        ranks = context.ranks
        self._state: MutableMapping[Any, dict[str, Any]] = context.state
        self._rank, self._device, self._layers = ranks.shard_index, device, len(layers)
        self.entries: list[TensorEntry] = []
        self.counts: list[Tensor] = []
        self.products: list[Product] = []
        self.update_counts: list[tuple[Tensor, int]] = []
        self.effective: list[Effective] = []
        self.rates: list[float | Rate] = []
        merged = [layer for layer in layers if isinstance(layer, MergedLayer)]
        self.buffer = GradBuffer(merged, 0 if ranks.shards is None else ranks.shard_count, device)
        for layer in layers:
            self._add_layer(layer)
        self.routed = sum(len(layer.experts) for layer in layers)
        for group in ordinary:
            for p in group["params"]:
                if p.grad is not None:
                    self._add_ordinary(p, group)
        self.experts = self.routed + len(self.counts) - len(layers)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of elements of every expert, all shards included."""
        sizes = [0] * self.experts
        for entry in self.entries:
            sizes[entry.expert] += entry.size
        return tuple(sizes)

    def moments(self) -> list[Moments]:
        """Return the tensors with float32 moments for phase 1."""
        return [
            Moments(x.tensor.grad, x.tensor.exp_avg, x.tensor.exp_avg_sq, x.expert, self._counts_here(x))
            for x in self.entries
            if x.tensor.grad is not None and not x.tensor.is_quantized
        ]

    def quantized_steps(self) -> list[QuantizedStep]:
        """Return the matrices with 8-bit moments; ``merged_update`` moves the parameters of effective weights."""
        return [
            QuantizedStep(
                quantized=self._quantized(x),
                param=None if x.effective else x.tensor.param,
                low=None if x.effective else x.tensor.low,
                layer=x.layer,
                stream=x.stream,
                lr=x.lr,
                weight_decay=x.weight_decay,
            )
            for x in self.entries
            if x.tensor.is_quantized
        ]

    def gradients(self, derived: bool, sharded: bool) -> list[Tensor]:
        """Return the gradients that backward left, plus those of the merged form's pairs if ``derived``; sharded or whole."""
        return [
            x.tensor.grad
            for x in self.entries
            if x.sharded == sharded and x.derived <= derived and x.tensor.grad is not None
        ]

    def steps(self, derived: bool) -> list[Step]:
        """Return the merged form's pairs, whose changes overwrite their gradients, or all other tensors with float32 moments."""
        return [
            Step(
                param=x.tensor.param,
                low=x.tensor.low,
                exp_avg=x.tensor.exp_avg,
                exp_avg_sq=x.tensor.exp_avg_sq,
                expert=x.expert,
                layer=x.layer,
                stream=x.stream,
                lr=x.lr,
                weight_decay=x.weight_decay,
                change=x.tensor.grad if derived else None,
            )
            for x in self.entries
            if x.derived == derived and not x.effective and not x.tensor.is_quantized
        ]

    def _add(
        self,
        tensor: TensorState,
        expert: int,
        layer: int,
        lr: float | Rate,
        weight_decay: float,
        derived: bool = False,
        effective: bool = False,
    ) -> TensorEntry:
        """Add a tensor, whole or sharded, and return its entry."""
        sharded = is_sharded(tensor.param)
        # Distinct for every tensor of this rank; for a shard, distinct on every rank.
        number = len(self.entries) + (sharded * (self._rank + 1) << 32)
        stream = number * SEED_STRIDE % 2**62
        own, size = tensor.local if sharded else tensor, tensor.param.numel()
        entry = TensorEntry(own, size, sharded, stream, expert, layer, lr, weight_decay, derived, effective)
        self.entries.append(entry)
        return entry

    def _counts_here(self, entry: TensorEntry) -> bool:
        """Return whether a tensor counts in its expert's sum on this rank: replicated ones count on the first only."""
        return entry.sharded or self._rank == 0

    def _quantized(self, entry: TensorEntry) -> Quantized:
        """Return the 8-bit moments of a tensor with its gradient."""
        tensor = entry.tensor
        assert tensor.grad is not None and tensor.exp_avg_absmax is not None and tensor.exp_avg_sq_absmax is not None
        absmax = tensor.exp_avg_absmax, tensor.exp_avg_sq_absmax
        return Quantized(
            tensor.grad, tensor.exp_avg, tensor.exp_avg_sq, *absmax, entry.expert, self._counts_here(entry)
        )

    def _count(self, p: Tensor, key: str) -> Tensor:
        entries = self._state[p]
        if entries[key].device != self._device:
            entries[key] = entries[key].to(self._device)
        count: Tensor = entries[key]
        return count

    def _rate(self, group: dict[str, Any], ratio: float = 1.0) -> float | Rate:
        """Return a group's rate times a ratio; a tensor on the device stays there."""
        lr: float | Tensor = group["lr"]
        return Rate(lr, ratio) if isinstance(lr, Tensor) and lr.device == self._device else float(lr) * ratio

    def _add_layer(self, layer: RoutedLayer) -> None:
        number = len(self.counts)
        self.counts.append(self._count(layer.group["params"][0], "step"))
        first = number * len(layer.experts)
        rates = [self._rate(layer.group, ratio) for ratio in layer.lr_ratios]
        self.rates += rates
        if isinstance(layer, MergedLayer):
            self._add_merged(layer, number, first, rates)
            return
        assert isinstance(layer, BranchedLayer)
        for e, ratio in enumerate(layer.lr_ratios):
            decay = layer.group["weight_decay" if layer.experts[e] == "fft" else "lora_weight_decay"]
            for tensor in layer.tensors(e):
                factor = layer.b_factor(tensor.param)
                lr = self._rate(layer.group, ratio * factor)
                self._add(tensor, first + e, number, lr, decay / factor if tensor.param.ndim > 1 else 0.0)

    def _add_merged(self, layer: MergedLayer, number: int, first: int, rates: Sequence[float | Rate]) -> None:
        weight, *biases = layer.tensors(0)
        lr, *lora_lrs = rates
        decay, lora_decay = layer.group["weight_decay"], layer.group["lora_weight_decay"]
        entry = self._add(weight, first, number, lr, decay, effective=True)
        grad = entry.tensor.grad
        assert grad is not None, "a layer without a gradient is not routed"
        for bias in biases:
            self._add(bias, first, number, lr, 0.0)
        pairs = []
        for e, (name, scale) in enumerate(zip(layer.experts[1:], layer.group["scales"], strict=True), start=1):
            updates = self._count(layer.base[0], f"{name}.wins")
            A, B = (layer.pair_tensor(e, key) for key in "AB")
            rows = local(B.param)
            dA, dB = self.buffer.take(A.param, is_sharded(layer.base[0])), self.buffer.take(rows, reduced=False)
            pairs.append(UpdatedPair(A.param, rows, dA, dB, scale, updates))
            self.update_counts.append((updates, first + e))
            self.products.append(Product(grad, A.param, rows, scale, updates, dA, dB))
            for tensor, out in ((A, dA), (B, dB)):
                self._add(tensor._replace(grad=out), first + e, number, lora_lrs[e - 1], lora_decay, derived=True)
        tensor = entry.tensor
        moments = self._quantized(entry) if tensor.is_quantized else (tensor.exp_avg, tensor.exp_avg_sq)
        self.effective.append(
            Effective(tensor.param, tensor.low, moments, number, entry.stream, lr, decay, tuple(pairs))
        )

    def _add_ordinary(self, p: Tensor, group: dict[str, Any]) -> None:
        number = len(self.counts)
        self.counts.append(self._count(p, "step"))
        expert = self.routed + number - self._layers
        self._add(TensorState.of(p, self._state[p]), expert, number, self._rate(group), group["weight_decay"])
