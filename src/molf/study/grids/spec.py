"""One run among many: its settings in a file, what it prints in a log, and a folder with its result, all side by side.

Each cell is a ``molf train`` run in a process and a folder of its own, so that memory is returned and a crash stays there.
"""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from molf.files import atomic_write
from molf.study.config.run_config import RunConfig
from molf.study.results.result import RESULT_FILE, Result, read_result

_TAIL = 15  # lines of a failed cell's log


@dataclass(frozen=True)
class RunSpec:
    """One run among many.

    Attributes:
        name: Name of its folder.
        config: Its settings.
        processes: How many processes of one machine train it together.
    """

    name: str
    config: RunConfig
    processes: int = 1

    @property
    def folder(self) -> Path:
        """Where it writes."""
        return self.config.output_dir

    @property
    def settings(self) -> Path:
        """The file of its settings."""
        return self.beside(".yaml")

    @property
    def log(self) -> Path:
        """What it printed."""
        return self.beside(".log")

    @property
    def command(self) -> list[str]:
        """What starts it."""
        several = ["-m", "molf.study.torchrun", "--standalone", f"--nproc_per_node={self.processes}"]
        launcher = several if self.processes > 1 else []
        return [sys.executable, *launcher, "-m", "molf", "train", "--config", str(self.settings)]

    @property
    def finished(self) -> bool:
        """Whether it has left its result, which a run writes last."""
        return (self.folder / RESULT_FILE).is_file()

    def beside(self, suffix: str) -> Path:
        """Return a path beside the folder, with the cell's name."""
        return self.folder.with_name(f"{self.name}{suffix}")


@dataclass(frozen=True)
class Failure:
    """A cell that did not finish.

    Attributes:
        cell: Its name.
        status: Exit status of its process.
        log: The log file.
        tail: The end of it.
    """

    cell: str
    status: int
    log: Path
    tail: str


def make_spec(parent: Path, name: str, config: RunConfig, processes: int = 1) -> RunSpec:
    """Return a cell with a folder of its name.

    What an interrupted run left there is replaced; a finished cell is never run again.
    """
    output = replace(config.output, overwrite=True, clean_ckpt_at_end=True)
    train = config.train | {"output_dir": str(parent / name), "run_name": name}
    return RunSpec(name, replace(config, output=output, train=train), processes)


def carry_out(cell: RunSpec, keep_model: bool, tell: Callable[[str], None]) -> Result | Failure:
    """Run a cell and wait for it, or return the result that it has left already.

    Args:
        cell: The cell.
        keep_model: Keep the trained weights.
        tell: Called with a line when the cell starts or fails.

    Raises:
        ValueError: The folder holds a run with other settings.
    """
    if cell.finished:
        return checked_result(cell)
    tell(f"{cell.folder} ...")
    write_settings(cell)
    with cell.log.open("w", encoding="utf-8") as log:
        status = subprocess.run(cell.command, stdout=log, stderr=subprocess.STDOUT).returncode
    if status != 0:
        failure = failure_of(cell, status)
        tell(failure_message(failure))
        return failure
    if not keep_model:
        remove_weights(cell)
    return read_result(cell.folder)


def write_settings(cell: RunSpec) -> None:
    """Write the file that a cell's command reads."""
    cell.settings.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(cell.settings) as partial:
        partial.write_text(yaml.safe_dump(cell.config.to_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")


def _log_tail(cell: RunSpec) -> str:
    """Return the end of what a cell printed; nothing where it has not begun."""
    if not cell.log.is_file():
        return ""
    return "\n".join(cell.log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL:])


def failure_of(cell: RunSpec, status: int) -> Failure:
    """Return what is to be told of a cell whose process ended with an error."""
    return Failure(cell.name, status, cell.log, _log_tail(cell))


def failure_message(failure: Failure) -> str:
    """Say what happened to a cell, with the end of its log."""
    return f"{failure.cell} failed with status {failure.status}; the end of {failure.log}:\n{failure.tail}"


def remove_weights(cell: RunSpec) -> None:
    """Delete what was trained, and keep everything that was measured."""
    for weights in cell.folder.rglob("*.safetensors"):
        weights.unlink()


def checked_result(cell: RunSpec) -> Result:
    """Return a finished cell's result.

    Settings that one side does not know, as in a result of another version, are not compared.

    Raises:
        ValueError: It is of other settings.
    """
    result = read_result(cell.folder)
    wanted = cell.config.to_dict()
    different = [name for name, value in wanted.items() if name in result.config and result.config[name] != value]
    if result.training is not None and result.training.processes != cell.processes:
        different.append("number of processes")
    if different:
        raise ValueError(
            f"{cell.folder} holds a run with another {', '.join(different)}; remove it or choose another output_root"
        )
    return result
