"""Runs as a SLURM job array, submitted by submitit."""

import getpass
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from molf.files import atomic_write
from molf.study.grids.attempt import Attempt, failure_status
from molf.study.grids.spec import RunSpec

JOB = ".job.json"
_SIGNAL = signal.SIGUSR1
"""What tells submitit to requeue a job, and a run to save: SLURM sends it to all processes of a job before its time is up."""

_MOST_TIMEOUTS = 10_000  # how often a job may reach its time limit and come back; submitit's own limit is 3
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 15.0  # seconds between two looks at the queue


@dataclass(frozen=True)
class SlurmSettings:
    """What each job asks for; left out, the cluster's own default counts.

    Attributes:
        partition: Where to run.
        time: Limit in minutes. A run that reaches it is saved, requeued and goes on.
        gpus_per_node: GPUs.
        cpus_per_task: CPUs.
        mem_gb: Memory in GB.
        account: Account to charge.
        qos: Quality of service.
        constraint: Features a node must have.
        array_parallelism: How many jobs of an array may run at a time.
        signal_delay_s: How many seconds before the limit a run is told to save.
        setup: Shell commands to run first, such as ``module load cuda``.
        sbatch: Any other option of ``sbatch``, by its long name.
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
    setup: list[str] = field(default_factory=list)
    sbatch: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("time", "array_parallelism", "signal_delay_s"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    def parameters(self) -> dict[str, Any]:
        """Return submitit's parameters."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("setup", "sbatch")}
        given |= {"setup": self.setup or None}
        given["additional_parameters"] = {**self.sbatch, "signal": f"{_SIGNAL.name}@{given.pop('signal_delay_s')}"}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class SlurmEngine:
    """Carries out cells on a SLURM cluster whose nodes see this folder and this Python.

    It needs ``sbatch`` and ``squeue`` but no accounting database: how a cell ended is read from its own files.

    Attributes:
        folder: Where submitit keeps what it writes.
        settings: What each job asks for.
        keep_models: Keep the trained weights.
        wait: Wait for the jobs, or return once they are in the queue.
        tell: Called with a line when the queue changes.
    """

    folder: Path
    settings: SlurmSettings = field(default_factory=SlurmSettings)
    keep_models: bool = False
    wait: bool = True
    tell: Callable[[str], None] = lambda line: None

    def run(self, cells: Sequence[RunSpec]) -> Iterator[RunSpec]:
        """Submit the cells that are not in the queue already, and yield each when it has left it, however it ended.

        Interrupting this leaves the jobs alone; the next call finds them in the queue.

        Raises:
            ValueError: There is no SLURM here, it refuses the jobs, or a job would have fewer GPUs than processes.
        """
        self._check_gpus(cells)
        for program in ("sbatch", "squeue", "srun", "scontrol"):
            if shutil.which(program) is None:
                raise ValueError(
                    f"there is no {program} here; run this where jobs are submitted, or use --engine local"
                )
        if (queue := queued_jobs()) is None:
            raise ValueError(
                "squeue does not answer, so jobs may be in the queue that must not be submitted twice; try again"
            )
        queued = [cell for cell in cells if job_of(cell) in queue]
        new = [cell for cell in cells if cell not in queued]
        if queued:
            self.tell(f"{len(queued)} jobs are in the queue already")
        size = largest_array()
        for first in range(0, len(new), size):
            self._submit(new[first : first + size])
        if self.wait:
            yield from self._ended(cells)

    def _check_gpus(self, cells: Sequence[RunSpec]) -> None:
        gpus, processes = self.settings.gpus_per_node, max((cell.processes for cell in cells), default=0)
        if gpus and processes > gpus:
            raise ValueError(
                f"gpus_per_node={gpus} gives a job fewer GPUs than it has processes, {processes}: ask for --gpus_per_node "
                f"{processes}, or use fewer with --nproc_per_node"
            )

    def _submit(self, cells: Sequence[RunSpec]) -> None:
        """Submit cells as one array."""
        import submitit
        from submitit.core.utils import FailedJobError, FailedSubmissionError, environment_variables

        executor = submitit.SlurmExecutor(folder=self.folder, max_num_timeout=_MOST_TIMEOUTS)
        executor.update_parameters(job_name=f"molf-{self.folder.parent.name}", **self.settings.parameters())
        grace = max(1.0, self.settings.signal_delay_s * 0.8)
        attempts = [
            Attempt(cell, self.keep_models, grace=grace, requeue_signal=_SIGNAL, environment=self._environment(cell))
            for cell in cells
        ]
        try:
            with environment_variables(SUBMITIT_PREEMPT_SIGNAL=_SIGNAL.name.removeprefix("SIG")), executor.batch():
                jobs = [executor.submit(attempt) for attempt in attempts]
        except (FailedJobError, FailedSubmissionError) as error:
            raise ValueError(f"SLURM does not take the jobs: {error}") from error
        for cell, job in zip(cells, jobs, strict=True):
            with atomic_write(cell.beside(JOB)) as partial:
                partial.write_text(json.dumps({"job": job.job_id}) + "\n", encoding="utf-8")
        self.tell(f"submitted {len(cells)} jobs, {jobs[0].job_id} to {jobs[-1].job_id}")

    def _environment(self, cell: RunSpec) -> dict[str, str]:
        cpus = self.settings.cpus_per_task
        if cpus is None or "OMP_NUM_THREADS" in os.environ:
            return {}
        return {"OMP_NUM_THREADS": str(max(1, cpus // cell.processes))}

    def _ended(self, cells: Sequence[RunSpec]) -> Iterator[RunSpec]:
        waiting, missed, pause, told = list(cells), Counter[str](), _FIRST_PAUSE, ""
        while waiting:
            queue = queued_jobs()
            if queue is not None:
                states = Counter(queue[job] for cell in waiting if (job := job_of(cell)) in queue)
                line = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
                if line and line != told:
                    self.tell(f"queue: {line}")
                    told = line
            for cell in list(waiting):
                # A job is gone for good when it was missed twice: its files may reach this machine after its end does.
                if queue is not None:
                    missed[cell.name] = 0 if job_of(cell) in queue else missed[cell.name] + 1
                if cell.finished or failure_status(cell) is not None or missed[cell.name] > 1:
                    waiting.remove(cell)
                    yield cell
            if waiting:
                time.sleep(pause)
                pause = min(pause * 1.3, _LONGEST_PAUSE)


def queued_jobs() -> dict[str, str] | None:
    """Return the states of the user's waiting and running jobs by id, or None while SLURM does not answer."""
    command = ["squeue", "--noheader", "--array", "--format=%i %T", f"--user={getpass.getuser()}"]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode != 0:
        return None
    pairs = (line.split() for line in answer.stdout.splitlines())
    return {job: state.lower() for job, state in pairs}


def largest_array() -> int:
    """Return how many jobs an array of this cluster may have.

    Raises:
        ValueError: SLURM does not say.
    """
    answer = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True)
    if (found := re.search(r"^MaxArraySize\s*=\s*(\d+)", answer.stdout, re.MULTILINE)) is None:
        raise ValueError(f"scontrol does not say how large an array may be; try again ({answer.stderr.strip()})")
    return max(1, int(found[1]))


def job_of(cell: RunSpec) -> str | None:
    """Return the id of the last job that was submitted for a cell."""
    try:
        return str(json.loads(cell.beside(JOB).read_text(encoding="utf-8"))["job"])
    except FileNotFoundError:
        return None
