"""What ``molf compare`` and ``molf sweep`` have in common: skip finished runs, hand the others to an engine, read the results."""

import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

import yaml

from molf.errors import MolfError
from molf.files import typed
from molf.integrations.checkpoint_folder import MANIFEST, PREFIX, UNFINISHED, checkpoints
from molf.study.config.fields import Level
from molf.study.config.sameness import differing
from molf.study.faults.trained import TRAINED_FILE
from molf.study.grids.spec import FAILED, Failure, RunSpec
from molf.study.methods.checkpoint_settings import PROCESSES, read_settings
from molf.study.results.result import Result, read_result
from molf.study.run.run_folder import check_foreign, check_name


class Engine(Protocol):
    """Executes runs: on this machine or on a cluster."""

    def run(self, specs: Sequence[RunSpec]) -> Generator[RunSpec, None, None]:
        """Carry out runs and yield each one when it has ended, however it ended."""


@dataclass(frozen=True)
class GridOutcome:
    """What became of the runs, in their order.

    Attributes:
        results: Results of finished runs, by name.
        failures: Runs that failed, now or in an earlier call.
        unfinished: Names of runs that were killed or stopped, or have not started.
    """

    results: dict[str, Result]
    failures: list[Failure]
    unfinished: list[str]


def run_grid(
    specs: Sequence[RunSpec], engine: Engine, *, retry: bool = False, log: Callable[[str], None] = lambda line: None
) -> GridOutcome:
    """Carry out the runs that are not finished.

    Args:
        specs: The runs, each with a name of its own.
        engine: Where to run them.
        retry: Also run those that failed in an earlier call.
        log: Called with a line of progress.

    Raises:
        MolfError: Two runs have one name, a folder holds a run with other settings, or the engine refuses the runs.
    """
    to_run = check_runs(specs, retry)
    done = sum(spec.state == "finished" for spec in specs)
    log(f"{done} of {len(specs)} runs are finished; {len(to_run)} to run")
    for spec in to_run:
        spec.write_settings()
        spec.beside(FAILED).unlink(missing_ok=True)
    with closing(engine.run(to_run)) as ended:
        for spec in ended:
            log(_ending(spec))
    return GridOutcome(
        results={spec.name: checked_result(spec) for spec in specs if spec.state == "finished"},
        failures=[failure for spec in specs if (failure := spec.failure) is not None],
        unfinished=[spec.name for spec in specs if spec.state in ("new", "interrupted")],
    )


def check_runs(specs: Sequence[RunSpec], retry: bool = False) -> list[RunSpec]:
    """Return the runs to carry out, and write nothing.

    Raises:
        MolfError: There are none at all, two have one name, or a folder holds a run with other settings.
    """
    _check_names(specs)
    for spec in specs:
        check_name(spec.folder)
    states = {spec.name: spec.state for spec in specs}
    for spec in specs:
        if states[spec.name] == "finished":
            checked_result(spec)
    wanted = ("new", "interrupted", "failed") if retry else ("new", "interrupted")
    to_run = [spec for spec in specs if states[spec.name] in wanted]
    for spec in to_run:
        _check(spec)
    return to_run


def _check_names(specs: Sequence[RunSpec]) -> None:
    if not specs:
        raise MolfError("there is nothing to run")
    names = [spec.name for spec in specs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise MolfError(
            f"two runs have the name {twice}; give their methods different names, or use another output_root"
        )


def checked_result(spec: RunSpec) -> Result:
    """Return the result of a finished run.

    Raises:
        MolfError: It was run with other settings.
    """
    result = read_result(spec.folder)
    processes = None if result.training is None else result.training.processes
    _check_same(spec, "a run", result.config, processes, "evaluation")
    return result


def _check(spec: RunSpec) -> None:
    """Refuse to replace files that are not of an earlier attempt, and to resume what a run with other settings left."""
    check_foreign(spec.folder)
    if not os.path.lexists(spec.settings_file):
        return
    earlier = _written_settings(spec)
    left = checkpoints(spec.folder)
    sealed = (spec.folder / UNFINISHED).glob(f"{PREFIX}*/{MANIFEST}")
    if left or any(sealed) or (spec.folder / TRAINED_FILE).is_file():
        processes = read_settings(left[-1]).get(PROCESSES) if left else None
        _check_same(spec, "an unfinished run", earlier, processes, "training")


def _written_settings(spec: RunSpec) -> dict[str, Any]:
    try:
        earlier: dict[str, Any] = typed(dict[str, Any], yaml.safe_load(spec.settings_file.read_text(encoding="utf-8")))
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        raise MolfError(
            f"{spec.settings_file} is damaged ({error}), or not the settings file of an earlier run; restore or move it"
        ) from error
    # The files that a user writes for a grid have neither: it sets them for every run.
    if earlier.get("run_name") != spec.name or "output_dir" not in earlier:
        raise MolfError(
            f"{spec.settings_file} is not the settings file of an earlier run, and this one would replace it; move it, or "
            "choose another output_root"
        )
    return earlier


def _check_same(spec: RunSpec, what: str, settings: Mapping[str, Any], processes: int | None, level: Level) -> None:
    different = differing(settings, spec.config, level)
    if processes not in (None, spec.processes):  # the same settings make other batches then
        different.append(f"nproc_per_node={processes} (here {spec.processes})")
    if different:
        raise MolfError(
            f"{spec.folder} holds {what} with {', '.join(different)}; use the same settings, remove the folder or choose "
            "another output_root"
        )


def _ending(spec: RunSpec) -> str:
    if (failure := spec.failure) is not None:
        return f"{spec.folder} failed with status {failure.status}"
    if spec.state == "finished":
        return f"{spec.folder} finished"
    return f"{spec.folder} was interrupted; the same command resumes it"
