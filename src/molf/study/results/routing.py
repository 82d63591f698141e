"""Summary of the routing log of a MoLF run: which experts won, where and when."""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from molf.errors import MolfError

ROUTING_FILE = "molf_expert_selection.jsonl"
MAX_BINS = 200
MAX_CELLS = 400_000
"""Bins x layers x experts that a summary keeps at most; of a mixture's thousands of matrices it has fewer bins."""

_DEPTH = re.compile(r"\.(\d+)\.")
_DAMAGED = (ValueError, RecursionError, KeyError, TypeError, AttributeError)
_STEP = re.compile(rb'\{"step": ?(\d{1,18}),')


@dataclass(frozen=True)
class RoutingBins:
    """The routing over time: consecutive steps, counted together in bins of equal size.

    Attributes:
        spans: First and last step of each bin.
        modules: The layers.
        experts: The experts.
        shares: Share of the bin's steps that an expert won in a layer [bins, modules, experts]; NaN if the layer was not logged.
        scores: Mean score of an expert over layers and steps [bins, experts]; NaN without a finite one.
    """

    spans: list[tuple[int, int]]
    modules: list[str]
    experts: list[str]
    shares: np.ndarray[Any, Any]
    scores: np.ndarray[Any, Any]


@dataclass(frozen=True)
class RoutingSummary:
    """Shares of wins, between 0 and 1; those of a layer add up to top_k.

    Attributes:
        steps: The logged steps, in order.
        by_step: Share of layers that an expert won, by expert and step.
        by_module: Share of steps that an expert won, by layer and expert.
        bins: The same by layer and bin of steps, if the summary was read from a log.
    """

    steps: list[int]
    by_step: dict[str, list[float]]
    by_module: dict[str, dict[str, float]]
    bins: RoutingBins | None = None

    def shares(self) -> dict[str, float]:
        """Return each expert's share over all layers and steps."""
        return {expert: sum(series) / len(series) for expert, series in self.by_step.items()}

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


def read_routing(path: Path, max_cells: int = MAX_CELLS) -> RoutingSummary:
    """Summarise a routing log.

    If a step was logged twice, as after resuming, the later line counts. At a learning rate of 0, as at the start of a warm-up,
    all scores are 0: such steps decide nothing and are left out, unless all steps are of that kind.

    The log is read in two passes: one finds its steps, the other counts. Memory grows with the steps by a few numbers each,
    whatever the number of layers.

    Args:
        path: The log.
        max_cells: Bins x layers x experts to keep at most; there is at least one bin, and at most ``MAX_BINS``.

    Raises:
        MolfError: The log is empty, or a line has another format.
    """
    last = _last_lines(path)
    tally = _count(path, last, max_cells)
    if not any(tally.layers):
        tally = _count(path, last, max_cells, all_steps=True)
    if not any(tally.layers):
        raise MolfError(f"{path} holds no routed step")
    if tally.bins > (fitting := max(1, max_cells // tally.width)):  # later steps have more layers than the first
        tally = _count(path, last, fitting * tally.width, tally.all_steps, fitting)
    return tally.summary()


def _last_lines(path: Path) -> dict[int, int]:
    """Return the number of the last line of each step, by step, in order."""
    last: dict[int, int] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            found = _STEP.match(line)
            try:
                step = int(found[1]) if found else json.loads(line)["step"]
                if type(step) is not int:
                    raise TypeError(f"step {step!r} is not an integer")
            except _DAMAGED as error:
                raise _not_a_line(path, number, error) from error
            last[step] = number
    return dict(sorted(last.items()))


def _count(
    path: Path, last: dict[int, int], max_cells: int, all_steps: bool = False, bins: int | None = None
) -> "_Tally":
    """Count all lines but those that a later one replaces."""
    rank = {number: position for position, number in enumerate(last.values())}
    tally = None if bins is None else _Tally(list(last), bins, all_steps)
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number not in rank:
                continue
            try:
                selections = json.loads(line)["selections"]
                if tally is None:
                    experts = set(chain.from_iterable(chosen["scores"] for chosen in selections.values()))
                    fitting = max(1, max_cells // max(1, len(selections) * len(experts)))
                    tally = _Tally(list(last), min(len(last), MAX_BINS, fitting), all_steps)
                tally.add(rank[number], selections)
            except _DAMAGED as error:
                raise _not_a_line(path, number, error) from error
    return tally or _Tally([], 0, all_steps)


def _not_a_line(path: Path, number: int, error: Exception) -> MolfError:
    return MolfError(f"{path}:{number} is not a line of a routing log: {error!r}")


@dataclass
class _Tally:
    """Counts of a log that is being read."""

    steps: list[int]
    bins: int
    all_steps: bool  # or only those that decide something
    layers: list[int] = field(init=False)  # by step; 0 if it is left out
    wins_by_step: dict[str, list[int]] = field(init=False)
    wins: dict[str, dict[str, list[int]]] = field(init=False)  # by module, expert and bin
    logged: dict[str, list[int]] = field(init=False)  # by module and bin
    scores: dict[str, list[float]] = field(init=False)  # sums, by expert and bin
    scored: dict[str, list[int]] = field(init=False)

    def __post_init__(self) -> None:
        self.layers = [0] * len(self.steps)
        self.wins_by_step = defaultdict(lambda: [0] * len(self.steps))
        self.wins = defaultdict(lambda: defaultdict(lambda: [0] * self.bins))
        self.logged = defaultdict(lambda: [0] * self.bins)
        self.scores = defaultdict(lambda: [0.0] * self.bins)
        self.scored = defaultdict(lambda: [0] * self.bins)

    @property
    def width(self) -> int:
        """Layers x experts."""
        return len(self.logged) * len(self.wins_by_step)

    def add(self, rank: int, selections: dict[str, Any]) -> None:
        """Count a step by its position among all; one that is left out only shows which experts there are."""
        decided = self.all_steps or any(any(chosen["scores"].values()) for chosen in selections.values())
        self.layers[rank] = len(selections) if decided else 0
        here = self._bin(rank)
        for module, chosen in selections.items():
            if not isinstance(chosen["winners"], list):
                raise TypeError(f"winners {chosen['winners']!r} is not a list")
            for expert, score in chosen["scores"].items():
                self.wins_by_step[expert]
                if decided and math.isfinite(score):
                    self.scores[expert][here] += score
                    self.scored[expert][here] += 1
            for expert in set(chosen["winners"]):
                self.wins_by_step[expert][rank] += decided
                self.wins[module][expert][here] += decided
            self.logged[module][here] += decided

    def _bin(self, rank: int) -> int:
        return rank * self.bins // len(self.steps)

    def summary(self) -> RoutingSummary:
        """Return the shares of all that was counted."""
        # Experts that never won have a share of 0.
        names = sorted(self.wins_by_step, key=lambda name: (name != "fft", len(name), name))
        kept = [rank for rank, layers in enumerate(self.layers) if layers]
        by_step = {name: [self.wins_by_step[name][rank] / self.layers[rank] for rank in kept] for name in names}
        by_module = {
            module: {name: sum(self.wins[module][name]) / sum(logged) for name in names}
            for module, logged in self.logged.items()
            if any(logged)
        }
        return RoutingSummary([self.steps[rank] for rank in kept], by_step, by_module, self._bins(names, kept))

    def _bins(self, names: list[str], kept: list[int]) -> RoutingBins:
        spans: dict[int, tuple[int, int]] = {}
        for rank in kept:
            first, _ = spans.get(self._bin(rank), (self.steps[rank], 0))
            spans[self._bin(rank)] = (first, self.steps[rank])
        modules, used = [module for module, logged in self.logged.items() if any(logged)], list(spans)
        wins = np.array([[self.wins[module][name] for name in names] for module in modules], float)[:, :, used]
        logged = np.array([self.logged[module] for module in modules], float)[:, None, used]
        sums, counts = (np.array([own[name] for name in names], float)[:, used] for own in (self.scores, self.scored))
        with np.errstate(invalid="ignore"):  # 0 / 0 is NaN
            shares, scores = (wins / logged).transpose(2, 0, 1), (sums / counts).T
        return RoutingBins(list(spans.values()), modules, names, shares, scores)
