"""Cells whose runs take a moment: what a run does, without a model."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from molf.study.config.run_config import RunConfig
from molf.study.grids.spec import RunSpec

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

# Every start leaves its arguments in `starts`. `hold` goes on until it is told to stop, leaves a checkpoint then and finishes
# when it is resumed; `kill` dies without a word after a checkpoint; `crash` aborts; `fail` fails until there is a file `mended`.
RUN = """
import json, os, signal, sys, time
from pathlib import Path
folder, behaviour, resumed = Path(sys.argv[1]), sys.argv[2], "--resume_from_checkpoint" in sys.argv
folder.mkdir(parents=True, exist_ok=True)

def save_and_stop(number, frame):
    (folder / "checkpoint-1").mkdir()
    sys.exit(75)

signal.signal(signal.SIGTERM, save_and_stop)
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
with (folder / "starts").open("a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
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
        return [sys.executable, "-c", RUN, str(self.folder), self.behaviour, json.dumps(RESULT)]

    def starts(self):
        """The arguments of every start so far."""
        path = self.folder / "starts"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def resumed(self):
        """Whether each start went on from a checkpoint."""
        return ["--resume_from_checkpoint" in arguments for arguments in self.starts()]


def fake_run(parent, behaviour, name=None):
    """A cell named after what it does."""
    name = name or behaviour
    parent.mkdir(exist_ok=True)
    return FakeRun(
        name, RunConfig(train={"output_dir": str(Path(parent) / name), "run_name": name}), behaviour=behaviour
    )


HOLDER = """
import sys
from pathlib import Path
from molf.study.faults.run_lock import holding
with holding(Path(sys.argv[1])):
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
