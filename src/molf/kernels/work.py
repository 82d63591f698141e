"""What a step has to do, as lists that the kernels' tables are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from molf.kernels.fold import Effective, MovedPair
from molf.kernels.moments import Moments
from molf.kernels.packed import Packed
from molf.kernels.products import Product
from molf.kernels.room import Room
from molf.kernels.settle import PackedStep
from molf.kernels.tables import Rate
from molf.kernels.winners import Step
from molf.layers.base import RoutedLayer
from molf.layers.merged import MergedLayer
from molf.numerics.adamw import Slot
from molf.numerics.bf16 import APART
from molf.numerics.distributed import Ranks, is_sharded, local

__all__ = ["Item", "Work"]


class Item(NamedTuple):
    """One tensor that an expert moves.

    Attributes:
        slot: What is here of the tensor, with gradient and moments.
        size: Elements of the whole tensor.
        sharded: Whether other ranks hold other parts of it.
        stream: What tells its random numbers from those of others: whatever every rank holds whole is rounded alike on all.
        expert: Number of its expert: ``l * E + e`` for routed ones, then one for each ordinary parameter, which always wins.
        layer: Number of its step count: that of the layer, then one for each ordinary parameter.
        lr: Learning rate.
        weight_decay: Decoupled decay.
        derived: Whether it belongs to a pair of the merged form, whose gradient follows from the dense one.
        effective: Whether it is an effective weight, which is moved when the winners are folded in.
    """

    slot: Slot
    size: int
    sharded: bool
    stream: int
    expert: int
    layer: int
    lr: float | Rate
    weight_decay: float
    derived: bool = False
    effective: bool = False


class Work:
    """The tensors of all layers and ordinary parameters that have gradients.

    Args:
        layers: The L routed layers, all with E experts; those of the merged form have weights of one dtype.
        ordinary: Groups of parameters that take plain AdamW.
        state: The optimizer's; its counts are moved to the device the first time.
        ranks: Those that train the model together.
        device: Where the model is.

    Attributes:
        items: Every tensor.
        room: Memory for the gradients of the merged form's pairs.
        counts: Step counts, first those of the layers, then those of ordinary parameters.
        products: What the gradients of the merged form's pairs follow from.
        wins: How often each of these pairs moved, and the numbers of their experts.
        effective: The merged form's weights.
        rates: The learning rates of all experts of all layers.
        routed: The number of experts of all layers together, ``L * E``.
        experts: The same, and one for each ordinary parameter.
    """

    def __init__(
        self,
        layers: Sequence[RoutedLayer],
        ordinary: Sequence[dict[str, Any]],
        state: dict[Any, dict[str, Any]],
        ranks: Ranks,
        device: torch.device,
    ):
        self._state, self._rank, self._device, self._layers = state, ranks.index, device, len(layers)
        self.items: list[Item] = []
        self.counts: list[Tensor] = []
        self.products: list[Product] = []
        self.wins: list[tuple[Tensor, int]] = []
        self.effective: list[Effective] = []
        self.rates: list[float | Rate] = []
        merged = [layer for layer in layers if isinstance(layer, MergedLayer)]
        self.room = Room(merged, 0 if ranks.shards is None else ranks.size, device)
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
        """The number of elements of every expert, those of other shards included."""
        sizes = [0] * self.experts
        for item in self.items:
            sizes[item.expert] += item.size
        return tuple(sizes)

    def moments(self) -> list[Moments]:
        """Return the tensors with float32 moments for phase 1."""
        return [
            Moments(item.slot.grad, item.slot.exp_avg, item.slot.exp_avg_sq, item.expert, self._counts(item))
            for item in self.items
            if item.slot.grad is not None and not item.slot.in_8_bits
        ]

    def packed_steps(self) -> list[PackedStep]:
        """Return the matrices with 8-bit moments."""
        return [
            PackedStep(
                packed=self._packed(item),
                param=None if item.effective else item.slot.param,
                low=None if item.effective else item.slot.low,
                layer=item.layer,
                stream=item.stream,
                lr=item.lr,
                weight_decay=item.weight_decay,
            )
            for item in self.items
            if item.slot.in_8_bits
        ]

    def gradients(self, derived: bool, sharded: bool) -> list[Tensor]:
        """Return the gradients that backward left, and those of the merged form's pairs if asked for; of shards, or of others."""
        return [
            item.slot.grad
            for item in self.items
            if item.sharded == sharded and item.derived <= derived and item.slot.grad is not None
        ]

    def steps(self, derived: bool) -> list[Step]:
        """Return the merged form's pairs, whose changes take the place of their gradients, or all else with float32 moments."""
        return [
            Step(
                param=item.slot.param,
                low=item.slot.low,
                exp_avg=item.slot.exp_avg,
                exp_avg_sq=item.slot.exp_avg_sq,
                expert=item.expert,
                layer=item.layer,
                stream=item.stream,
                lr=item.lr,
                weight_decay=item.weight_decay,
                change=item.slot.grad if derived else None,
            )
            for item in self.items
            if item.derived == derived and not item.effective and not item.slot.in_8_bits
        ]

    def _add(
        self,
        slot: Slot,
        expert: int,
        layer: int,
        lr: float | Rate,
        weight_decay: float,
        derived: bool = False,
        effective: bool = False,
    ) -> Item:
        """Add a tensor, whole or sharded, and return what is here of it."""
        sharded = is_sharded(slot.param)
        # A number that no other tensor has on this rank, and no other part of a sharded one on any.
        number = len(self.items) + (sharded * (self._rank + 1) << 32)
        stream = number * APART % 2**62
        here = slot.here if sharded else slot
        item = Item(here, slot.param.numel(), sharded, stream, expert, layer, lr, weight_decay, derived, effective)
        self.items.append(item)
        return item

    def _counts(self, item: Item) -> bool:
        """Tell whether a tensor counts in its expert's sum here: what every rank holds whole counts on the first one."""
        return item.sharded or self._rank == 0

    def _packed(self, item: Item) -> Packed:
        """Return the 8-bit moments of a tensor with its gradient."""
        slot = item.slot
        assert slot.grad is not None and slot.exp_avg_absmax is not None and slot.exp_avg_sq_absmax is not None
        codes, maxima = (slot.exp_avg, slot.exp_avg_sq), (slot.exp_avg_absmax, slot.exp_avg_sq_absmax)
        return Packed(slot.grad, *codes, *maxima, item.expert, self._counts(item))

    def _count(self, p: Tensor, key: str) -> Tensor:
        own = self._state[p]
        if own[key].device != self._device:
            own[key] = own[key].to(self._device)
        count: Tensor = own[key]
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
        for e, lr in enumerate(rates):
            decay = layer.group["weight_decay" if layer.experts[e] == "fft" else "lora_weight_decay"]
            for slot in layer.slots(e):
                self._add(slot, first + e, number, lr, decay if slot.param.ndim > 1 else 0.0)

    def _add_merged(self, layer: MergedLayer, number: int, first: int, rates: Sequence[float | Rate]) -> None:
        weight, *biases = layer.slots(0)
        lr, *lora_lrs = rates
        decay, lora_decay = layer.group["weight_decay"], layer.group["lora_weight_decay"]
        item = self._add(weight, first, number, lr, decay, effective=True)
        for slot in biases:
            self._add(slot, first, number, lr, 0.0)
        moved = []
        for e, (name, scale) in enumerate(zip(layer.experts[1:], layer.group["scales"], strict=True), start=1):
            wins = self._count(layer.base[0], f"{name}.wins")
            A, B = (layer.pair_slot(e, key) for key in "AB")
            rows = local(B.param)
            dA, dB = self.room.lend(A.param, shared=True), self.room.lend(rows, shared=False)
            pair = MovedPair(A.param, rows, dA, dB, scale, wins)
            moved.append(pair)
            self.wins.append((wins, first + e))
            assert item.slot.grad is not None, "a layer without a gradient is not routed"
            self.products.append(Product(item.slot.grad, pair.A, pair.B, scale, wins, dA, dB))
            for slot, grad in ((A, dA), (B, dB)):
                self._add(slot._replace(grad=grad), first + e, number, lora_lrs[e - 1], lora_decay, derived=True)
        self.effective.append(
            Effective(
                item.slot.param,
                item.slot.low,
                self._packed(item) if item.slot.in_8_bits else (item.slot.exp_avg, item.slot.exp_avg_sq),
                number,
                item.stream,
                lr,
                decay,
                tuple(moved),
            )
        )

    def _add_ordinary(self, p: Tensor, group: dict[str, Any]) -> None:
        number = len(self.counts)
        self.counts.append(self._count(p, "step"))
        expert = self.routed + number - self._layers
        self._add(Slot.of(p, self._state[p]), expert, number, self._rate(group), group["weight_decay"])
