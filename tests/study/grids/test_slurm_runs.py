"""Real runs on a real SLURM: what is killed or requeued half-way is finished in the end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from molf.study.results.result import read_result

LONG = {"method": "fft", "learning_rate": 1e-4, "num_train_epochs": 60, "save_steps": 10, "save_total_limit": 2}
SETTINGS = {
    "task": "fact",
    "sample": True,
    "limit": 4,
    "eval_limit": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 1,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "save_strategy": "steps",
    "learning_rate": 1e-4,
    "output_root": "out",
    "methods": {"killed": LONG, "requeued": LONG, "fft": None},
    "slurm": {"time": 20, "cpus_per_task": 1},
}
NAMES = ["killed", "requeued", "fft"]


@pytest.fixture
def start(cluster, tiny_checkpoint, tmp_path):
    """Start a grid on the cluster, in an empty folder."""
    (tmp_path / "grid.yaml").write_text(
        yaml.safe_dump({"model_name_or_path": tiny_checkpoint, **SETTINGS}, sort_keys=False)
    )

    def start():
        line = [sys.executable, "-m", "molf", "sweep", "grid.yaml", "--engine", "slurm"]
        return subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return start


def until(condition, process, seconds=900):
    """Wait for something to come true while the sweep goes on, and return it."""
    for _ in range(int(seconds / 0.05)):
        if found := condition():
            return found
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    raise AssertionError(f"still not true after {seconds} s")


def run_of(name):
    """The process ids of a spec's ``molf train``."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:  # it has ended meanwhile
            continue
        if b"train" in words and f"out/{name}.yaml".encode() in words:
            found.append(int(folder.name))
    return found


def has_whole_checkpoint(folder):
    """Return whether a checkpoint is complete: the next one has been begun."""
    return len(list(folder.glob("checkpoint-*"))) > 1


def job_of(out, name):
    return json.loads((out / f"{name}.job.json").read_text())["job"]


def test_three_runs_of_which_one_is_killed_and_one_requeued(start, tmp_path):
    out = tmp_path / "out"
    first = start()
    until(lambda: has_whole_checkpoint(out / "killed"), first)
    for pid in run_of("killed"):
        os.kill(pid, signal.SIGKILL)
    until(lambda: has_whole_checkpoint(out / "requeued"), first)
    subprocess.run(["scontrol", "requeue", job_of(out, "requeued")], check=True)
    said, _ = first.communicate(timeout=900)
    assert first.returncode == 1, said
    assert "out/killed was interrupted" in said and "1 runs are not finished" in said
    finished = {path.parent.name for path in out.glob("*/result.json")}
    assert finished == set(NAMES) - {"killed"}, said

    second = start()
    said, _ = second.communicate(timeout=900)
    assert second.returncode == 0, said
    assert "2 of 3 runs are finished; 1 to run" in said
    results = {name: read_result(out / name) for name in NAMES}
    tokens_per_step = results["fft"].training.tokens / results["fft"].training.steps
    assert all(results[name].training.tokens < 120 * tokens_per_step for name in ("killed", "requeued")), "resumed"
    assert results["killed"].training.steps == results["requeued"].training.steps == 120
    assert results["killed"].metrics == results["requeued"].metrics
