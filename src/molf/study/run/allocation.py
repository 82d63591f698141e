"""A static allocation from routing: which layers train whole and which by LoRA, within a budget of trainable parameters.

The rule has two steps. Full fine-tuning gets the share of the budget that it has of the updates; it is spent on whole layers,
those first where it won most often, and only where it won at least as often as on average. What is left goes to LoRA on the other
layers, with ranks in proportion to the mean rank of the updates that won there (full fine-tuning counts as the largest rank).
"""

import math
import random
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from molf.errors import MolfError
from molf.study.results.routing import kind_of

_LORA = re.compile(r"lora_r[1-9]\d*")

Rule = Literal["routing", "random", "kind", "uniform", "eva"]
"""How to allocate: by the routing; the same evidence shuffled among layers; its mean over each kind of projection; one rank for
all layers; the ranks of EVA."""


@dataclass(frozen=True)
class Layer:
    """What a layer costs, in parameters.

    Attributes:
        whole: To train it whole: its weight and bias.
        per_rank: One rank of LoRA, ``in + out``; 0 if LoRA cannot adapt it, as a stack of experts.
        most: The largest rank that costs less than the weight, ``in * out / (in + out)``.
    """

    whole: int
    per_rank: int
    most: int


@dataclass(frozen=True)
class Evidence:
    """What won in a layer: the share of full fine-tuning, and the mean rank of the updates (see the module)."""

    fft: float
    rank: float


@dataclass(frozen=True)
class Allocation:
    """Layers that train whole, and ranks of those that train by LoRA; all others stay as they are."""

    whole: tuple[str, ...]
    ranks: dict[str, int]

    def cost(self, layers: Mapping[str, Layer]) -> int:
        """Return how many parameters train."""
        return sum(layers[name].whole for name in self.whole) + sum(
            rank * layers[name].per_rank for name, rank in self.ranks.items()
        )


def evidence_of(by_module: Mapping[str, Mapping[str, float]]) -> dict[str, Evidence]:
    """Return what won in each layer, from the shares of its experts; the matrices of a stack count as one layer.

    Raises:
        MolfError: An expert is neither ``fft`` nor ``lora_r`` with a rank, or none won in a layer.
    """
    for expert in dict.fromkeys(expert for shares in by_module.values() for expert in shares):
        if expert != "fft" and not _LORA.fullmatch(expert):
            raise MolfError(
                f"the routing has an expert {expert!r}: a recipe is made from fft and from LoRA experts such as lora_r32"
            )
    members: dict[str, list[Mapping[str, float]]] = defaultdict(list)
    for name, shares in by_module.items():
        members[name.partition("[")[0]].append(shares)
    if idle := [name for name, own in members.items() if not any(any(shares.values()) for shares in own)]:
        raise MolfError(f"no expert won in {idle[0]}: the routing log is damaged; give another run")
    return {name: _evidence(own) for name, own in members.items()}


def _evidence(members: Sequence[Mapping[str, float]]) -> Evidence:
    shares = {expert: fmean(own[expert] for own in members) for expert in members[0]}
    ranks = {expert: int(expert.removeprefix("lora_r")) for expert in shares if expert != "fft"}
    ranks["fft"] = max(ranks.values(), default=1)
    won = sum(shares.values())  # top_k
    rank = sum(share * ranks[expert] for expert, share in shares.items()) / won
    return Evidence(shares.get("fft", 0.0) / won, rank)


def shuffled(evidence: Mapping[str, Evidence], draw: int) -> dict[str, Evidence]:
    """Return the same evidence with the layers in another order, which ``draw`` seeds."""
    values = list(evidence.values())
    random.Random(draw).shuffle(values)
    return dict(zip(evidence, values, strict=True))


def by_kind(evidence: Mapping[str, Evidence]) -> dict[str, Evidence]:
    """Return for every layer the mean over the layers of its kind of projection."""
    members: dict[str, list[Evidence]] = defaultdict(list)
    for name, own in evidence.items():
        members[kind_of(name)].append(own)
    means = {kind: Evidence(fmean(x.fft for x in own), fmean(x.rank for x in own)) for kind, own in members.items()}
    return {name: means[kind_of(name)] for name in evidence}


def allocate(evidence: Mapping[str, Evidence], layers: Mapping[str, Layer], budget: int, draw: int = 0) -> Allocation:
    """Allocate by the rule of this module.

    Args:
        evidence: What won, by layer.
        layers: What the same layers cost.
        budget: Trainable parameters; as many are used, but for less than one rank of the cheapest layer that can take one more.
        draw: Seed of the order of layers in which full fine-tuning won equally often.

    Raises:
        MolfError: The budget is too small for one rank.
    """
    mean = fmean(own.fft for own in evidence.values())
    left = math.floor(budget * mean)
    order = list(evidence)
    random.Random(draw).shuffle(order)
    whole = []
    for name in sorted(order, key=lambda name: -evidence[name].fft):
        if 0 < evidence[name].fft >= mean and layers[name].whole <= left:
            whole.append(name)
            left -= layers[name].whole
    chosen = tuple(name for name in evidence if name in set(whole))
    spent = sum(layers[name].whole for name in chosen)
    rest = {name: own.rank for name, own in evidence.items() if name not in set(chosen)}
    return Allocation(chosen, ranks_within(rest, layers, budget - spent, may_be_none=bool(chosen)))


def ranks_within(
    weights: Mapping[str, float], layers: Mapping[str, Layer], budget: int, may_be_none: bool = False
) -> dict[str, int]:
    """Return ranks in proportion to weights that use up a budget; rank 0 is left out.

    They are rounded down, then the layers take one more rank each while the budget lasts, those first that lost most by rounding.

    Raises:
        MolfError: The budget is too small for one rank, and ``may_be_none`` is False.
    """
    fit = {name: weight for name, weight in weights.items() if layers[name].per_rank and weight > 0}
    low, high = 0.0, max((layers[name].most / weight for name, weight in fit.items()), default=0.0)
    for _ in range(60):
        middle = (low + high) / 2
        cost = sum(_rank(middle, weight, layers[name]) * layers[name].per_rank for name, weight in fit.items())
        low, high = (middle, high) if cost <= budget else (low, middle)
    ranks = {name: _rank(low, weight, layers[name]) for name, weight in fit.items()}
    left = budget - sum(rank * layers[name].per_rank for name, rank in ranks.items())
    order = sorted(fit, key=lambda name: ranks[name] - low * fit[name])
    while raised := [name for name in order if ranks[name] < layers[name].most and layers[name].per_rank <= left]:
        for name in raised:
            if layers[name].per_rank <= left:
                ranks[name] += 1
                left -= layers[name].per_rank
    found = {name: rank for name, rank in ranks.items() if rank}
    if not found and not may_be_none:
        raise MolfError(f"a budget of {budget:,} parameters is too small for LoRA of rank 1 on any layer; give more")
    return found


def _rank(scale: float, weight: float, layer: Layer) -> int:
    return min(layer.most, math.floor(scale * weight))
