import shlex
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from conftest import TOLERANCE
from molf.cli import main
from molf.cli.sweep_request import parse_sweep
from molf.integrations.checkpoint_folder import checkpoints
from molf.study.faults.preemption import PREEMPTED
from molf.study.faults.run_lock import in_use
from molf.study.grids.attempt import Attempt
from molf.study.grids.local import LocalEngine
from molf.study.grids.runner import state_of, sweep
from molf.study.grids.spec import checked_result, write_settings
from molf.study.results.result import read_result
from small_runs import weights

SMALL = (
    "--sample --limit 4 --eval_limit 2 --per_device_batch_size 4 --gradient_accumulation_steps 1 --num_train_epochs 1 "
    "--lora_rank 2 --gradient_checkpointing False --disable_tqdm True"
)


def test_a_dry_run_lists_and_starts_nothing(model_folder, tmp_path, capsys):
    line = f"sweep --model_name_or_path {model_folder} --learning_rate 1e-4 1e-3 --output_root out --dry_run"
    assert main(shlex.split(line)) == 0
    shown = capsys.readouterr().out
    assert shown.count("new ") == 2 and "-m molf train --config out/molf-lr0.001.yaml" in shown
    assert not (tmp_path / "out").exists()


def test_real_runs_one_of_which_fails(model_folder, tmp_path, capsys):
    line = f"sweep --model_name_or_path {model_folder} /no/such/model {SMALL} --method fft --jobs 2 --output_root out"
    assert main(shlex.split(line)) == 1
    captured = capsys.readouterr()
    assert "out/fft-model failed with status 1" in captured.out
    assert captured.out.count("the end of out/fft-model.log:") == 1 and "/no/such/model" in captured.out
    assert "1 runs failed: --retry runs them again" in captured.err
    assert read_result(tmp_path / "out" / "fft-tiny").training.steps == 1
    started = (tmp_path / "out" / "fft-tiny.log").stat().st_mtime_ns
    assert main(shlex.split(line)) == 1
    assert "1 of 2 runs are finished; 0 to run" in capsys.readouterr().out
    assert (tmp_path / "out" / "fft-tiny.log").stat().st_mtime_ns == started


def test_runs_on_two_processes_stop_go_on_and_equal_one_process(model_folder, monkeypatch):
    settings = (
        f"--model_name_or_path {model_folder} {SMALL} --method molf --ranks 4 --per_device_batch_size 1 --max_steps 20 "
        "--learning_rate 1e-2 --adam_epsilon 1e-3 --save_strategy steps --save_steps 1 --save_total_limit 2"
    )
    line = f"{settings} --nproc_per_node 2 --keep_models --output_root out"
    (spec,) = parse_sweep(shlex.split(line)).specs
    spec.write_settings()

    def interrupted(interrupt):
        """Attempt the run and interrupt it when it has left another checkpoint; return its status."""
        before = checkpoints(spec.folder)
        attempt = Attempt(spec, keep_model=True, own_session=True)
        with ThreadPoolExecutor() as pool:
            status = pool.submit(attempt)
            while not status.done() and checkpoints(spec.folder) == before:
                time.sleep(0.02)
            interrupt(attempt)
        assert spec.state == "interrupted", spec.log_file.read_text()
        return status.result()

    assert interrupted(Attempt.stop) == PREEMPTED
    assert interrupted(lambda attempt: attempt._process.kill()) == -signal.SIGKILL
    with pytest.raises(ValueError, match="a run on 2 processes, and on 1 its .*: go on with --nproc_per_node 2"):
        sweep([replace(spec, processes=1)], LocalEngine())
    start, in_use_at_start = Attempt._run, []

    def watched(attempt, lock):
        in_use_at_start.append(in_use(spec.folder))
        return start(attempt, lock)

    monkeypatch.setattr(Attempt, "_run", watched)
    assert main(["sweep", *shlex.split(line)]) == 0, spec.log_file.read_text()
    assert in_use_at_start == [False]
    assert "stopped by the end of the process that launched it" in spec.log_file.read_text()
    result = read_result(spec.folder)
    assert (result.training.steps, result.training.processes) == (20, 2)
    with pytest.raises(ValueError, match="holds a run with another number of processes; remove it"):
        checked_result(replace(spec, processes=1))

    assert main(["train", *shlex.split(f"{settings} --gradient_accumulation_steps 2 --output_dir one")]) == 0
    two, one = weights(spec.folder), weights("one")
    for name, tensor in one.items():
        # As in one step, but twenty times.
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=20 * TOLERANCE[torch.float32])


def test_help(capsys):
    assert main(["sweep", "--help"]) == 0
    assert "--engine local|slurm" in capsys.readouterr().out
