"""Reads a routing log once, from its beginning or from where it stopped, and keeps counts of a bounded size."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from molf.errors import MolfError
from molf.integrations.routing_lines import Decision, Decoder
from molf.study.results.routing import MAX_BINS, MAX_CELLS, RoutingBins, RoutingSummary

_Array = np.ndarray[Any, Any]


def read_routing(path: Path, max_cells: int = MAX_CELLS) -> RoutingSummary:
    """Summarise a routing log in either format.

    Args:
        path: The log; an incomplete last line, as a run that goes on may have, is not read.
        max_cells: Bins x layers x experts to keep at most; there is at least one bin, and at most ``MAX_BINS``.

    Raises:
        MolfError: The log is empty, or a line has another format.
    """
    reader = RoutingReader(path, max_cells)
    reader.poll()
    if (summary := reader.summary()) is None:
        raise MolfError(f"{path} holds no routed step: give a run that logged one, or remove the file to leave it out")
    return summary


class RoutingReader:
    """Summarises a routing log, also while it is written: ``poll`` reads what is new.

    Steps in which all scores are 0 decide nothing and are left out, unless all steps are of that kind: gradients are zero, or
    in older logs the learning rate is, as at the start of a warm-up.

    Memory depends on layers, experts and bins, and not on the number of steps.

    Args:
        path: The log, which need not exist yet. If a run that resumes has cut it, it is read again.
        max_cells: As in ``read_routing``.
    """

    def __init__(self, path: Path, max_cells: int = MAX_CELLS):
        self.path = path
        self._max_cells = max_cells
        self._restart()

    def _restart(self) -> None:
        self._decoder, self._offset, self._line, self._last = Decoder(), 0, 0, 0
        self._tail = b""  # the last line that was read
        self._decided = _Tally(self._max_cells)
        self._all: _Tally | None = _Tally(self._max_cells)  # until a step decides something

    def poll(self) -> bool:
        """Read the lines that were added since the last call, and return whether there were any.

        Raises:
            MolfError: A line has another format, or its step is not after that of the line before.
        """
        try:
            file = self.path.open("rb")
        except FileNotFoundError:  # not yet, or a run that starts again has just removed it
            return False
        with file:
            file.seek(self._offset - len(self._tail))
            if file.read(len(self._tail)) != self._tail:
                self._restart()
                file.seek(0)
            before = self._line
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._add(line)
                self._offset += len(line)
                self._tail = line
        return self._line > before

    def _add(self, line: bytes) -> None:
        self._line += 1
        where = f"{self.path}:{self._line}"
        decision = self._decoder.decode(line, where)
        if decision is None:
            return
        if decision.step <= self._last:
            raise MolfError(
                f"{where} has step {decision.step} after step {self._last}: keep one line per step, in order"
            )
        self._last = decision.step
        if not decision.modules:
            return
        decided = bool((decision.scores != 0).any())
        if decided:
            self._all = None
            self._decided.add(decision)
        elif self._all is not None:
            self._all.add(decision)

    def summary(self) -> RoutingSummary | None:
        """Return the summary of all that was read; None if there was no routed step."""
        for tally in (self._decided, self._all):
            if tally is not None and tally.bins:
                return tally.summary()
        return None


@dataclass
class _Bin:
    """Counts of consecutive steps: M layers, E experts."""

    first: int
    last: int
    steps: int
    wins: _Array  # [M, E]
    logged: _Array  # [M]: steps
    shares: _Array  # [E]: sum over steps of the share of layers won
    scores: _Array  # [E]: sum
    scored: _Array  # [E]: how many

    def add(self, other: "_Bin") -> None:
        self.last = other.last
        self.steps += other.steps
        for name in ("wins", "logged", "shares", "scores", "scored"):
            getattr(self, name).__iadd__(getattr(other, name))

    def widen(self, layers: int, experts: int) -> None:
        more_layers, more_experts = (0, layers - len(self.logged)), (0, experts - len(self.shares))
        self.wins, self.logged = np.pad(self.wins, (more_layers, more_experts)), np.pad(self.logged, more_layers)
        self.shares, self.scores, self.scored = (
            np.pad(sums, more_experts) for sums in (self.shares, self.scores, self.scored)
        )


class _Tally:
    """Bins of equally many consecutive steps; if there are too many, two neighbours become one."""

    def __init__(self, max_cells: int):
        self.bins: list[_Bin] = []
        self._max_cells = max_cells
        self._size = 1  # steps of a full bin
        self._layers: dict[str, int] = {}
        self._experts: dict[str, int] = {}
        self._names: tuple[Sequence[str], Sequence[str]] = ((), ())
        self._rows = self._columns = np.zeros(0, int)

    def add(self, decision: Decision) -> None:
        self._locate(decision)
        one = self._bin(decision)
        if self.bins and self.bins[-1].steps < self._size:
            self.bins[-1].add(one)
        else:
            self.bins.append(one)
        most = max(1, min(MAX_BINS, self._max_cells // (len(self._layers) * len(self._experts))))
        while len(self.bins) > most:
            self._size *= 2
            for left, right in zip(self.bins[::2], self.bins[1::2], strict=False):
                left.add(right)
            self.bins = self.bins[::2]

    def _locate(self, decision: Decision) -> None:
        """Find the rows and columns of a decision's names, with new ones for new names."""
        if self._names[0] is decision.modules and self._names[1] == decision.experts:
            return
        for known, names in ((self._layers, decision.modules), (self._experts, decision.experts)):
            for name in names:
                known.setdefault(name, len(known))
        for own in self.bins:
            own.widen(len(self._layers), len(self._experts))
        self._names = decision.modules, decision.experts
        self._rows = np.array([self._layers[name] for name in decision.modules])
        self._columns = np.array([self._experts[name] for name in decision.experts])

    def _bin(self, decision: Decision) -> _Bin:
        layers, experts = len(self._layers), len(self._experts)
        wins, logged = np.zeros((layers, experts), np.int32), np.zeros(layers, np.int32)
        shares, scores, scored = np.zeros(experts), np.zeros(experts), np.zeros(experts, np.int64)
        wins[np.ix_(self._rows, self._columns)] = decision.won
        logged[self._rows] = 1
        shares[self._columns] = decision.won.mean(0)
        finite = np.isfinite(decision.scores)
        scores[self._columns] = np.where(finite, decision.scores, 0.0).sum(0)
        scored[self._columns] = finite.sum(0)
        return _Bin(decision.step, decision.step, 1, wins, logged, shares, scores, scored)

    def summary(self) -> RoutingSummary:
        """Return the shares of all that was counted; experts that never won have a share of 0."""
        names = sorted(self._experts, key=lambda name: (name != "fft", len(name), name))
        columns = [self._experts[name] for name in names]
        steps = sum(own.steps for own in self.bins)
        wins, logged, shares = (
            np.sum([getattr(own, name) for own in self.bins], axis=0) for name in ("wins", "logged", "shares")
        )
        won = (wins / logged[:, None])[:, columns].tolist()
        totals = (shares / steps)[columns].tolist()
        return RoutingSummary(
            steps=steps,
            shares=dict(zip(names, totals, strict=True)),
            by_module={
                module: dict(zip(names, row, strict=True)) for module, row in zip(self._layers, won, strict=True)
            },
            bins=self._binned(names, columns),
        )

    def _binned(self, names: list[str], columns: list[int]) -> RoutingBins:
        with np.errstate(invalid="ignore"):  # 0 / 0 is NaN
            shares = np.stack([own.wins[:, columns] / own.logged[:, None] for own in self.bins])
            scores = np.stack([(own.scores / own.scored)[columns] for own in self.bins])
        layers = np.stack([(own.shares / own.steps)[columns] for own in self.bins])
        spans = [(own.first, own.last) for own in self.bins]
        return RoutingBins(spans, list(self._layers), names, shares, layers, scores)
