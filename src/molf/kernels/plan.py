"""What a fused step works on: the tensors of all experts, and where the gradients of pairs lie."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from molf.kernels.layout import Layout
from molf.kernels.winners import FLOAT, SPLIT, STOCHASTIC
from molf.layers.base import RoutedLayer
from molf.layers.branched import BranchedLayer
from molf.layers.merged import MergedLayer
from molf.numerics.adamw import TensorState
from molf.numerics.bf16 import SEED_STRIDE
from molf.numerics.context import StepContext
from molf.numerics.distributed import is_sharded, local

__all__ = ["Entry", "Ordinary", "StepPlan"]


class Entry(NamedTuple):
    """One tensor that an expert moves.

    Attributes:
        tensor: This rank's part, without its gradient.
        owner: The number of the parameter that has the gradient; -1 for pairs of the merged form, whose gradients are computed.
        sharded: Whether other ranks hold other parts of it.
        stream: Selects its random numbers; equal on all ranks for replicated tensors.
        expert: Number of its expert: ``l * E + e`` for routed ones, then one for each ordinary parameter, which always wins.
        layer: Number of its step count: the layers', then one for each ordinary parameter.
        group: Number of the group whose rate it follows.
        ratio: Its rate as a share of the group's.
        decay: Decoupled decay.
        counted: Whether it counts in its expert's sum here; replicated tensors count on the first rank only.
        scale: Of a pair's B; 1 for all others.
        weight: The row of the effective weight of a pair; -1 for all others.
        effective: Whether it is an effective weight with pairs.
    """

    tensor: TensorState
    owner: int
    sharded: bool
    stream: int
    expert: int
    layer: int
    group: int
    ratio: float
    decay: float
    counted: bool
    scale: float = 1.0
    weight: int = -1
    effective: bool = False

    @property
    def storage(self) -> int:
        """How the parameter is stored."""
        bf16 = STOCHASTIC if self.tensor.low is None else SPLIT
        return FLOAT if self.tensor.param.dtype == torch.float32 else bf16


class Ordinary(NamedTuple):
    """Float32 parameters of one group, which PyTorch's fused AdamW moves; ``owners`` are their numbers."""

    group: int
    decay: float
    owners: list[int]
    params: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    counts: list[Tensor]


class StepPlan:
    """The tensors of all layers and ordinary parameters that have gradients. It holds no gradient.

    Args:
        layers: The L routed layers, all with E experts; merged ones have weights of one dtype.
        groups: All groups of the step, those of the layers too.
        context: Of the step; counts in its state are moved to the device the first time.
        device: The model's.

    Attributes:
        entries: All tensors but those of ``ordinary``; first the ``owned`` ones, then A and B of all pairs.
        ordinary: Float32 parameters that are not routed.
        counts: Step counts, first those of the layers, then those of ordinary parameters.
        pairs: The entries of A and B of the merged form's pairs.
        effective: The rows of the weights of their layers.
        update_counts: How often each of these pairs was updated.
        levelled: Numbers of parameters whose gradients have other units than those of levelled scales, with the factor.
        routed: The number of experts of all layers together, ``L * E``.
        experts: The same, plus one for each ordinary parameter.
        n: The number of elements of every routed expert, all shards included.
        names: Of the layers; ``expert_names`` of a layer's experts.
        expert_groups: The number of every routed expert's group; ``expert_ratios`` are its rates as shares of the group's.
        gradients: Where the gradients of pairs lie in their buffer.
    """

    def __init__(
        self,
        layers: Sequence[RoutedLayer],
        groups: Sequence[dict[str, Any]],
        context: StepContext,
        device: torch.device,
    ):
        self._device, self._state, self._rank = device, context.state, context.ranks.shard_index
        self._number = {id(p): i for i, p in enumerate(p for group in groups for p in group["params"])}
        self._sizes = Counter[int]()
        self.entries: list[Entry] = []
        self.counts: list[Tensor] = []
        self.ordinary: list[Ordinary] = []
        self.update_counts: list[Tensor] = []
        self.levelled: list[tuple[int, float]] = []
        self.routed = sum(len(layer.experts) for layer in layers)
        self.names = tuple(layer.name for layer in layers)
        self.expert_names = layers[0].experts if layers else ()
        self.expert_ratios = [ratio for layer in layers for ratio in layer.lr_ratios]
        pairs: list[Entry] = []
        numbers = {id(group): i for i, group in enumerate(groups)}
        self.expert_groups = [numbers[id(layer.group)] for layer in layers for _ in layer.experts]
        for layer in layers:
            pairs += self._add_layer(layer, numbers[id(layer.group)])
        for i, group in enumerate(groups):
            if "module" not in group:
                self._add_ordinary(i, group)
        self.owned, self.effective = len(self.entries), [i for i, own in enumerate(self.entries) if own.effective]
        self.entries += pairs  # behind all whose gradients backward leaves
        self.pairs = list(zip(pairs[::2], pairs[1::2], strict=True))
        self.experts = self.routed + len(self.counts) - len(layers)
        self.n = [self._sizes[e] for e in range(self.routed)]
        self.gradients = PairGradients(self, 0 if context.ranks.shards is None else context.ranks.shard_count, device)

    def _entry(self, x: TensorState, number: int = -1, **how: Any) -> Entry:
        """Return the entry of a tensor, whole or sharded; ``number`` counts those of this rank, but for pairs."""
        sharded = is_sharded(x.param)
        # Distinct for every tensor of this rank; for a shard, distinct on every rank.
        stream = (number + (sharded * (self._rank + 1) << 32)) * SEED_STRIDE % 2**62
        owner, counted = self._number.get(id(x.param), -1), sharded or self._rank == 0
        own = x._replace(grad=None).local
        self._sizes[how["expert"]] += x.param.numel()
        return Entry(own, owner, sharded, stream, counted=counted, **how)

    def _own(self, x: TensorState, **how: Any) -> int:
        """Add a tensor with a gradient of its own and return its row."""
        self.entries.append(self._entry(x, len(self.entries), **how))
        return len(self.entries) - 1

    def _count(self, p: Tensor, key: str) -> Tensor:
        count: Tensor = self._state[p][key].to(self._device)
        self._state[p][key] = count
        return count

    def _add_layer(self, layer: RoutedLayer, group: int) -> list[Entry]:
        """Add a layer's tensors and return the pairs of a merged one."""
        number, pairs = len(self.counts), []
        self.counts.append(self._count(layer.group["params"][0], "step"))
        how: dict[str, Any] = {"layer": number, "group": group}
        first, decays = number * len(layer.experts), (layer.group["weight_decay"], layer.group["lora_weight_decay"])
        if isinstance(layer, BranchedLayer):
            for e, ratio in enumerate(layer.lr_ratios):
                for x in layer.tensors(e):
                    factor = layer.b_factor(x.param)
                    decay = decays[layer.experts[e] != "fft"] / factor if x.param.ndim > 1 else 0.0
                    row = self._own(x, expert=first + e, ratio=ratio * factor, decay=decay, **how)
                    self.levelled += [(self.entries[row].owner, factor)] if factor != 1 else []
            return []
        assert isinstance(layer, MergedLayer)
        weight, *biases = layer.tensors(0)
        at = self._own(weight, expert=first, ratio=1.0, decay=decays[0], effective=len(layer.experts) > 1, **how)
        for bias in biases:
            self._own(bias, expert=first, ratio=1.0, decay=0.0, **how)
        for e, (name, scale) in enumerate(zip(layer.experts[1:], layer.group["scales"], strict=True), start=1):
            self.update_counts.append(self._count(layer.base[0], f"{name}.wins"))
            A, B = (layer.pair_tensor(e, key) for key in "AB")
            how |= {"expert": first + e, "ratio": layer.lr_ratios[e], "decay": decays[1], "weight": at}
            pairs += [self._entry(A, **how), self._entry(B, scale=scale, **how)]
        return pairs

    def _add_ordinary(self, number: int, group: dict[str, Any]) -> None:
        """Add the parameters of a group that have a gradient; float32 ones need no kernel of ours."""
        fused: list[tuple[Any, ...]] = []
        for p in (p for p in group["params"] if p.grad is not None):
            x, layer = TensorState.of(p, self._state[p]), len(self.counts)
            self.counts.append(self._count(p, "step"))
            if p.dtype == torch.float32 and not x.is_quantized:
                fused.append((self._number[id(p)], *map(local, (p, x.exp_avg, x.exp_avg_sq)), self.counts[-1]))
            else:
                expert = self.routed + layer - len(self.names)
                self._own(x, expert=expert, layer=layer, group=number, ratio=1.0, decay=group["weight_decay"])
        if fused:
            self.ordinary.append(Ordinary(number, group["weight_decay"], *map(list, zip(*fused, strict=True))))


class PairGradients:
    """Where the gradients of the merged form's pairs lie: in one buffer, so that one all-reduce sums those of A.

        | dA of sharded layers | a norm per shard | dA of whole layers, all dB |
        |-------- summed over the shards ---------|

    Attributes:
        numel: Elements of the buffer.
        reduced: Elements that are summed over the shards.
        offsets: First bytes of dA and dB of every pair, in the order of the entries.
    """

    def __init__(self, plan: StepPlan, shards: int, device: torch.device):
        self._layout, self._rows = Layout(device), range(plan.owned, len(plan.entries))
        shapes = {i: plan.entries[i].tensor.param.shape for i in self._rows}
        summed = [a for a in self._rows[::2] if plan.entries[plan.entries[a].weight].sharded]
        places = {a: self._layout.place(a, shapes[a]) for a in summed}
        self.reduced = self._layout.place("norms", (shards,)) + shards
        places |= {i: self._layout.place(i, shapes[i]) for i in self._rows if i not in places}
        self.numel = self._layout.numel
        self.offsets = [4 * places[i] for i in self._rows]

    def views(self, buffer: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Return dA and dB of all pairs, and the norms of the shards, in a buffer of ``numel`` elements."""
        views = self._layout.views(buffer)
        dAs, dBs = ([views[i] for i in self._rows[start::2]] for start in (0, 1))
        return dAs, dBs, views["norms"]
