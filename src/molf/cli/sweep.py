"""``molf sweep``: a grid of runs, and the engine that carries them out."""

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from molf.cli.sweep_request import Request, parse_sweep
from molf.study.grids.spec import failure_message

if TYPE_CHECKING:
    from molf.study.grids.runner import Engine

_HELP = """usage: molf sweep [FILE] [--SETTING VALUE ...]

Carry out a grid of `molf train` runs. Finished ones are not run again, interrupted ones go on.

  FILE                    YAML file of all that follows; flags win
  --engine local|slurm    processes of this machine, or a SLURM job array (default: local)
  --jobs N                local: how many runs at a time (default: 1)
  --nproc_per_node N      how many processes of one machine train a run together, as with torchrun (default: 1)
  --partition NAME, --time MINUTES, --gpus_per_node N, --cpus_per_task N, --mem_gb N, --account NAME, --qos NAME,
  --constraint NAME, --array_parallelism N, --signal_delay_s SECONDS
                          slurm: what each job asks for; in a file under `slurm:`, with `setup` and `sbatch` beside
  --wait false            slurm: return once the jobs are in the queue; the same command later shows how they do
  --retry                 run failed ones again
  --keep_models           keep the trained weights
  --methods NAME ...      methods, or some of the file's; in a file also a mapping of a name to settings
  --output_root FOLDER    where everything goes (default: runs/sweep)
  --dry_run               list the runs and their commands, and stop

All other settings are those of `molf train`. One with several values is an axis of the grid. For a setting whose value is
a list, such as ranks, a list of lists is an axis."""


def sweep(argv: Sequence[str]) -> None:
    """Carry out ``molf sweep``.

    Raises:
        ValueError: The settings make no sweep, or some runs are not finished at the end; the others are shown before.
    """
    if "--help" in argv or "-h" in argv:
        return print(_HELP)
    request = parse_sweep(argv)

    from molf.study.grids import runner as study
    from molf.study.results.tables import runs_table

    console = Console(soft_wrap=True, highlight=False)

    def tell(line: str) -> None:
        console.print(line, markup=False)

    study.check_names(request.cells)
    if request.own["dry_run"]:
        return _list(request, tell)
    engine = _engine(request, tell)
    try:
        outcome = study.sweep(request.cells, engine, retry=request.own["retry"], tell=tell)
    except KeyboardInterrupt:
        raise ValueError(f"interrupted; {_after_interrupt(request)}") from None
    if outcome.results:
        console.print(runs_table(outcome.results))
    for failure in outcome.failures:
        tell(failure_message(failure))
    problems = [f"{len(outcome.failures)} runs failed: --retry runs them again"] if outcome.failures else []
    if outcome.unfinished and request.own["wait"]:
        problems.append(f"{len(outcome.unfinished)} runs are not finished: the same command goes on with them")
    if problems:
        raise ValueError("; ".join(problems))


def _engine(request: Request, tell: Any) -> "Engine":
    from molf.study.grids.local import LocalEngine, visible_devices
    from molf.study.grids.slurm import SlurmEngine

    own = request.own
    if own["engine"] == "slurm":
        return SlurmEngine(request.folder / "jobs", request.slurm, own["keep_models"], own["wait"], tell)
    return LocalEngine(own["jobs"], visible_devices(), own["keep_models"])


def _list(request: Request, tell: Any) -> None:
    from molf.study.grids.runner import state_of

    for cell in request.cells:
        tell(f"{state_of(cell):<11}  {shlex.join(cell.command)}")
    tell(f"dry run: nothing was started; {len(request.cells)} runs, by --engine {request.own['engine']}")


def _after_interrupt(request: Request) -> str:
    if request.own["engine"] == "slurm":
        return "the jobs stay in the queue, and the same command shows how they do"
    return "runs have saved what they could, and the same command goes on with them"
