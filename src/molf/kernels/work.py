"""What a step has to do, as lists that the kernels' tables are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from molf.adamw import Slot
from molf.kernels.addresses import ALIGNMENT
from molf.kernels.fold import Effective, MovedPair
from molf.kernels.moments import Moments
from molf.kernels.packed import Packed
from molf.kernels.products import Product
from molf.kernels.settle import PackedStep
from molf.kernels.tables import Rate
from molf.kernels.winners import Step
from molf.layers import RoutedLayer
from molf.merged import MergedLayer

__all__ = ["Item", "Work"]


class Item(NamedTuple):
    """One tensor that an expert moves.

    Attributes:
        slot: The tensor with gradient and moments.
        expert: Number of its expert: ``l * E + e`` for routed ones, then one for each ordinary parameter, which always wins.
        layer: Number of its step count: that of the layer, then one for each ordinary parameter.
        lr: Learning rate.
        weight_decay: Decoupled decay.
        derived: Whether it belongs to a pair of the merged form, whose gradient follows from the dense one.
        effective: Whether it is an effective weight, which is moved when the winners are folded in.
    """

    slot: Slot
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
        device: Where the model is.

    Attributes:
        items: Every tensor.
        counts: Step counts, first those of the layers, then those of ordinary parameters.
        products: What the gradients of the merged form's pairs follow from.
        wins: How often each of these pairs moved, and the numbers of their experts.
        effective: The merged form's weights.
        rates: The learning rates of all experts of all layers.
        room: One piece of memory for the gradients of the merged form's pairs.
    """

    def __init__(
        self,
        layers: Sequence[RoutedLayer],
        ordinary: Sequence[dict[str, Any]],
        state: dict[Any, dict[str, Any]],
        device: torch.device,
    ):
        self._state, self._device, self._layers = state, device, len(layers)
        self.items: list[Item] = []
        self.counts: list[Tensor] = []
        self.products: list[Product] = []
        self.wins: list[tuple[Tensor, int]] = []
        self.effective: list[Effective] = []
        self.rates: list[float | Rate] = []
        merged = [layer for layer in layers if isinstance(layer, MergedLayer)]
        elements = sum(_place_of(r * n) for layer in merged for r in layer.group["ranks"] for n in layer.base[0].shape)
        self.room = torch.empty(elements, dtype=torch.float32, device=device)
        self._lent = 0
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
        """The number of elements of every expert."""
        sizes = [0] * self.experts
        for item in self.items:
            sizes[item.expert] += item.slot.param.numel()
        return tuple(sizes)

    def moments(self) -> list[Moments]:
        """Return the tensors with float32 moments for phase 1."""
        return [
            Moments(item.slot.grad, item.slot.exp_avg, item.slot.exp_avg_sq, item.expert)
            for item in self.items
            if item.slot.grad is not None and not item.slot.in_8_bits
        ]

    def packed_steps(self) -> list[PackedStep]:
        """Return the matrices with 8-bit moments."""
        return [
            PackedStep(
                packed=_packed(item.slot, item.expert),
                param=None if item.effective else item.slot.param,
                low=None if item.effective else item.slot.low,
                layer=item.layer,
                lr=item.lr,
                weight_decay=item.weight_decay,
            )
            for item in self.items
            if item.slot.in_8_bits
        ]

    def gradients(self, derived: bool) -> list[Tensor]:
        """Return the gradients of the merged form's pairs, or those that backward left."""
        return [item.slot.grad for item in self.items if item.derived == derived and item.slot.grad is not None]

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
                lr=item.lr,
                weight_decay=item.weight_decay,
                change=item.slot.grad if derived else None,
            )
            for item in self.items
            if item.derived == derived and not item.effective and not item.slot.in_8_bits
        ]

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
                self.items.append(Item(slot, first + e, number, lr, decay if slot.param.ndim > 1 else 0.0))

    def _add_merged(self, layer: MergedLayer, number: int, first: int, rates: Sequence[float | Rate]) -> None:
        weight, *biases = layer.slots(0)
        lr, *lora_lrs = rates
        decay, lora_decay = layer.group["weight_decay"], layer.group["lora_weight_decay"]
        self.items.append(Item(weight, first, number, lr, decay, effective=True))
        self.items += [Item(slot, first, number, lr, 0.0) for slot in biases]
        moved = []
        for e, (name, scale) in enumerate(zip(layer.experts[1:], layer.group["scales"], strict=True), start=1):
            wins = self._count(layer.base[0], f"{name}.wins")
            A, B = (layer.pair_slot(e, key) for key in "AB")
            pair = MovedPair(A.param, B.param, self._lend(A.param), self._lend(B.param), scale, wins)
            moved.append(pair)
            self.wins.append((wins, first + e))
            assert weight.grad is not None, "a layer without a gradient is not routed"
            self.products.append(Product(weight.grad, pair.A, pair.B, scale, wins, pair.dA, pair.dB))
            for slot, grad in ((A, pair.dA), (B, pair.dB)):
                own = slot._replace(grad=grad)
                self.items.append(Item(own, first + e, number, lora_lrs[e - 1], lora_decay, derived=True))
        self.effective.append(
            Effective(
                weight.param,
                weight.low,
                _packed(weight, first) if weight.in_8_bits else (weight.exp_avg, weight.exp_avg_sq),
                number,
                lr,
                decay,
                tuple(moved),
            )
        )

    def _lend(self, like: Tensor) -> Tensor:
        """Return memory for a tensor like the given one."""
        first = self._lent
        self._lent += _place_of(like.numel())
        return self.room[first : first + like.numel()].view_as(like)

    def _add_ordinary(self, p: Tensor, group: dict[str, Any]) -> None:
        number = len(self.counts)
        self.counts.append(self._count(p, "step"))
        expert = self.routed + number - self._layers
        self.items.append(Item(Slot.of(p, self._state[p]), expert, number, self._rate(group), group["weight_decay"]))


def _place_of(elements: int) -> int:
    """Return the elements that a tensor takes of the room, so that the next one is aligned, too."""
    return -(-elements // ALIGNMENT) * ALIGNMENT


def _packed(slot: Slot, expert: int) -> Packed:
    """Return the 8-bit moments of a slot with its gradient."""
    assert slot.grad is not None and slot.exp_avg_absmax is not None and slot.exp_avg_sq_absmax is not None
    return Packed(slot.grad, slot.exp_avg, slot.exp_avg_sq, slot.exp_avg_absmax, slot.exp_avg_sq_absmax, expert)
