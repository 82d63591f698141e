"""``molf sweep``: from a command line or a file to a grid of runs, and from their results to the terminal."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from molf.cli.grid import ENGINE_HELP, GridOptions, check_ended, configs, is_axis, label, read_grid, show_runs
from molf.cli.show import console
from molf.study.grids.spec import RunSpec, make_spec

_HELP = f"""usage: molf sweep [FILE] [--SETTING VALUE ...]

Carry out a grid of `molf train` runs. Finished ones are not run again, interrupted ones resume.

  FILE, --config FILE     YAML file of all that follows; flags override it
  --methods NAME ...      methods, or some of the file's; in a file also a mapping of a name to settings
{ENGINE_HELP}
  --wait false            slurm: return once the jobs are in the queue; the same command later shows how they do
  --retry                 run failed ones again
  --output_root FOLDER    where everything goes (default: runs/sweep)

All other settings are those of `molf train`. One with several values is an axis of the grid. For a setting whose value is
a list, such as ranks, a list of lists is an axis."""


@dataclass(frozen=True)
class SweepOptions(GridOptions):
    """Options of ``molf sweep``."""

    output_root: str = "runs/sweep"
    retry: bool = False
    wait: bool = True


def sweep(argv: Sequence[str]) -> None:
    """Carry out ``molf sweep``."""
    if "--help" in argv or "-h" in argv:
        return console().print(_HELP)
    options, specs = parse_sweep(argv)

    from molf.study.grids.runner import check_runs, run_grid
    from molf.study.results.tables import runs_table

    log = console().print
    if options.dry_run:
        check_runs(specs, options.retry)
        return show_runs(specs, options.engine, log)
    with options.interruptible():
        engine = options.make_engine(log, options.wait)
        outcome = run_grid(specs, engine, retry=options.retry, log=log)
    if outcome.results:
        log(runs_table(outcome.results))
    check_ended(outcome.failures, outcome.unfinished if options.wait else [], "--retry", log)


def parse_sweep(argv: Sequence[str]) -> tuple[SweepOptions, list[RunSpec]]:
    """Return the runs that files and flags stand for, with the options."""
    methods, options = read_grid(argv, SweepOptions, default_methods=["molf"])
    specs = []
    for method, settings in methods.items():
        axes = {field: value for field, value in settings.items() if is_axis(field, value)}
        for config in configs(method, settings, axes):
            name = "-".join([method, *(label(field, config) for field in axes)])
            specs.append(make_spec(Path(options.output_root), name, config, options.nproc_per_node))
    return options, specs
