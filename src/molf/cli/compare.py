"""``molf compare``: from a command line or a file to a comparison, and from its outcome to the terminal."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molf.cli.grid import ENGINE_HELP, GridOptions, as_list, check_ended, configs, label, read_grid, show_runs
from molf.cli.show import console
from molf.errors import MolfError, UsageError
from molf.study.config.run_config import RunConfig

if TYPE_CHECKING:
    from molf.study.grids.compare import Comparison

AXES = ("learning_rate", "lora_learning_rate", "lr_scheduler_type")
"""Settings that may be a list of values to choose from."""

_HELP = f"""usage: molf compare [FILE] [--SETTING VALUE ...]

Compare methods on a task with `molf train` runs. Finished ones are not run again, interrupted ones resume.

  FILE, --config FILE     YAML file of all that follows; flags override it
  --methods NAME ...      methods, or some of the file's; in a file also a mapping of a name to settings
  --seeds N ...           seeds of the runs that are compared (default: 42)
  --selection_limit N     rows to choose rates and schedules on, none of them evaluated on otherwise (default: 100)
  --metric NAME           metric to choose and compare by (default: the task's headline)
  --all_rates             run every rate on the evaluation rows, not only the chosen one
{ENGINE_HELP}
  --output_root FOLDER    where everything goes (default: runs/compare)

learning_rate, lora_learning_rate and lr_scheduler_type may be lists. All other settings are those of `molf train`."""


@dataclass(frozen=True)
class CompareOptions(GridOptions):
    """Options of ``molf compare``."""

    output_root: str = "runs/compare"
    seeds: list[int] = field(default_factory=lambda: [42])
    selection_limit: int = 100
    metric: str | None = None
    all_rates: bool = False


def compare(argv: Sequence[str]) -> None:
    """Carry out ``molf compare``."""
    if "--help" in argv or "-h" in argv:
        return console().print(_HELP)
    options, comparison = parse_comparison(argv)
    log = console().print
    if options.dry_run:
        return _show_runs(options, comparison, log)

    from molf.study.grids import compare as study
    from molf.study.grids.compare_report import comparison_table, verdict, write_comparison

    with options.interruptible():
        outcome = study.compare(comparison, options.make_engine(log), log)
    files = write_comparison(outcome, comparison.folder)
    log(comparison_table(outcome))
    log(verdict(outcome))
    log("written to " + ", ".join(map(str, files)))
    check_ended(outcome.failures, outcome.unfinished, "once the cause is gone, the same command", log)


def _show_runs(options: CompareOptions, comparison: "Comparison", log: Callable[[str], None]) -> None:
    """List the runs that choose settings, then those whose settings are known already."""
    from molf.study.grids.runner import check_runs

    trials = comparison.trials
    waiting = {name for name, _ in trials}
    finals = [
        spec
        for name, own in comparison.candidates.items()
        if comparison.all_rates or name not in waiting
        for label in own
        for spec in comparison.finals(name, label)
    ]
    for specs in ([*trials.values()], finals):
        if specs:
            check_runs(specs, retry=True)
    later = 0 if comparison.all_rates else len(waiting) * len(comparison.seeds)
    show_runs([*trials.values(), *finals], options.engine, log, later)


def parse_comparison(argv: Sequence[str]) -> tuple[CompareOptions, "Comparison"]:
    """Build a comparison from files and flags, and return it with the options."""
    methods, options = read_grid(argv, CompareOptions, per_run=["seed"])
    candidates = {name: _candidates(name, settings) for name, settings in methods.items()}

    from molf.study.grids.compare import Comparison

    try:
        comparison = Comparison(
            candidates=candidates,
            seeds=tuple(options.seeds),
            selection_limit=options.selection_limit,
            folder=Path(options.output_root),
            metric=options.metric,
            all_rates=options.all_rates,
            processes=options.nproc_per_node,
        )
    except MolfError as error:
        raise UsageError(str(error)) from error
    return options, comparison


def _candidates(name: str, settings: Mapping[str, Any]) -> dict[str, RunConfig]:
    """Return the settings to choose from, by label: all combinations of the listed rates and schedules."""
    axes = {axis: as_list(settings[axis]) for axis in AXES if axis in settings}
    varied = [axis for axis in axes if len(axes[axis]) > 1] or list(axes)[:1]
    candidates: dict[str, RunConfig] = {}
    for config in configs(name, settings, axes):
        own = "-".join(label(axis, config) for axis in varied) or "default"
        if own in candidates:
            raise UsageError(
                f"{name} has two candidates called {own}: give values that differ in their first six digits"
            )
        candidates[own] = config
    return candidates
