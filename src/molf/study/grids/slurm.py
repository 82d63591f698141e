"""Runs as a SLURM job array, submitted with submitit."""

import getpass
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from molf.errors import MolfError
from molf.files import atomic_write, read_json, typed
from molf.study.grids.attempt import Attempt
from molf.study.grids.spec import RunSpec

JOB = ".job.json"
_SIGNAL = signal.SIGUSR1
"""Makes submitit requeue the job, and the run save. SLURM sends it to all processes of a job before the time limit."""

_MAX_TIMEOUTS = 10_000  # how often a job may reach its time limit and come back; submitit's default is 3
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 15.0  # seconds between two looks at the queue


@dataclass(frozen=True)
class SlurmSettings:
    """What each job asks for, by the names of ``sbatch`` or submitit; the cluster's default if None.

    Attributes:
        time: Time limit in minutes. A run that reaches it is saved and requeued, and resumes.
        array_parallelism: How many jobs of an array may run at a time.
        signal_delay_s: How many seconds before the time limit a run is told to save.
        setup: Shell commands to run first, such as ``module load cuda``.
        sbatch: Other options of ``sbatch``, by their long names.

    Raises:
        MolfError: A number is too small, or a name or value cannot be a line of a job script.
    """

    partition: str | None = None
    time: int = 60
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    mem_gb: float | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    array_parallelism: int = 256
    signal_delay_s: int = 120
    setup: list[str] | str = field(default_factory=list)
    sbatch: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("time", "array_parallelism", "signal_delay_s"):
            if getattr(self, name) < 1:
                raise MolfError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("partition", "account", "qos", "constraint"):
            if (value := getattr(self, name)) is not None:
                _check_option(name, value)
        for name, value in self.sbatch.items():
            _check_option(name, value)

    def parameters(self) -> dict[str, Any]:
        """Return submitit's parameters."""
        given = asdict(self)
        notice = f"{_SIGNAL.name}@{given.pop('signal_delay_s')}"
        given["additional_parameters"] = {**given.pop("sbatch"), "signal": notice}
        given["setup"] = [self.setup] if isinstance(self.setup, str) else self.setup or None
        return {name: value for name, value in given.items() if value is not None}


_OWN = {"signal": "signal_delay_s", "array": "array_parallelism"}  # options of sbatch that follow from ours


def _check_option(name: Any, value: Any) -> None:
    """Refuse what would not stay one option on one ``#SBATCH`` line, whatever comes after which is shell."""
    given = f"{name!r}: {value!r} for sbatch"
    if not (isinstance(name, str) and re.fullmatch(r"[A-Za-z][\w-]*", name, re.ASCII)):
        raise MolfError(f"{given}: the name of an option is letters, digits and hyphens")
    if value is False or not isinstance(value, str | int | float) or not str(value).isprintable():
        raise MolfError(f"{given}: a value is a number, printable text, or true for an option without a value")
    if ours := _OWN.get(name.replace("_", "-")):
        raise MolfError(f"{given} is set by the sweep; use {ours}")


@dataclass(frozen=True)
class SlurmEngine:
    """Carries out runs on a SLURM cluster whose nodes see this folder and this Python.

    It needs no accounting database: how a run ended is read from its own files.

    Attributes:
        folder: Where submitit keeps its files.
        settings: What each job asks for.
        keep_models: Keep the trained weights.
        wait: Wait for the jobs; if False, return once they are in the queue.
        log: Called with a line when the queue changes.

    Raises:
        MolfError: ``sbatch`` would read the path of the folder as something else.
    """

    folder: Path
    settings: SlurmSettings = field(default_factory=SlurmSettings)
    keep_models: bool = False
    wait: bool = True
    log: Callable[[str], None] = lambda line: None

    def __post_init__(self) -> None:
        path = str(self.folder.absolute())
        if not path.isprintable() or set(path) & set("%\\"):
            raise MolfError(
                f"SLURM's files cannot be in {path!r}: sbatch reads % and \\ in it as patterns, and a line ends at "
                "characters that do not print; choose another output_root"
            )

    def run(self, specs: Sequence[RunSpec]) -> Generator[RunSpec, None, None]:
        """Submit the runs that are not in the queue yet, and yield each one when it has left the queue.

        Interrupting this leaves the jobs alone; the next call finds them in the queue.
        """
        self._check_gpus(specs)
        for program in ("sbatch", "squeue", "srun", "scontrol"):
            if shutil.which(program) is None:
                raise MolfError(f"there is no {program} here; run this where jobs are submitted, or use --engine local")
        if (queue := queued_jobs()) is None:
            raise MolfError("squeue does not answer, so a job could be submitted a second time; try again later")
        new = [spec for spec in specs if job_of(spec) not in queue]
        if len(new) < len(specs):
            self.log(f"{len(specs) - len(new)} jobs are in the queue already")
        size = largest_array()
        for first in range(0, len(new), size):
            self._submit(new[first : first + size])
        if self.wait:
            yield from self._ended(specs)

    def _check_gpus(self, specs: Sequence[RunSpec]) -> None:
        gpus = self.settings.gpus_per_node
        for processes in {spec.processes for spec in specs}:
            if gpus not in (None, 0, processes):
                raise MolfError(
                    f"a job gets --gpus_per_node {gpus}, and --nproc_per_node {processes} needs one GPU per process: "
                    "give both the same number"
                )

    def _submit(self, specs: Sequence[RunSpec]) -> None:
        """Submit runs as one array."""
        import submitit
        from submitit.core.utils import FailedJobError, FailedSubmissionError, environment_variables

        executor = submitit.SlurmExecutor(folder=self.folder, max_num_timeout=_MAX_TIMEOUTS)
        executor.update_parameters(job_name=f"molf-{self.folder.parent.name}", **self.settings.parameters())
        grace = max(1.0, self.settings.signal_delay_s * 0.8)
        cpus = None if "OMP_NUM_THREADS" in os.environ else self.settings.cpus_per_task
        attempts = []
        for spec in specs:
            threads = {} if cpus is None else {"OMP_NUM_THREADS": str(max(1, cpus // spec.processes))}
            attempts.append(Attempt(spec, self.keep_models, grace, _SIGNAL, threads))
        try:
            with environment_variables(SUBMITIT_PREEMPT_SIGNAL=_SIGNAL.name.removeprefix("SIG")), executor.batch():
                jobs = [executor.submit(attempt) for attempt in attempts]
        except (FailedJobError, FailedSubmissionError) as error:
            raise MolfError(f"SLURM refuses the jobs: {error}") from error
        for spec, job in zip(specs, jobs, strict=True):
            with atomic_write(spec.beside(JOB)) as partial:
                partial.write_text(json.dumps({"job": job.job_id}) + "\n", encoding="utf-8")
        self.log(f"submitted {len(specs)} jobs, {jobs[0].job_id} to {jobs[-1].job_id}")

    def _ended(self, specs: Sequence[RunSpec]) -> Generator[RunSpec, None, None]:
        waiting, missed, pause, shown = list(specs), Counter[str](), _FIRST_PAUSE, ""
        while waiting:
            if (queue := queued_jobs()) is not None:
                states = Counter(queue[job] for spec in waiting if (job := job_of(spec)) in queue)
                line = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
                if line and line != shown:
                    self.log(f"queue: {line}")
                    shown = line
                for spec in waiting:
                    missed[spec.name] = 0 if job_of(spec) in queue else missed[spec.name] + 1
            for spec in list(waiting):
                # Only a job that is missed twice is gone: its files may reach this machine later than the news of its end.
                if spec.state in ("finished", "failed") or missed[spec.name] > 1:
                    waiting.remove(spec)
                    yield spec
            if waiting:
                time.sleep(pause)
                pause = min(pause * 1.3, _LONGEST_PAUSE)


def queued_jobs() -> dict[str, str] | None:
    """Return the states of the user's pending and running jobs by id, or None while SLURM does not answer."""
    command = ["squeue", "--noheader", "--array", "--format=%i %T", f"--user={getpass.getuser()}"]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode != 0:
        return None
    pairs = (line.split() for line in answer.stdout.splitlines())
    return {job: state.lower() for job, state in pairs}


def largest_array() -> int:
    """Return how many jobs an array may have on this cluster."""
    answer = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True)
    if (found := re.search(r"^MaxArraySize\s*=\s*(\d+)", answer.stdout, re.MULTILINE)) is None:
        raise MolfError(f"scontrol does not say how large an array may be; try again ({answer.stderr.strip()})")
    return max(1, int(found[1]))


def job_of(spec: RunSpec) -> str | None:
    """Return the id of the last job that was submitted for a run."""
    note = spec.beside(JOB)
    try:
        return str(typed(str, read_json(note, dict[str, Any]).get("job"), "job"))
    except FileNotFoundError:
        return None
    except MolfError as error:
        raise MolfError(f"{note} is damaged: {error}; remove it once no job of {spec.name} is in the queue") from error
