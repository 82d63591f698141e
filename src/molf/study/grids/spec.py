"""One run of a grid: a ``molf train`` command in a process of its own, and the files it keeps side by side."""

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from molf.errors import MolfError
from molf.files import atomic_write, read_json, typed
from molf.study.config.run_config import RunConfig, folder_name
from molf.study.results.result import RESULT_FILE

FAILED = ".failed.json"
State = Literal["finished", "failed", "interrupted", "new"]

_TAIL = 15  # lines of a failed run's log to show


@dataclass(frozen=True)
class Failure:
    """A run that failed."""

    cell: str
    status: int
    log: Path
    tail: str

    def __str__(self) -> str:
        return f"{self.cell} failed with status {self.status}; the end of {self.log}:\n{self.tail}"


@dataclass(frozen=True)
class RunSpec:
    """What to run, and where its files are.

    Attributes:
        name: Name of its folder.
        config: Its settings.
        processes: How many processes of one machine train it together.

    Raises:
        MolfError: The name cannot be that of a folder.
    """

    name: str
    config: RunConfig
    processes: int = 1

    def __post_init__(self) -> None:
        folder_name(self.name, "the name of a run")

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.config.output_dir

    @property
    def settings_file(self) -> Path:
        """The YAML file that its command reads."""
        return self.beside(".yaml")

    @property
    def log_file(self) -> Path:
        """What it printed, in all attempts."""
        return self.beside(".log")

    @property
    def command(self) -> list[str]:
        """The command that starts or resumes it."""
        torchrun = ["-m", "molf.study.torchrun", "--standalone", f"--nproc_per_node={self.processes}"]
        launcher = torchrun if self.processes > 1 else []
        return [sys.executable, *launcher, "-m", "molf", "train", "--config", str(self.settings_file)]

    @property
    def state(self) -> State:
        """How far it is. ``interrupted`` covers everything that has started and neither finished nor failed."""
        if os.path.lexists(self.folder / RESULT_FILE):  # a run writes it last; a broken symlink stands for one too
            return "finished"
        if self.beside(FAILED).is_file():
            return "failed"
        return "interrupted" if self.log_file.exists() else "new"

    @property
    def failure(self) -> Failure | None:
        """How it failed; None if it did not."""
        if self.state != "failed":
            return None
        note = self.beside(FAILED)
        try:
            status = typed(int, read_json(note, dict[str, Any]).get("status"), "status")
        except MolfError as error:
            raise MolfError(f"{note} is damaged: {error}; remove it to run {self.name} again") from error
        log = self.log_file.read_text(encoding="utf-8", errors="replace") if self.log_file.is_file() else ""
        lines = log.splitlines()
        return Failure(self.name, status, self.log_file, "\n".join(lines[-_TAIL:]))

    def beside(self, suffix: str) -> Path:
        """Return a path beside the folder, with the run's name."""
        return self.folder.with_name(f"{self.name}{suffix}")

    def write_settings(self) -> None:
        """Write the file that the command reads."""
        self.settings_file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.settings_file) as partial:
            text = yaml.safe_dump(self.config.to_dict(), sort_keys=False, allow_unicode=True)
            partial.write_text(text, encoding="utf-8")


def make_spec(parent: Path, name: str, config: RunConfig, processes: int = 1) -> RunSpec:
    """Return a run in a folder of its name, which resumes from whatever an earlier attempt left there."""
    output = replace(config.output, overwrite=True, clean_ckpt_at_end=True)
    train = config.train | {"output_dir": str(parent / name), "run_name": name, "resume_from_checkpoint": "True"}
    return RunSpec(name, replace(config, output=output, train=train), processes)
