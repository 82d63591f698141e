"""A real run on a real SLURM: killed and then requeued half-way, it is finished in the end."""

import os
import shlex
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

from molf.cli import main
from molf.cli.sweep import parse_sweep
from molf.integrations.checkpoint_folder import checkpoints, step_of
from molf.study.grids import slurm
from molf.study.grids.slurm import job_of
from molf.study.results.result import read_result

STEPS = 120
SETTINGS = {
    "task": "fact",
    "sample": True,
    "limit": 4,
    "eval_limit": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "max_steps": STEPS,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "save_strategy": "steps",
    "save_steps": 10,
    "save_total_limit": 2,
    "method": "fft",
    "learning_rate": 1e-4,
}
GRID = "sweep grid.yaml --output_root out --engine slurm --time 20 --cpus_per_task 1"


def until(condition, seconds=300):
    """Wait for something to come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"still not true after {seconds} s"
        time.sleep(0.05)


def kill(spec):
    """Send SIGKILL to the run's ``molf train``."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:  # it has ended meanwhile
            continue
        if b"train" in words and str(spec.settings_file).encode() in words:
            os.kill(int(folder.name), signal.SIGKILL)


def requeue(spec):
    subprocess.run(["scontrol", "requeue", job_of(spec)], check=True)


def while_it_runs(disturb, spec):
    """Carry out the grid, disturb its run once it has left a whole checkpoint, and return the exit status."""
    before = last_step(spec)
    with ThreadPoolExecutor() as pool:

        def work():
            until(lambda: last_step(spec) > before)
            disturb(spec)

        done = pool.submit(work)
        status = main(shlex.split(GRID))
        done.result()
    return status


def last_step(spec):
    """Return the step of the last checkpoint but one, which is complete: the next one has been begun."""
    return max((step_of(checkpoint) for checkpoint in checkpoints(spec.folder)[:-1]), default=0)


def test_a_run_that_is_killed_and_then_requeued(cluster, tiny_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOG_FILE", raising=False)
    monkeypatch.setattr(slurm, "_LONGEST_PAUSE", 1.0)
    settings = {"model_name_or_path": tiny_checkpoint, **SETTINGS}
    Path("grid.yaml").write_text(yaml.safe_dump(settings))
    _, (spec,) = parse_sweep(shlex.split(GRID)[1:])

    assert while_it_runs(kill, spec) == 1
    said = capsys.readouterr()
    assert f"{spec.folder} was interrupted" in said.out and "1 runs are not finished" in said.err
    assert while_it_runs(requeue, spec) == 0, spec.log_file.read_text()
    assert "0 of 1 runs are finished; 1 to run" in capsys.readouterr().out

    assert main(["train", "--config", "grid.yaml", "--output_dir", "whole"]) == 0
    found, whole = read_result(spec.folder), read_result(Path("whole"))
    assert found.training.steps == whole.training.steps == STEPS
    assert found.training.tokens < whole.training.tokens, "resumed"
    assert found.metrics == whole.metrics
    log = spec.log_file.read_text()
    assert "stopped by SIGTERM" in log and "resum" in log
