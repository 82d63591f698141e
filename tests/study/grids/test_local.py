import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fake_runs import fake_run
from molf.study.grids.attempt import has_checkpoint
from molf.study.grids.local import LocalEngine, visible_devices

TESTS = Path(__file__).parents[2]


def test_all_cells_end_however_they_do(tmp_path):
    cells = [fake_run(tmp_path, behaviour) for behaviour in ("finish", "fail", "kill")]
    cells += [fake_run(tmp_path, "finish", f"more{number}") for number in range(3)]
    ended = list(LocalEngine(jobs=2).run(cells))
    assert {cell.name for cell in ended} == {cell.name for cell in cells}
    assert [cell.name for cell in cells if cell.finished] == ["finish", "more0", "more1", "more2"]
    assert not list(tmp_path.rglob("*.safetensors"))


def test_models_may_be_kept(tmp_path):
    cell = fake_run(tmp_path, "finish")
    assert list(LocalEngine(keep_models=True).run([cell])) == [cell]
    assert (cell.folder / "model.safetensors").exists()


def test_an_interrupted_sweep_stops_its_runs_and_they_save(tmp_path):
    code = (
        "from pathlib import Path; from fake_runs import fake_run; from molf.study.grids.local import LocalEngine\n"
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a parent may have it ignored
        f"cells = [fake_run(Path({str(tmp_path)!r}), 'hold', name) for name in ('a', 'b', 'c')]\n"
        "list(LocalEngine(jobs=2).run(cells))"
    )
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    sweeper = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE, text=True
    )
    first, second, third = (fake_run(tmp_path, "hold", name) for name in ("a", "b", "c"))
    for _ in range(1200):
        if first.starts() and second.starts():
            break
        time.sleep(0.05)
    sweeper.send_signal(signal.SIGINT)
    said = sweeper.communicate(timeout=60)[1]
    assert said.rstrip().endswith("KeyboardInterrupt") and sweeper.returncode != 0
    assert has_checkpoint(first) and has_checkpoint(second) and not third.starts()
    assert list(LocalEngine(jobs=2).run([first, second])) and first.finished and second.finished
    assert first.resumed() == [False, True]


def test_runs_share_the_machine(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    engine = LocalEngine(jobs=3, devices=("4", "6", "4"))
    assert [engine.environment(slot) for slot in range(3)] == [
        {"OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": device} for device in ("4", "6", "4")
    ]
    assert LocalEngine(jobs=1, devices=("4", "6")).environment(0) == {}
    assert LocalEngine(jobs=1).environment(0, processes=4) == {"OMP_NUM_THREADS": "2"}
    pairs = LocalEngine(jobs=2, devices=("0", "1", "2", "3"))
    assert [pairs.environment(slot, processes=2)["CUDA_VISIBLE_DEVICES"] for slot in range(2)] == ["0,1", "2,3"]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert LocalEngine(jobs=3).environment(0) == {}


@pytest.mark.parametrize(
    ("jobs", "processes", "devices", "words"),
    [
        (
            1,
            4,
            "01",
            r"1 runs at a time .* on 4 processes each .* take 4 devices, and there are 2 \(0,1\): choose fewer",
        ),
        (3, 1, "01", "take 3 devices, and there are 2"),
        (2, 1, "0", "or name a device more than once in CUDA_VISIBLE_DEVICES"),
    ],
)
def test_fewer_devices_than_processes(jobs, processes, devices, words, tmp_path):
    cell = replace(fake_run(tmp_path, "finish"), processes=processes)
    with pytest.raises(ValueError, match=words):
        next(LocalEngine(jobs, tuple(devices)).run([cell]))
    assert not cell.starts()


def test_enough_devices(tmp_path):
    cells = [replace(fake_run(tmp_path, "finish", name), processes=2) for name in ("a", "b")]
    assert len(list(LocalEngine(2, tuple("0123")).run(cells))) == 2
    assert list(LocalEngine(4, ("0",)).run([])) == []


def test_the_devices_that_may_be_used(monkeypatch):
    import torch

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert visible_devices() == ("3", "5")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert visible_devices() == ("0", "1")


def test_no_jobs():
    with pytest.raises(ValueError, match="jobs=0 must be at least 1"):
        LocalEngine(jobs=0)
