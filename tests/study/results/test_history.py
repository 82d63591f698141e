import json
from pathlib import Path

import pytest

from molf.study.results.history import HISTORY_FILE, read_history
from small_runs import carry_out


def write(folder, log):
    (folder / HISTORY_FILE).write_text(json.dumps({"global_step": 4, "log_history": log}))


def test_series_by_name(tmp_path):
    write(
        tmp_path,
        [
            {"step": 2, "loss": 1.5, "epoch": 0.5},
            {"step": 4, "loss": float("nan"), "eval_loss": 1, "note": "text"},
            {"step": 2, "loss": 1.25},  # logged again after resuming
        ],
    )
    assert read_history(tmp_path) == {"loss": [(2, 1.25)], "epoch": [(2, 0.5)], "eval_loss": [(4, 1.0)]}


def test_a_run_without_history(tmp_path):
    assert read_history(tmp_path) == {}


@pytest.mark.parametrize("log", [None, 3, [3], [{"loss": 1}], [{"step": "x"}]])
def test_a_damaged_history_is_named(log, tmp_path):
    write(tmp_path, log)
    with pytest.raises(ValueError, match=f"{HISTORY_FILE} is not the state of a Trainer"):
        read_history(tmp_path)


def test_every_run_keeps_its_history(settings):
    result = carry_out(settings, logging_steps=1, eval_limit=1)
    history = read_history(Path(settings["output_dir"]))
    assert history["train_loss"] == [(4, result.training.loss)]
    for name in ("loss", "lr/fft", "lr/lora", "grad_norm"):
        assert [step for step, _ in history[name]] == [1, 2, 3, 4]
