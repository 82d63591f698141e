"""Runs in processes of this machine, several at a time."""

import os
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from queue import SimpleQueue

from molf.errors import MolfError
from molf.study.grids.attempt import Attempt
from molf.study.grids.spec import RunSpec


@dataclass(frozen=True)
class LocalEngine:
    """Carries out runs on this machine.

    Attributes:
        jobs: Number of runs at a time. Each gets an equal share of the CPU threads, and one GPU per process.
        devices: GPUs, as ``CUDA_VISIBLE_DEVICES`` names them; two runs may share one that is named twice.
        keep_models: Keep the trained weights.
    """

    jobs: int = 1
    devices: tuple[str, ...] = ()
    keep_models: bool = False

    def run(self, specs: Sequence[RunSpec]) -> Generator[RunSpec, None, None]:
        """Carry out runs and yield each one when it has ended, however it ended.

        When this is interrupted, it tells the runs to save and end, and waits for them.
        """
        self._check_devices(max((spec.processes for spec in specs), default=0))
        slots: SimpleQueue[int] = SimpleQueue()
        for slot in range(self.jobs):
            slots.put(slot)

        def run_attempt(attempt: Attempt) -> None:
            slot = slots.get()
            attempt.environment = self.environment(slot, attempt.spec.processes)
            try:
                attempt()
            finally:
                slots.put(slot)

        attempts = [Attempt(spec, self.keep_models) for spec in specs]
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                futures = {pool.submit(run_attempt, attempt): attempt.spec for attempt in attempts}
                for future in as_completed(futures):
                    future.result()
                    yield futures[future]
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                for attempt in attempts:
                    attempt.stop()

    def environment(self, slot: int, processes: int = 1) -> dict[str, str]:
        """Return the environment variables that give a run its share of the machine.

        Every run sees exactly its own GPUs, also if it runs alone: with more, the Trainer would multiply its batch.
        """
        share = {}
        if (sharers := self.jobs * processes) > 1 and "OMP_NUM_THREADS" not in os.environ:
            share["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // sharers))
        if self.devices:
            share["CUDA_VISIBLE_DEVICES"] = ",".join(self.devices[slot * processes : (slot + 1) * processes])
        return share

    def _check_devices(self, processes: int) -> None:
        there, needed = len(self.devices), self.jobs * processes
        if there and needed > there:
            raise MolfError(
                f"--jobs {self.jobs} runs with --nproc_per_node {processes} need {needed} GPUs, and {there} are visible "
                f"({','.join(self.devices)}): use fewer, or name a GPU several times in CUDA_VISIBLE_DEVICES to share it"
            )


def visible_devices() -> tuple[str, ...]:
    """Return the GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    if chosen := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return tuple(chosen.split(","))

    import torch

    return tuple(map(str, range(torch.cuda.device_count())))
