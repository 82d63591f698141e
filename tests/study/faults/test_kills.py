"""Faults put into real runs: nothing is lost, and what cannot go on says why."""

import csv
import json
import logging
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from torch.serialization import load
from transformers import TrainerCallback

from faults import METHODS, RUN, SAVED_AS_LORA, killed_at_changes, killed_at_random, log_and_die
from molf.integrations.checkpoint_folder import checkpoints, step_of
from molf.integrations.routing_lines import LOG_FILES
from molf.study.config.unread import unread
from molf.study.run.job import make_trainer
from served import CONTEXT, start_command
from small_runs import carry_out, small_run, weights
from tiny_checkpoints import save_tiny_checkpoint

KILLS = 1


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_tiny_checkpoint(folder, num_hidden_layers=1)
    return str(folder)


@pytest.fixture
def settings(model, tmp_path, monkeypatch):
    monkeypatch.delenv("LOG_FILE", raising=False)
    return small_run(model, tmp_path / "run") | RUN


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """The folder of a finished run of the settings; ``begun`` has a copy that may resume."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LOG_FILE", raising=False)
        carry_out(small_run(model, folder) | RUN)
    return folder


@pytest.fixture
def begun(whole, settings):
    folder = Path(shutil.copytree(whole, settings["output_dir"]))
    (folder / "result.json").unlink()
    return folder


@pytest.mark.parametrize("name", [name for name in METHODS if name not in SAVED_AS_LORA])
def test_killed_at_random_moments(name, model, tmp_path):
    """SIGKILL for each of eight runs."""
    outcome = killed_at_random(name, model, tmp_path, KILLS, random.Random(name))
    assert (outcome.kills, outcome.difference) == (KILLS, 0.0)
    assert outcome.same_log is (True if "molf" in name else None)
    assert outcome.repeated <= KILLS * RUN["save_steps"]


@pytest.mark.parametrize("name", ["molf", "adalora"])
def test_killed_while_writing_checkpoints(name, model, tmp_path):
    outcome = killed_at_changes(name, model, tmp_path, 5, random.Random(name))
    assert outcome.while_writing > 0
    assert (outcome.kills, outcome.difference) == (5, 0.0)
    assert outcome.same_log is (True if name == "molf" else None)


def command(settings, output):
    ignored = unread(settings.get("method", "molf"))
    flags = [
        part
        for name, value in settings.items()
        if name not in ignored
        for part in (f"--{name}", json.dumps(value).strip('"'))
    ]
    return start_command(["train", *flags], output)


def signal_after_a_checkpoint(process, folder, number):
    """Send a run a signal when it has left a checkpoint later than those that are there, and wait for its end."""
    before = last_step(folder)
    for _ in range(24_000):
        if not process.is_alive() or last_step(folder) > before:
            break
        time.sleep(0.005)
    os.kill(process.pid, number)
    process.join(timeout=120)


def last_step(folder):
    return max((step_of(checkpoint) for checkpoint in checkpoints(folder)), default=0)


def test_the_command_killed_then_stopped_then_finished(settings, tmp_path):
    settings |= {"max_steps": 24, "save_steps": 4, "save_total_limit": 2}
    carry_out(settings | {"output_dir": str(tmp_path / "whole")})
    again = settings | {"resume_from_checkpoint": True}
    folder = Path(settings["output_dir"])

    killed = command(again, tmp_path / "killed.log")
    signal_after_a_checkpoint(killed, folder, signal.SIGKILL)
    output = (tmp_path / "killed.log").read_text()
    assert "training starts from the beginning" in output and killed.exitcode == -signal.SIGKILL, output
    stopped = command(again, tmp_path / "stopped.log")
    signal_after_a_checkpoint(stopped, folder, signal.SIGTERM)
    output = (tmp_path / "stopped.log").read_text()
    assert stopped.exitcode == 75, output
    assert (
        f"molf train: stopped by SIGTERM after step {last_step(folder)} of 24; start it again with --resume" in output
    )
    assert carry_out(again).training.steps == 24
    whole = weights(tmp_path / "whole")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in weights(folder).items())
    assert (folder / LOG_FILES["compact"]).read_bytes() == (tmp_path / "whole" / LOG_FILES["compact"]).read_bytes()


@pytest.mark.parametrize("file", ["optimizer.pt", "model.safetensors", "trainer_state.json", "rng_state.pth"])
def test_a_truncated_checkpoint_is_passed_over(file, whole, begun, settings, caplog):
    damaged = begun / "checkpoint-8" / file
    damaged.write_bytes(damaged.read_bytes()[:-7])
    with caplog.at_level(logging.WARNING):
        carry_out(settings, resume_from_checkpoint=True)
    assert f"checkpoint-8 is damaged: {file} has " in caplog.text
    expected = weights(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(begun).items())
    assert (begun / LOG_FILES["compact"]).read_bytes() == (whole / LOG_FILES["compact"]).read_bytes()


class Spoil(TrainerCallback):
    """Makes a random gradient not finite at random steps, and holds the step against what was there before it."""

    def __init__(self, steps, rng):
        self.steps, self.rng, self.checked = steps, rng, 0

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step not in self.steps:
            return
        p = self.rng.choice([p for p in model.parameters() if p.grad is not None])
        p.grad.view(-1)[self.rng.randrange(p.numel())] = self.rng.choice([float("nan"), float("inf"), -float("inf")])
        self.before = self.snapshot(model, optimizer)

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step in self.steps:
            after = self.snapshot(model, optimizer)
            assert all(torch.equal(a, b) for a, b in zip(self.before, after, strict=True))
            self.checked += 1

    @staticmethod
    def snapshot(model, optimizer):
        state = [value.clone() for own in optimizer.state.values() for value in own.values()]
        return state + [p.detach().clone() for p in model.parameters()]


class NeverSee(TrainerCallback):
    """Takes the gradients of certain steps away."""

    def __init__(self, steps):
        self.steps = steps

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step in self.steps:
            model.zero_grad()


@pytest.mark.parametrize("changes", [{}, {"method": "molf_e"}, {"dtype": "bfloat16"}], ids=["molf", "molf_e", "bf16"])
def test_gradients_that_are_not_finite(changes, settings, tmp_path, monkeypatch, caplog):
    """The step is left out whole and counted: the run ends where one ends that never saw the gradients of these steps."""
    rng = random.Random(str(changes))
    spoil = Spoil(rng.sample(range(1, 8), 3), rng)
    callbacks = [spoil]

    def make(*given, **more):
        trainer = make_trainer(*given, **more)
        trainer.add_callback(callbacks[-1])
        return trainer

    monkeypatch.setattr("molf.study.run.train.make_trainer", make)
    result = carry_out(settings | changes)
    folder = Path(settings["output_dir"])
    assert spoil.checked == 3 and result.training.steps == 8
    assert all(tensor.isfinite().all() for tensor in weights(folder).values())
    steps = [json.loads(line)["step"] for line in (folder / LOG_FILES["compact"]).read_text().splitlines()[1:]]
    assert steps == [step + 1 for step in range(8) if step not in spoil.steps]
    groups = load(folder / "checkpoint-8" / "optimizer.pt", weights_only=True)["param_groups"]
    assert groups[0]["skipped_steps"] == 3
    assert "Skipped a step because a gradient, or its square, is not finite (3 skipped so far)" in caplog.text

    callbacks.append(NeverSee(spoil.steps))
    carry_out(settings | changes, output_dir=str(tmp_path / "other"))
    other = weights(tmp_path / "other")
    assert all(torch.equal(tensor, other[name]) for name, tensor in weights(folder).items())


@pytest.mark.parametrize(
    ("first", "again"),
    [({}, {"resume_from_checkpoint": True}), ({"save_strategy": "no"}, {"overwrite": True}), ({"only_eval": True}, {})],
    ids=["resumed", "started anew", "evaluation"],
)
def test_killed_between_its_row_and_its_result_a_run_has_one_row(first, again, settings, tmp_path, monkeypatch):
    log, settings = tmp_path / "log.csv", settings | first | {"max_steps": 2}
    process = CONTEXT.Process(target=log_and_die, args=(settings, log))
    process.start()
    process.join()
    folder = Path(settings["output_dir"])
    assert process.exitcode == -signal.SIGKILL and not (folder / "result.json").exists()
    monkeypatch.setenv("LOG_FILE", str(log))

    def rows():
        with log.open(newline="") as file:
            return [row["run_id"] for row in csv.DictReader(file)]

    (written,) = rows()
    result = carry_out(settings, **again)
    assert rows() == [result.run_id] == [written]
    other = carry_out(settings, overwrite=True)
    assert rows() == [written, other.run_id] and other.run_id != written


def test_a_corrupted_line_of_data(settings, tmp_path):
    data = tmp_path / "facts.jsonl"
    data.write_text('{"case_id": 1}\n{"case_id"\n')
    with pytest.raises(ValueError, match=rf"{data}, line [12]: "):
        carry_out(settings, sample=False, data_path=str(data))
    assert not Path(settings["output_dir"]).exists()


@pytest.mark.parametrize(
    ("here", "words"),
    [
        ({"ranks": [2]}, r"checkpoint-8 was made with ranks=\[2, 4\] \(here \[2\]\): use the settings"),
        ({"exclude_modules": ["q_proj"]}, r"was made with exclude_modules=\['lm_head'\] \(here \['q_proj'\]\)"),
        ({"lora_rank": 8, "method": "dora"}, r"method=molf \(here dora\), .*lora_rank=128 \(here 8\)"),
        ({"lora_dropout": 0.1}, r"lora_dropout=None \(here 0\.1\)"),
        ({"gradient_accumulation_steps": 2}, r"examples_per_step=2 \(here 4\)"),
        ({"seed": 1}, r"seed=42 \(here 1\)"),
        ({"limit": 6}, r"training_data=8 examples of fact, SHA-256 .*\(here 6 examples of fact, SHA-256"),
        ({"learning_rate": 1e-3}, r"learning_rate=0\.01 \(here 0\.001\)"),
    ],
    ids=["rank", "layers", "method", "form", "batch", "seed", "data", "rate"],
)
def test_a_checkpoint_of_other_settings_is_refused(here, words, begun, settings):
    with pytest.raises(ValueError, match=words):
        carry_out(settings | here, resume_from_checkpoint=True)


def test_a_checkpoint_of_another_model_is_refused(begun, settings, tmp_path):
    save_tiny_checkpoint(tmp_path / "deeper", num_hidden_layers=2)
    with pytest.raises(ValueError, match=r"was made with base_model=SHA-256 \w{12} \(here SHA-256 \w{12}\)"):
        carry_out(settings, model_name_or_path=str(tmp_path / "deeper"), max_steps=9, resume_from_checkpoint=True)


def test_no_pickle_is_read(begun, settings, monkeypatch):
    """Going on reads the Trainer's torch files with ``weights_only=True``, and never its ``training_args.bin``."""
    read = []

    def watched(file, *given, **options):
        read.append((Path(str(file)).name, options.get("weights_only")))
        return load(file, *given, **options)

    monkeypatch.setattr(torch, "load", watched)
    carry_out(settings, max_steps=9, resume_from_checkpoint=True)
    assert {name for name, _ in read} == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert all(weights_only is True for _, weights_only in read)
