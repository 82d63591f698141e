"""Methods side by side on one task: settings chosen on rows of their own, then every method with several seeds.

A finished cell (``molf.study.grids.spec``) is not run again, so an interrupted comparison goes on where it was.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev

from molf.study.config.run_config import RunConfig
from molf.study.grids.spec import Failure, RunSpec, carry_out, make_spec
from molf.study.results.result import Result
from molf.tasks import get_task


@dataclass(frozen=True)
class Comparison:
    """What to compare.

    Attributes:
        candidates: For each contender, by the name to show, the settings to choose among, by label. ``output_dir`` and the
            seed in them do not matter.
        seeds: Seeds of the runs that are compared; the first one's is that of the selection too.
        selection_limit: How many rows to choose settings by; see ``molf.study.run.selection``.
        folder: Parent of all that is written.
        metric: What to choose and compare by; the task's headline if None.
        all_rates: Run all candidates on the evaluation rows, not only the chosen ones; the choice stays the same.
        keep_models: Keep the trained weights.
    """

    candidates: dict[str, dict[str, RunConfig]]
    seeds: tuple[int, ...]
    selection_limit: int
    folder: Path
    metric: str | None = None
    all_rates: bool = False
    keep_models: bool = False

    def __post_init__(self) -> None:
        if not self.candidates or not all(self.candidates.values()):
            raise ValueError("there is nothing to compare: give methods, e.g. --methods fft lora molf")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={list(self.seeds)}: give one or more different seeds")
        if self.selection_limit < 1:
            raise ValueError(f"selection_limit={self.selection_limit} must be at least 1")

    @property
    def task(self) -> str:
        """The task's name.

        Raises:
            ValueError: The candidates have different tasks.
        """
        (name, *others) = {config.task.task for own in self.candidates.values() for config in own.values()}
        if others:
            raise ValueError(f"the methods have different tasks, {', '.join([name, *others])}; compare one at a time")
        return name


@dataclass(frozen=True)
class Contender:
    """How a method did.

    Attributes:
        name: Name to show.
        method: The method.
        chosen: Label of the chosen settings, or None where all candidates failed.
        selection: What each candidate reached on the rows for selection, by label; empty where there was one only.
        results: The finished runs of the chosen settings, one per seed.
        others: Those of the other candidates, by label, where they were asked for.
    """

    name: str
    method: str
    chosen: str | None
    selection: dict[str, float]
    results: list[Result]
    others: dict[str, list[Result]]

    def mean(self, metric: str) -> float | None:
        """Return the mean of a metric over seeds, or None without a run that has it."""
        values = self._values(metric)
        return fmean(values) if values else None

    def spread(self, metric: str) -> float | None:
        """Return the standard deviation of a metric over seeds, or None for fewer than two."""
        values = self._values(metric)
        return stdev(values) if len(values) > 1 else None

    def _values(self, metric: str) -> list[float]:
        return [result.metrics[metric].value for result in self.results if metric in result.metrics]


@dataclass(frozen=True)
class Outcome:
    """A finished comparison.

    Attributes:
        metric: What was chosen and compared by.
        contenders: The methods, in the order given.
        failures: The cells that did not finish.
    """

    metric: str
    contenders: list[Contender]
    failures: list[Failure]


def compare(comparison: Comparison, tell: Callable[[str], None] = lambda line: None) -> Outcome:
    """Carry out a comparison.

    Each method's settings are chosen by the metric on rows that are never evaluated on otherwise
    (``molf.study.run.selection``), a tie going to the earlier candidate; a method with one candidate needs no choice. Then
    the chosen settings run on the task's own rows, once per seed.

    Args:
        comparison: What to compare.
        tell: Called with a line about each cell as it starts or fails.

    Raises:
        ValueError: A folder holds a run with other settings.
    """
    metric = comparison.metric or get_task(comparison.task).headline
    failures: list[Failure] = []

    def finished(cells: Iterable[RunSpec]) -> list[Result]:
        outcomes = [carry_out(cell, comparison.keep_models, tell) for cell in cells]
        failures.extend(outcome for outcome in outcomes if isinstance(outcome, Failure))
        return [outcome for outcome in outcomes if isinstance(outcome, Result)]

    contenders = []
    for name, candidates in comparison.candidates.items():
        selection = {}
        if len(candidates) > 1:
            for label in candidates:
                for result in finished([selection_cell(comparison, name, label)]):
                    selection[label] = _value(result, metric)
        chosen = best(selection) if len(candidates) > 1 else next(iter(candidates))
        wanted = [label for label in candidates if comparison.all_rates or label == chosen]
        runs = {label: finished(final_cells(comparison, name, label)) for label in wanted}
        method = next(iter(candidates.values())).method.method
        contenders.append(Contender(name, method, chosen, selection, runs.pop(chosen or "", []), runs))
    return Outcome(metric, contenders, failures)


def best(values: dict[str, float]) -> str | None:
    """Return the label of the largest value, the earlier of equals; None where there is none."""
    usable = {label: value for label, value in values.items() if not math.isnan(value)}
    return max(usable, key=lambda label: usable[label]) if usable else None


def selection_cell(comparison: Comparison, name: str, label: str) -> RunSpec:
    """Return the run that a candidate is chosen by."""
    config = comparison.candidates[name][label]
    task = replace(config.task, selection_limit=comparison.selection_limit, eval_limit=None, eval_before=False)
    return _cell(comparison.folder / "selection", f"{name}-{label}", replace(config, task=task), comparison.seeds[0])


def final_cells(comparison: Comparison, name: str, label: str) -> list[RunSpec]:
    """Return the runs that a contender is judged by, one per seed."""
    config = comparison.candidates[name][label]
    return [_cell(comparison.folder, f"{name}-{label}-s{seed}", config, seed) for seed in comparison.seeds]


def _cell(parent: Path, name: str, config: RunConfig, seed: int) -> RunSpec:
    return make_spec(parent, name, replace(config, train=config.train | {"seed": seed}))


def _value(result: Result, metric: str) -> float:
    if metric not in result.metrics:
        raise ValueError(f"the task has no metric {metric!r}; it has {', '.join(result.metrics)}")
    return result.metrics[metric].value
