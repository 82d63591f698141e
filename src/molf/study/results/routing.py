"""Summary of the routing of a MoLF run: which experts won, where and when."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_BINS = 200
MAX_CELLS = 400_000
"""Bins x layers x experts that a summary keeps at most; of a mixture's thousands of matrices it has fewer bins."""

_DEPTH = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class RoutingBins:
    """The routing over time: consecutive logged steps, counted together in bins of equally many (the last may have fewer).

    Attributes:
        spans: First and last step of each bin.
        modules: The layers.
        experts: The experts.
        shares: Share of the bin's steps that an expert won in a layer [bins, modules, experts]; NaN if the layer was not logged.
        layers: Share of layers that an expert won, the mean over the bin's steps [bins, experts].
        scores: Mean score of an expert over layers and steps [bins, experts]; NaN without a finite one.
    """

    spans: list[tuple[int, int]]
    modules: list[str]
    experts: list[str]
    shares: np.ndarray[Any, Any]
    layers: np.ndarray[Any, Any]
    scores: np.ndarray[Any, Any]


@dataclass(frozen=True)
class RoutingSummary:
    """Shares of wins, between 0 and 1; those of a layer add up to top_k.

    Attributes:
        steps: Number of logged steps that decided something.
        shares: Share of layers that an expert won, the mean over steps.
        by_module: Share of steps that an expert won, by layer and expert.
        bins: The same over time.
    """

    steps: int
    shares: dict[str, float]
    by_module: dict[str, dict[str, float]]
    bins: RoutingBins

    def explained_by_kind(self) -> float | None:
        """Return ``explained_by_kind`` of the layers' ``fft`` share."""
        return explained_by_kind({module: shares.get("fft", 0.0) for module, shares in self.by_module.items()})


def explained_by_kind(share_of: Mapping[str, float]) -> float | None:
    """Return how much of the variance of the layers' shares their kind (``q_proj``, ...) explains, between 0 and 1.

    Scores see the shape of a layer as well as the data: near 1, the map says little about the data. None if all are alike.
    """
    kinds: dict[str, list[float]] = defaultdict(list)
    for module, share in share_of.items():
        kinds[kind_of(module)].append(share)
    total = np.var(list(share_of.values()))
    if total < 1e-12:
        return None
    within = sum(len(own) * np.var(own) for own in kinds.values()) / len(share_of)
    return float(1 - within / total)


def kind_of(module: str) -> str:
    """Return the kind of projection of a layer, or of a matrix in a stack: ``up_proj`` of ``layers.3.experts.up_proj[17]``.

    A parameter that is only called ``weight`` is of the kind of its module: ``gate`` of ``layers.3.gate.weight``.
    """
    return module.partition("[")[0].removesuffix(".weight").rpartition(".")[2]


def depth_of(module: str) -> str:
    """Return the depth of a layer, the first number among the parts of its name; ``-`` if there is none."""
    number = _DEPTH.search(f".{module}.")
    return number[1] if number else "-"


def in_order(depths: Iterable[str]) -> list[str]:
    """Return depths in order, without duplicates; ``-`` comes last."""
    return sorted(set(depths), key=lambda depth: (depth == "-", int(depth) if depth != "-" else 0))
