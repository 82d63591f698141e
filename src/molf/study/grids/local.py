"""Runs in processes of this machine, several at a time."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from queue import SimpleQueue

from molf.study.grids.attempt import Attempt
from molf.study.grids.spec import RunSpec


@dataclass(frozen=True)
class LocalEngine:
    """Carries out cells on this machine.

    Attributes:
        jobs: How many at a time. Each gets an equal share of the CPU's threads, and of accelerators one per process.
        devices: Accelerators to deal out, as ``CUDA_VISIBLE_DEVICES`` names them; one that is named twice may be shared by two.
        keep_models: Keep the trained weights.
    """

    jobs: int = 1
    devices: tuple[str, ...] = ()
    keep_models: bool = False

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise ValueError(f"jobs={self.jobs} must be at least 1")

    def run(self, cells: Sequence[RunSpec]) -> Iterator[RunSpec]:
        """Run cells and yield each when it has ended, however it did.

        When interrupted, it stops the runs, which save what they have, and waits for them.

        Raises:
            ValueError: There are accelerators, and not one for each process.
        """
        self._check_devices(max((cell.processes for cell in cells), default=0))
        slots: SimpleQueue[int] = SimpleQueue()
        for slot in range(self.jobs):
            slots.put(slot)
        attempts = [Attempt(cell, self.keep_models, own_session=True) for cell in cells]

        def carry_out(attempt: Attempt) -> None:
            slot = slots.get()
            attempt.environment = self.environment(slot, attempt.cell.processes)
            try:
                attempt()
            finally:
                slots.put(slot)

        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                futures = {pool.submit(carry_out, attempt): attempt.cell for attempt in attempts}
                for future in as_completed(futures):
                    future.result()
                    yield futures[future]
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                for attempt in attempts:
                    attempt.stop()

    def environment(self, slot: int, processes: int = 1) -> dict[str, str]:
        """Return what a run in one of the places gets: its share of the machine, unless the user has set it."""
        share: dict[str, str] = {}
        if (sharers := self.jobs * processes) > 1 and "OMP_NUM_THREADS" not in os.environ:
            share["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // sharers))
        if self.jobs > 1 and self.devices:
            own = range(slot * processes, (slot + 1) * processes)
            share["CUDA_VISIBLE_DEVICES"] = ",".join(self.devices[number] for number in own)
        return share

    def _check_devices(self, processes: int) -> None:
        there, wanted = len(self.devices), self.jobs * processes
        if there and wanted > there:
            raise ValueError(
                f"{self.jobs} runs at a time (--jobs) on {processes} processes each (--nproc_per_node) take {wanted} devices, "
                f"and there are {there} ({','.join(self.devices)}): choose fewer, or name a device more than once in "
                "CUDA_VISIBLE_DEVICES to let several runs share it"
            )


def visible_devices() -> tuple[str, ...]:
    """Return the CUDA devices that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    if chosen := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return tuple(chosen.split(","))

    import torch

    return tuple(map(str, range(torch.cuda.device_count())))
