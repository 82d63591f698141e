import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fake_runs import fake_run, until
from molf.errors import MolfError
from molf.study.grids.local import LocalEngine, visible_devices

TESTS = Path(__file__).parents[2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_runs_save_when_what_started_them_is_stopped_or_killed(number, tmp_path):
    code = (
        "from pathlib import Path; from fake_runs import fake_run; from molf.study.grids.local import LocalEngine\n"
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a parent may have it ignored
        f"specs = [fake_run(Path({str(tmp_path)!r}), 'hold', name) for name in ('a', 'b', 'c')]\n"
        "list(LocalEngine(jobs=2).run(specs))"
    )
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    starter = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE, text=True
    )
    first, second, third = (fake_run(tmp_path, "hold", name) for name in ("a", "b", "c"))
    until(lambda: first.starts() and second.starts())
    starter.send_signal(number)
    said = starter.communicate(timeout=60)[1]
    assert starter.returncode != 0 and (number != signal.SIGINT or said.rstrip().endswith("KeyboardInterrupt"))
    assert len(list(LocalEngine(jobs=2).run([first, second]))) == 2
    assert first.starts() == second.starts() == [False, True] and not third.starts()
    assert first.state == second.state == "finished"


def test_runs_share_the_machine(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    engine = LocalEngine(jobs=3, devices=("4", "6", "4"))
    assert [engine.environment(slot) for slot in range(3)] == [
        {"OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": device} for device in ("4", "6", "4")
    ]
    assert LocalEngine(jobs=1, devices=("4", "6")).environment(0) == {"CUDA_VISIBLE_DEVICES": "4"}
    assert LocalEngine(jobs=1).environment(0, processes=4) == {"OMP_NUM_THREADS": "2"}
    pairs = LocalEngine(jobs=2, devices=("0", "1", "2", "3"))
    assert [pairs.environment(slot, processes=2)["CUDA_VISIBLE_DEVICES"] for slot in range(2)] == ["0,1", "2,3"]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert LocalEngine(jobs=3).environment(0) == {}


@pytest.mark.parametrize(
    ("jobs", "processes", "devices", "words"),
    [
        (1, 4, "01", r"--jobs 1 runs with --nproc_per_node 4 need 4 GPUs, and 2 are visible \(0,1\): use fewer"),
        (3, 1, "01", "need 3 GPUs, and 2 are visible"),
        (2, 1, "0", "or name a GPU several times in CUDA_VISIBLE_DEVICES"),
    ],
)
def test_fewer_devices_than_processes(jobs, processes, devices, words, tmp_path):
    spec = replace(fake_run(tmp_path, "finish"), processes=processes)
    with pytest.raises(MolfError, match=words):
        next(LocalEngine(jobs, tuple(devices)).run([spec]))
    assert not spec.starts()


def test_enough_devices(tmp_path):
    specs = [replace(fake_run(tmp_path, "finish", name), processes=2) for name in ("a", "b")]
    assert len(list(LocalEngine(2, tuple("0123")).run(specs))) == 2
    assert sorted((spec.folder / "devices").read_text() for spec in specs) == ["0,1", "2,3"]
    assert list(LocalEngine(4, ("0",)).run([])) == []


def test_the_devices_that_may_be_used(monkeypatch):
    import torch

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert visible_devices() == ("3", "5")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert visible_devices() == ("0", "1")
