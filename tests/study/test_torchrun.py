import os
import signal
import subprocess
import sys
import time

import pytest

from molf.study.preemption import PREEMPTED

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


@pytest.mark.parametrize("status", [3, 75, -signal.SIGKILL])
def test_the_status_is_that_of_the_processes(status, start):
    """One that ends with an error takes the other one with it."""
    process = start(status)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == status, output
    assert "Traceback" not in output, "the log's end is what the run said"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_told_to_stop_it_lets_the_processes_save(number, start, tmp_path):
    process = start(0)
    while len(list(tmp_path.glob("started-*"))) < 2:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == PREEMPTED, output
    assert len(list(tmp_path.glob("saved-*"))) == 2
