"""A routing log by hand, and decisions to write into it."""

import json
from types import SimpleNamespace

import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from molf import MoLF, Routing, RoutingLog
from small import mlp, train


def run_by_hand(folder, **settings):
    """A run by hand: what the Trainer would call, one event at a time."""
    model = mlp(torch.float32)
    optimizer = MoLF(model, ranks=(2,), lr=1e-3, lora_lr=3e-3)
    log, state = RoutingLog(folder / "deep" / "folder", **settings), TrainerState()
    arguments = TrainingArguments(output_dir=str(folder), report_to="none", use_cpu=True)

    def event(name, **extra):
        getattr(log, name)(arguments, state, TrainerControl(), optimizer=optimizer, **extra)

    def step(spoilt=False):
        if spoilt:
            for p in model.parameters():
                p.grad = torch.full_like(p, float("nan"))
            optimizer.step()
        else:
            train(model, optimizer, range(state.global_step, state.global_step + 1))
        event("on_optimizer_step")
        state.global_step += 1

    def logged(**numbers):
        state.log_history.append({**numbers, "step": state.global_step})
        event("on_log", logs=numbers)
        return numbers

    return SimpleNamespace(log=log, state=state, optimizer=optimizer, event=event, step=step, logged=logged)


def steps(path):
    """Return the steps of a log in either format."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line["step"] for line in lines if "step" in line]


def routing():
    scores = torch.tensor([[1.0, 2.0], [0.25, 0.125]], dtype=torch.float64)
    return Routing(("a.q", "a.k"), ("fft", "lora_r2"), scores, torch.tensor([[True, True], [True, False]]))
