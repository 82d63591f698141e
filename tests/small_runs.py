"""Runs of a tiny model that several tests of the study share."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from unittest import mock

from safetensors.torch import load_file
from transformers import TrainerCallback

from molf.study.config.run_config import RunConfig
from molf.study.config.unread import unread
from molf.study.results.result import Result, Training
from molf.study.run.train import run
from molf.tasks.base import Metric

BASELINES = ["lora", "rslora", "dora", "adalora", "pissa", "eva", "lora_plus"]

FILES = {
    "README.md",
    "config.json",
    "config.yaml",
    "generation_config.json",
    "model.safetensors",
    "predictions.jsonl.gz",
    "result.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "trainer_state.json",
}
"""What a run of any method leaves in its folder, but for MoLF's routing and experts."""


def small_run(model, folder):
    """Settings of a run of four steps on eight facts, which takes a fraction of a second."""
    return {
        "model_name_or_path": model,
        "sample": True,
        "limit": 8,
        "ranks": [2, 4],
        "lora_rank": 4,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": False,  # the default is a run's of `test_combinations` and of the commands
        "disable_tqdm": True,
        "retention": False,
        "output_dir": str(folder),
    }


def small_config(settings, **changes):
    """Return the configuration of a run, without settings that the method does not read unless they are among the changes."""
    given = settings | changes
    ignored = unread(given.get("method", "molf"), given.get("freeze_non_linear")) - changes.keys()
    return RunConfig.from_dict({name: value for name, value in given.items() if name not in ignored})


def carry_out(settings, **changes):
    """Carry out a run with an empty picture of its routing, whose drawing would take a third of the time."""
    with mock.patch("molf.study.results.tables.draw_routing", lambda summary, path, title: path.touch()):
        return run(small_config(settings, **changes))


class SignalAt(TrainerCallback):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, step, number=signal.SIGTERM):
        self.step, self.number = step, number

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


class NoStep(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        raise AssertionError("nothing was to be trained again")


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def small_result(**changes):
    """A result of a run that never was."""
    plain = Result(
        config={},
        headline="score",
        metrics={"score": Metric(50.0, 12, 40.0, 60.5)},
        metrics_before={"score": Metric(25.0, 12)},
        data_origin="the sample",
        device="CPU",
        versions={"molf": "0.1.0"},
        commit=None,
        seconds=90.0,
        peak_memory_bytes=2**30,
        training=Training(6, 1.0, 2.5, 800, 801.0, 1000, 900, 64),
    )
    return replace(plain, **changes)
