"""``molf compare``: from a command line or a file to a comparison, and from its outcome to the terminal."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from molf.cli.grid import as_list, as_switch, configs, contenders
from molf.cli.names import PUBLISHED_NAMES
from molf.cli.parsing import CONFIG_FLAG, read_flags, read_yaml
from molf.errors import UsageError
from molf.study.config.run_config import RunConfig

if TYPE_CHECKING:
    from molf.study.grids.compare import Comparison

GRID = {"learning_rate": "lr", "lora_learning_rate": "lora", "lr_scheduler_type": ""}
"""Settings that may be a list of values to choose among, and how they begin in a label."""

_OWN = ("methods", "seeds", "selection_limit", "metric", "all_rates", "keep_models")
_DEFAULTS: dict[str, Any] = {"seeds": [42], "selection_limit": 100, "output_root": "runs/compare"}
_HELP = """usage: molf compare [--config FILE] [--SETTING VALUE ...]

Compare methods on a task. Every cell is a `molf train` run; finished ones are not run again.

  --config FILE           YAML file of all that follows
  --methods NAME ...      methods, or some of the file's; in a file also a mapping of a name to settings
  --seeds N ...           seeds of the runs that are compared (default: 42)
  --selection_limit N     rows to choose rates and schedules by, none of them evaluated on otherwise (default: 100)
  --metric NAME           metric to choose and compare by (default: the task's headline)
  --all_rates             run every rate on the evaluation rows, not only the chosen one
  --keep_models           keep the trained weights
  --output_root FOLDER    where everything goes (default: runs/compare)

learning_rate, lora_learning_rate and lr_scheduler_type may be lists. All other settings are those of `molf train`."""


def compare(argv: Sequence[str]) -> None:
    """Carry out ``molf compare``.

    Raises:
        ValueError: The settings make no comparison, or some cells failed; what the others gave is shown before.
    """
    if "--help" in argv or "-h" in argv:
        return print(_HELP)
    comparison = parse_comparison(argv)

    from molf.study.grids import compare as study
    from molf.study.grids.compare_report import comparison_table, verdict, write_comparison

    console = Console(soft_wrap=True, highlight=False)
    outcome = study.compare(comparison, tell=lambda line: console.print(line, markup=False))
    files = write_comparison(outcome, comparison.folder)
    console.print(comparison_table(outcome))
    console.print(verdict(outcome), markup=False)
    console.print("written to " + ", ".join(map(str, files)), markup=False)
    if outcome.failures:
        raise ValueError(
            f"{len(outcome.failures)} cells failed; once the cause is gone, the same command runs these only"
        )


def parse_comparison(argv: Sequence[str]) -> "Comparison":
    """Build a comparison from flags and ``--config`` files; flags win over files, and what a method sets over both.

    Raises:
        UsageError: A setting is unknown, misplaced or not usable.
        OSError: A file cannot be read.
    """
    flags = read_flags(argv)
    settings: dict[str, Any] = dict(_DEFAULTS)
    methods: Any = None
    for path in [value for name, value in flags if name == CONFIG_FLAG]:
        given = read_yaml(path)
        methods = given.pop("methods", methods)
        settings |= {_field(name): value for name, value in given.items()}
    settings |= {_field(name): value for name, value in flags if name not in (CONFIG_FLAG, "methods")}
    methods = contenders(methods, [as_list(value) for name, value in flags if name == "methods"])
    own = {name: settings.pop(name) for name in _OWN if name in settings}
    root = Path(str(settings.pop("output_root")))
    candidates = {name: _candidates(name, settings, more) for name, more in methods.items()}

    from molf.study.grids.compare import Comparison

    try:
        return Comparison(
            candidates=candidates,
            seeds=tuple(int(seed) for seed in as_list(own["seeds"])),
            selection_limit=int(own["selection_limit"]),
            folder=root,
            metric=own.get("metric"),
            all_rates=as_switch("all_rates", own.get("all_rates", False)),
            keep_models=as_switch("keep_models", own.get("keep_models", False)),
        )
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error


def _field(name: str) -> str:
    spelled = name.replace("-", "_")
    field = PUBLISHED_NAMES.get(spelled, spelled)
    if field in ("seed", "output_dir", "run_name", "only_eval"):
        raise UsageError(f"{name} is set for every cell by the comparison; use seeds and output_root")
    return field


def _candidates(name: str, shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, RunConfig]:
    """Return the settings to choose among, by label: all combinations of the listed rates and schedules."""
    settings = {"method": name, **shared, **{_field(key): value for key, value in own.items()}}
    grid = {field: as_list(settings[field]) for field in GRID if field in settings}
    varied = [field for field in grid if len(grid[field]) > 1] or list(grid)[:1]
    found = configs(name, settings, grid)
    return {"-".join(_label(field, config) for field in varied) or "default": config for config in found}


def _label(field: str, config: RunConfig) -> str:
    value = config.method.lora_learning_rate if field == "lora_learning_rate" else config.train[field]
    return f"{GRID[field]}{value:g}" if isinstance(value, float) else str(value)
