import os
import signal
import subprocess
import sys
import time

import pytest

from molf.study.faults.preemption import PREEMPTED
from molf.study.torchrun import _status

# Rank 1 ends as it is told to, and rank 0 waits. Told to stop, each saves and ends with 75.
WORKER = """
import os, signal, sys, time
from pathlib import Path
rank, way, folder = int(os.environ["RANK"]), int(sys.argv[1]), Path(sys.argv[2])

def save(number, frame):
    (folder / f"saved-{rank}").touch()
    sys.exit(75)

signal.signal(signal.SIGTERM, save)
(folder / f"started-{rank}").touch()
if rank == 1 and way:
    os.kill(os.getpid(), -way) if way < 0 else sys.exit(way)
time.sleep(60)
sys.exit(1)
"""


@pytest.fixture
def start(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)

    def start(way):
        command = [sys.executable, "-m", "molf.study.torchrun", "--standalone", "--nproc_per_node=2"]
        return subprocess.Popen(
            [*command, str(tmp_path / "worker.py"), str(way), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    return start


@pytest.mark.parametrize(
    ("codes", "status"),
    [
        ([3], 3),
        ([75, 75], PREEMPTED),
        ([1, 75], 1),
        ([1, -signal.SIGTERM], 1),  # one failed, and torchrun stopped the other before it listened
        ([-signal.SIGTERM, 75], PREEMPTED),
        ([-signal.SIGUSR1], PREEMPTED),
        ([-signal.SIGKILL, 1], -signal.SIGKILL),  # one was killed, and the other failed for want of it
        ([-signal.SIGSEGV, 75], 139),
        ([-signal.SIGABRT, -signal.SIGTERM], 134),
    ],
    ids=str,
)
def test_what_processes_come_to(codes, status):
    assert _status(codes) == status


def test_a_run_of_which_one_process_is_killed_ends_so(start):
    """It takes the other one with it."""
    process = start(-signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, output
    assert "Traceback" not in output, "the log's end is what the run said"


def test_told_to_stop_it_lets_the_processes_save(start, tmp_path):
    process = start(0)
    for _ in range(1200):
        if len(list(tmp_path.glob("started-*"))) == 2:
            break
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == PREEMPTED, output
    assert len(list(tmp_path.glob("saved-*"))) == 2
