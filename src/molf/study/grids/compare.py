"""Methods side by side on one task: choose each method's settings on rows of their own, then run it with several seeds."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev

from molf.errors import MolfError
from molf.study.config.run_config import RunConfig, folder_name
from molf.study.grids.runner import Engine, GridOutcome, run_grid
from molf.study.grids.spec import Failure, RunSpec, make_spec
from molf.study.results.result import Result
from molf.tasks import get_task
from molf.tasks.base import less_is_better


@dataclass(frozen=True)
class Comparison:
    """What to compare.

    Attributes:
        candidates: For each contender, by the name to show, the settings to choose from, by label. Their ``output_dir`` and
            seed are replaced.
        seeds: Seeds of the runs that are compared. The first one is also used to choose settings.
        selection_limit: Number of rows to choose settings on; see ``molf.study.run.selection``.
        folder: Parent of all files.
        metric: Metric to choose and compare by; the task's headline if None.
        all_rates: Also run the candidates that were not chosen on the evaluation rows. The choice stays the same.
        processes: How many processes train a run together.
    """

    candidates: dict[str, dict[str, RunConfig]]
    seeds: tuple[int, ...]
    selection_limit: int
    folder: Path
    metric: str | None = None
    all_rates: bool = False
    processes: int = 1

    def __post_init__(self) -> None:
        if not self.candidates or not all(self.candidates.values()):
            raise MolfError("there is nothing to compare: give methods, e.g. --methods fft lora molf")
        for name in self.candidates:
            folder_name(name, "the name of a method")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise MolfError(f"seeds={list(self.seeds)}: give one or more different seeds")
        if self.selection_limit < 1:
            raise MolfError(f"selection_limit={self.selection_limit} must be at least 1")
        if len(tasks := self._tasks) > 1:
            raise MolfError(f"the methods have different tasks, {', '.join(tasks)}; compare one at a time")
        if self.metric is not None:
            less_is_better(get_task(self.task), self.metric)  # which must know it

    @property
    def _tasks(self) -> list[str]:
        return list(dict.fromkeys(config.task.task for own in self.candidates.values() for config in own.values()))

    @property
    def task(self) -> str:
        """The task's name."""
        (name,) = self._tasks
        return name

    @property
    def trials(self) -> dict[tuple[str, str], RunSpec]:
        """The runs that choose settings, by contender and label, for contenders that have a choice."""
        contested = [(name, label) for name, own in self.candidates.items() if len(own) > 1 for label in own]
        return {key: _spec(self, *key, self.seeds[0], select=True) for key in contested}

    def finals(self, name: str, label: str) -> list[RunSpec]:
        """Return the runs of a candidate that are compared, one per seed."""
        return [_spec(self, name, label, seed) for seed in self.seeds]


@dataclass(frozen=True)
class Contender:
    """How a method did.

    Attributes:
        name: Name to show.
        method: The method.
        chosen: Label of the chosen settings; None if no candidate could be chosen.
        selection: The metric of each candidate on the rows for selection, by label; empty if there is only one candidate.
        results: Finished runs of the chosen settings, one per seed.
        others: Finished runs of the other candidates, by label, if they were asked for.
    """

    name: str
    method: str
    chosen: str | None
    selection: dict[str, float]
    results: list[Result]
    others: dict[str, list[Result]]

    def values(self, metric: str) -> list[float]:
        """Return the metric of every run that has it."""
        return [result.metrics[metric].value for result in self.results if metric in result.metrics]

    def mean(self, metric: str) -> float | None:
        """Return the mean of a metric over seeds; None if no run has it."""
        values = self.values(metric)
        return fmean(values) if values else None

    def spread(self, metric: str) -> float | None:
        """Return the standard deviation of a metric over seeds; None for fewer than two."""
        values = self.values(metric)
        return stdev(values) if len(values) > 1 else None


@dataclass(frozen=True)
class Outcome:
    """The outcome of a comparison.

    Attributes:
        metric: Metric that settings were chosen and contenders compared by.
        contenders: The methods, in the order given.
        failures: Runs that failed.
        unfinished: Names of runs that were killed or stopped.
        less_is_better: Whether the smaller value of the metric is the better one.
    """

    metric: str
    contenders: list[Contender]
    failures: list[Failure]
    unfinished: list[str]
    less_is_better: bool = False


def compare(comparison: Comparison, engine: Engine, log: Callable[[str], None] = lambda line: None) -> Outcome:
    """Carry out a comparison.

    Each method's settings are chosen by the metric on rows that are never evaluated on otherwise
    (``molf.study.run.selection``); a tie goes to the earlier candidate. Then the chosen settings run on the task's own rows, once
    per seed. Runs that failed in an earlier call are tried again.

    Raises:
        MolfError: A folder holds a run with other settings.
    """
    task = get_task(comparison.task)
    metric = comparison.metric or task.headline
    less = less_is_better(task, metric)
    candidates = comparison.candidates
    trials = comparison.trials
    tried = _run([*trials.values()], engine, log)
    selection: dict[str, dict[str, float]] = {name: {} for name in candidates}
    for (name, label), spec in trials.items():
        if spec.name in tried.results:
            selection[name][label] = _value(tried.results[spec.name], metric)
    chosen = {
        name: best(selection[name], less) if len(own) > 1 else next(iter(own)) for name, own in candidates.items()
    }
    # With a candidate still to run, a choice could change later.
    chosen |= {name: None for (name, _), spec in trials.items() if spec.name in tried.unfinished}

    wanted = [
        (name, label)
        for name, own in candidates.items()
        for label in own
        if comparison.all_rates or label == chosen[name]
    ]
    finals = {key: comparison.finals(*key) for key in wanted}
    done = _run([spec for specs in finals.values() for spec in specs], engine, log)
    runs: dict[str, dict[str, list[Result]]] = {name: {} for name in candidates}
    for (name, label), specs in finals.items():
        runs[name][label] = [done.results[spec.name] for spec in specs if spec.name in done.results]
    contenders = [
        Contender(
            name,
            own[next(iter(own))].method.method,
            chosen[name],
            selection[name],
            runs[name].pop(chosen[name] or "", []),
            runs[name],
        )
        for name, own in candidates.items()
    ]
    return Outcome(metric, contenders, tried.failures + done.failures, tried.unfinished + done.unfinished, less)


def _run(specs: list[RunSpec], engine: Engine, log: Callable[[str], None]) -> GridOutcome:
    return run_grid(specs, engine, retry=True, log=log) if specs else GridOutcome({}, [], [])


def best(values: dict[str, float], less: bool = False) -> str | None:
    """Return the label of the largest value, or with ``less`` the smallest, the earlier one of equals; None if there is none."""
    usable = {label: -value if less else value for label, value in values.items() if not math.isnan(value)}
    return max(usable, key=lambda label: usable[label]) if usable else None


def _spec(comparison: Comparison, name: str, label: str, seed: int, select: bool = False) -> RunSpec:
    """Return the run of a candidate with a seed: on the rows to choose settings by, or on the task's own."""
    config = comparison.candidates[name][label]
    config = replace(config, train=config.train | {"seed": seed})
    if not select:
        return make_spec(comparison.folder, f"{name}-{label}-s{seed}", config, comparison.processes)
    task = replace(
        config.task,
        selection_limit=comparison.selection_limit,
        validation_limit=None,  # its rows are those for selection then
        eval_limit=None,
        eval_before=False,
        retention=False,
        retention_path=None,
    )
    folder = comparison.folder / "selection"
    return make_spec(folder, f"{name}-{label}", replace(config, task=task), comparison.processes)


def _value(result: Result, metric: str) -> float:
    if metric not in result.metrics:  # of a part of the rows, or no row decides it
        raise MolfError(f"the runs that choose settings have no metric {metric!r}, only {', '.join(result.metrics)}")
    return result.metrics[metric].value
