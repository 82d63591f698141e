"""The lines of a routing log: compact arrays, or the published format, which repeats all names at every step.

Letters: M routed modules, E experts.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np

from molf.errors import MolfError
from molf.routing import Routing

Format = Literal["compact", "published"]
LOG_FILES: dict[Format, str] = {"compact": "routing.jsonl", "published": "molf_expert_selection.jsonl"}
"""Name of the log by its format."""
DIGITS = 4
"""Significant digits of a score in a compact log."""

_STEP = re.compile(rb'\{"step": ?(\d{1,18}),')
_DAMAGED = (ValueError, OverflowError, RecursionError, LookupError, TypeError, AttributeError)


def find_log(folder: Path) -> Path | None:
    """Return the routing log of a run's folder in either format, the compact one first; None if it has none."""
    return next((folder / name for name in LOG_FILES.values() if (folder / name).is_file()), None)


def selection_record(step: int, routing: Routing) -> dict[str, Any]:
    """Return one line of the published log: the winners (best first) and all scores of every module at a step."""
    winners = routing.winners()
    scores = routing.scores.tolist()
    return {
        "step": step,
        "selections": {
            module: {"winners": winners[module], "scores": dict(zip(routing.experts, row, strict=True))}
            for module, row in zip(routing.modules, scores, strict=True)
        },
    }


class PublishedLines:
    """Writes the published format: a JSON object per module and step."""

    def encode(self, step: int, routing: Routing) -> str:
        """Return the line of a step."""
        return json.dumps(selection_record(step, routing)) + "\n"

    def resume(self, header: bytes) -> None:
        """Go on after a log's last header: this format has none."""


class CompactLines:
    """Writes the compact format: a header with all names, then a line of arrays per step.

    - Header: ``{"experts": [E names], "modules": [M names]}``. It stands before the first step, and again before a step that has
      new modules, with those of before first.
    - Step: ``{"step": 3, "won": [E][M] of 0 and 1, "scores": [E][M]}``, in the order of the last header. If only some of its
      modules were routed, ``"rows"`` has their positions. Scores have ``DIGITS`` significant digits; null stands for NaN and inf.
    """

    def __init__(self) -> None:
        self._experts: tuple[str, ...] = ()
        self._rows: dict[str, int] = {}

    def encode(self, step: int, routing: Routing) -> str:
        """Return the line of a step, behind a header if it has names that no earlier step had."""
        header = ""
        if routing.experts != self._experts or not self._rows.keys() >= set(routing.modules):
            self._experts = routing.experts
            for module in routing.modules:
                self._rows.setdefault(module, len(self._rows))
            header = _compact({"experts": self._experts, "modules": list(self._rows)}) + "\n"
        rows = [self._rows[module] for module in routing.modules]
        some = f'"rows":{_compact(rows)},' if rows != list(range(len(self._rows))) else ""
        won = _compact(routing.chosen.T.int().tolist())
        scores = ",".join(f"[{','.join(map(_number, column))}]" for column in routing.scores.T.tolist())
        return f'{header}{{"step":{step},{some}"won":{won},"scores":[{scores}]}}\n'

    def resume(self, header: bytes) -> None:
        """Go on after a log's last header."""
        names = json.loads(header)
        self._experts = tuple(names["experts"])
        self._rows = {module: row for row, module in enumerate(names["modules"])}


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _number(score: float) -> str:
    return f"{score:.{DIGITS}g}".replace("e-0", "e-") if math.isfinite(score) else "null"


@dataclass(frozen=True)
class Decision:
    """A step of a log.

    Attributes:
        step: The step.
        modules: Names of the M modules; the same object at the next step if nothing changed.
        experts: Names of the E experts.
        won: Who won [M, E].
        scores: The scores [M, E]; NaN for one that is not finite, 0 for one that is missing.
    """

    step: int
    modules: tuple[str, ...]
    experts: tuple[str, ...]
    won: np.ndarray[Any, Any]
    scores: np.ndarray[Any, Any]


class Decoder:
    """Reads the lines of a log in either format, in order."""

    def __init__(self) -> None:
        self._header: tuple[tuple[str, ...], tuple[str, ...]] | None = None
        self._modules: tuple[str, ...] = ()

    def decode(self, line: bytes, where: str) -> Decision | None:
        """Return the decision of a line; None for a header.

        Raises:
            MolfError: It is not a line of a routing log; ``where`` begins the message.
        """
        try:
            value = json.loads(line)
            if "modules" in value:
                self._header = _names(value["modules"], "modules"), _names(value["experts"], "experts")
                return None
            if type(value["step"]) is not int:
                raise TypeError(f"step {value['step']!r} is not an integer")
            return self._published(value) if "selections" in value else self._arrays(value)
        except _DAMAGED as error:
            raise MolfError(
                f"{where} is not a line of a routing log: {error!r}; repair or remove the line, or the file"
            ) from error

    def _arrays(self, value: dict[str, Any]) -> Decision:
        if self._header is None:
            raise ValueError("no header before the first step")
        modules, experts = self._header
        if not experts:
            raise ValueError("no experts")
        if "rows" in value:
            if min(value["rows"], default=0) < 0:
                raise ValueError(f"rows has {min(value['rows'])}, which is no position")
            modules = tuple(modules[row] for row in value["rows"])
        modules = self._same(modules)
        won, scores = (_matrix(value[name], (len(experts), len(modules)), name) for name in ("won", "scores"))
        return Decision(value["step"], modules, experts, won.astype(bool), scores)

    def _published(self, value: dict[str, Any]) -> Decision:
        selections = value["selections"]
        modules = self._same(tuple(selections))
        named = [[*own["scores"], *_names(own["winners"], "winners")] for own in selections.values()]
        experts = tuple(dict.fromkeys(chain.from_iterable(named)))
        if modules and not experts:
            raise ValueError("no experts")
        own_scores = [[own["scores"].get(expert, 0.0) for own in selections.values()] for expert in experts]
        scores = _matrix(own_scores, (len(experts), len(modules)), "scores")
        won = [[expert in own["winners"] for expert in experts] for own in selections.values()]
        return Decision(value["step"], modules, experts, np.array(won, bool).reshape(scores.shape), scores)

    def _same(self, modules: tuple[str, ...]) -> tuple[str, ...]:
        """Return the names of the step before if these are the same."""
        if modules != self._modules:
            self._modules = modules
        return self._modules


def _names(given: Any, what: str) -> tuple[str, ...]:
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        raise TypeError(f"{what} {given!r} is not a list of names")
    if len(set(given)) < len(given):
        raise ValueError(f"{what} has a name twice")
    return tuple(given)


def _matrix(given: Any, shape: tuple[int, int], name: str) -> np.ndarray[Any, Any]:
    """Return numbers ``[E][M]`` as ``[M, E]``; null becomes NaN."""
    for value in chain.from_iterable(given):
        if not isinstance(value, int | float | None):
            raise TypeError(f"{name} has {value!r}, which is not a number")
    found = np.array(given, float).reshape(shape if 0 in shape else np.shape(given))
    if found.shape != shape:
        raise ValueError(f"{name} is {list(found.shape)}, but there are {shape[0]} experts and {shape[1]} modules")
    return found.T


def lines_until(path: Path, step: int) -> Iterator[tuple[bytes, bool]]:
    """Yield the lines of a log up to a step, each with whether it is a header; without the last line if a kill cut it short.

    A header is left out if no step that is kept comes after it.

    Raises:
        MolfError: A line is damaged.
    """
    header = None
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            at = _step_of(line, f"{path}, line {number}")
            if at is None:
                header = line
            elif at <= step:
                if header is not None:
                    yield header, True
                    header = None
                yield line, False


def _step_of(line: bytes, where: str) -> int | None:
    """Return the step of a line; None for a header."""
    if found := _STEP.match(line):
        return int(found[1])
    try:
        value = json.loads(line)
        if "modules" in value:
            CompactLines().resume(line)  # which it must allow
            return None
        return int(value["step"])
    except _DAMAGED as error:
        raise MolfError(
            f"{where}: not a line of a routing log ({error!r}); repair or remove the line to resume from a checkpoint"
        ) from error
