"""A sweep: cells that are finished are taken as they are, the others are handed to an engine."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import yaml

from molf.integrations.checkpoint_folder import checkpoints
from molf.study.grids.attempt import FAILED, failure_status, has_checkpoint
from molf.study.grids.spec import Failure, RunSpec, checked_result, failure_of, write_settings
from molf.study.methods.made_with import PROCESSES, made_with
from molf.study.results.result import Result


class Engine(Protocol):
    """What carries out cells."""

    def run(self, cells: Sequence[RunSpec]) -> Iterator[RunSpec]:
        """Run cells and yield each when it has ended, however it did."""


@dataclass(frozen=True)
class Outcome:
    """What became of the cells, in their order.

    Attributes:
        results: Results of the finished ones, by name.
        failures: Those that failed, now or in an earlier call.
        unfinished: Names of those that were killed or stopped, or are still to run.
    """

    results: dict[str, Result]
    failures: list[Failure]
    unfinished: list[str]


def state_of(cell: RunSpec) -> str:
    """Say in one word how far a cell is: finished, failed, interrupted or new."""
    if cell.finished:
        return "finished"
    if failure_status(cell) is not None:
        return "failed"
    return "interrupted" if cell.log.exists() else "new"


def sweep(
    cells: Sequence[RunSpec], engine: Engine, *, retry: bool = False, tell: Callable[[str], None] = lambda line: None
) -> Outcome:
    """Carry out the cells that are not finished.

    Args:
        cells: The cells, each with a name of its own.
        engine: What runs them.
        retry: Run those again that failed before.
        tell: Called with a line about each cell.

    Raises:
        ValueError: Two cells have one name, a folder holds a run with other settings, or the engine cannot run them.
    """
    check_names(cells)
    states = {cell.name: state_of(cell) for cell in cells}
    done = [checked_result(cell) for cell in cells if states[cell.name] == "finished"]
    open_cells = [cell for cell in cells if states[cell.name] in ("new", "interrupted")]
    open_cells += [cell for cell in cells if states[cell.name] == "failed" and retry]
    tell(f"{len(done)} of {len(cells)} runs are finished; {len(open_cells)} to run")
    for cell in open_cells:
        _prepare(cell)
    for cell in engine.run(open_cells):
        tell(_ending(cell))
    return outcome_of(cells)


def outcome_of(cells: Sequence[RunSpec]) -> Outcome:
    """Read what has become of cells."""
    failed = {cell.name: status for cell in cells if not cell.finished and (status := failure_status(cell)) is not None}
    return Outcome(
        results={cell.name: checked_result(cell) for cell in cells if cell.finished},
        failures=[failure_of(cell, failed[cell.name]) for cell in cells if cell.name in failed],
        unfinished=[cell.name for cell in cells if not cell.finished and cell.name not in failed],
    )


def check_names(cells: Sequence[RunSpec]) -> None:
    """Refuse cells that would write over each other.

    Raises:
        ValueError: There are none, or two have one name.
    """
    if not cells:
        raise ValueError("there is nothing to run")
    names = [cell.name for cell in cells]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two runs have the name {name}; give their methods different names, or use two sweeps")


def _prepare(cell: RunSpec) -> None:
    """Write a cell's settings; a checkpoint of others is not gone on from."""
    wanted = cell.config.to_dict()
    if has_checkpoint(cell) and cell.settings.is_file():
        earlier = yaml.safe_load(cell.settings.read_text(encoding="utf-8"))
        different = [name for name, value in wanted.items() if name in earlier and earlier[name] != value]
        if different:
            raise ValueError(
                f"{cell.folder} holds checkpoints of a run with another {', '.join(different)}; remove it or choose "
                "another output_root"
            )
        _check_processes(cell)
    write_settings(cell)
    cell.beside(FAILED).unlink(missing_ok=True)


def _check_processes(cell: RunSpec) -> None:
    """Refuse another number of processes than a checkpoint's: with the same settings, it makes other batches."""
    there = checkpoints(cell.folder)
    earlier = made_with(there[-1]).get(PROCESSES) if there else None
    if earlier not in (None, cell.processes):
        raise ValueError(
            f"{cell.folder} holds checkpoints of a run on {earlier} processes, and on {cell.processes} its steps would have "
            f"other batches: go on with --nproc_per_node {earlier}, or choose another output_root"
        )


def _ending(cell: RunSpec) -> str:
    if cell.finished:
        return f"{cell.folder} finished"
    if (status := failure_status(cell)) is not None:
        return f"{cell.folder} failed with status {status}"
    return f"{cell.folder} was interrupted; the same command goes on with it"
