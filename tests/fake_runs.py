"""Runs of a grid that take a moment: what a run does, without a model."""

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from molf.study.config.run_config import RunConfig
from molf.study.grids.spec import RunSpec
from molf.study.results.gather import append_csv

RESULT = {
    "config": {},
    "headline": "score",
    "metrics": {"score": {"value": 1.0, "n": 2}},
    "metrics_before": None,
    "data_origin": "nowhere",
    "device": "CPU",
    "versions": {},
    "commit": None,
    "seconds": 1.0,
    "peak_memory_bytes": None,
}

# Every start adds a line to `starts`: whether it resumed. `hold` runs until it is told to stop, saves a checkpoint then and
# finishes when it resumes; `pause` takes two seconds, and one to save; `kill` dies without a word after a checkpoint; `crash`
# aborts; `fail` fails until there is a file `mended`.
RUN = """
import json, os, signal, sys, time
from pathlib import Path
folder, behaviour = Path(sys.argv[1]), sys.argv[2]
folder.mkdir(parents=True, exist_ok=True)
resumed = (folder / "checkpoint-1").exists()

def save_and_stop(number, frame):
    time.sleep(behaviour == "pause")
    (folder / "checkpoint-1").mkdir(exist_ok=True)
    sys.exit(75)

signal.signal(signal.SIGTERM, save_and_stop)
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
with (folder / "starts").open("a") as file:
    file.write(json.dumps(resumed) + "\\n")
(folder / "devices").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
print("started", "again" if resumed else "", flush=True)
if behaviour == "hold" and not resumed:
    time.sleep(120)
if behaviour == "pause":
    time.sleep(2)
if behaviour == "kill" and not resumed:
    (folder / "checkpoint-1").mkdir()
    os.kill(os.getpid(), signal.SIGKILL)
if behaviour == "crash":
    os.kill(os.getpid(), signal.SIGABRT)
if behaviour == "fail" and not (folder / "mended").exists():
    print("out of cheese")
    sys.exit(3)
(folder / "model.safetensors").write_text("")
(folder / "result.json").write_text(sys.argv[3])
"""


@dataclass(frozen=True)
class FakeRun(RunSpec):
    behaviour: str = "finish"

    @property
    def command(self):
        result = {**RESULT, "config": self.config.to_dict()}
        return [sys.executable, "-c", RUN, str(self.folder), self.behaviour, json.dumps(result)]

    def starts(self):
        """Whether each start so far resumed from a checkpoint."""
        path = self.folder / "starts"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def fake_run(parent, behaviour, name=None):
    """A run named after what it does."""
    name = name or behaviour
    parent.mkdir(exist_ok=True)
    return FakeRun(
        name, RunConfig(train={"output_dir": str(Path(parent) / name), "run_name": name}), behaviour=behaviour
    )


def until(condition, seconds=120):
    """Wait for something to come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"still not true after {seconds} s"
        time.sleep(0.05)


def write_rows(path, name, rows):
    """Add rows to a CSV file that other processes write too."""
    for number in range(rows):
        append_csv(path, {"row": f"{name}-{number}", f"column {name % 4}": "x" * 50})


HOLDER = """
import sys
from pathlib import Path
from molf.study.faults.run_lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("works", flush=True)
    sys.stdin.read()
"""


@contextmanager
def working_in(folder, rank=0):
    """A process of a rank of a run that works in a folder until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        env=os.environ | {"RANK": str(rank)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "works\n"
        yield process
    finally:
        process.kill()
        process.communicate()
