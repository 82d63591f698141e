"""Finished runs by hand, for the page about them."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

from molf import Routing
from molf.integrations.routing_lines import LOG_FILES, CompactLines
from molf.study.engine.predictions import PREDICTIONS_BEFORE_FILE, PREDICTIONS_FILE, write_predictions
from molf.study.results.history import write_history
from molf.study.results.result import write_result
from molf.study.results.routing_reader import read_routing
from molf.tasks.base import Metric
from small_runs import small_result

MODULES = tuple(f"model.layers.{depth}.self_attn.{kind}" for depth in range(3) for kind in ("q_proj", "k_proj"))
STACKS = tuple(f"model.layers.{depth}.experts.up_proj[{matrix}]" for depth in range(3) for matrix in range(2))
HOSTILE = (
    "</script><script>hit()</script><img src=x onerror=hit()><a href='javascript:hit()'>a</a>\u2028\"{{ hit() }}%{x}<b>"
)
"""Markup, templates, and a character that ends lines of scripts."""
EXPERTS = ("fft", "lora_r2")


def alternate(step, layer):
    """Full fine-tuning wins every second layer."""
    return layer % 2 == 0


def write_log(path, steps, modules=MODULES, wins=alternate, lines=CompactLines):
    """Write a routing log in which full fine-tuning wins where ``wins`` says so."""
    lines = lines()
    with path.open("w") as file:
        for step in range(1, steps + 1):
            scores = torch.tensor([[1e-6 / step, 2e-6 / step]] * len(modules), dtype=torch.float64)
            fft = torch.tensor([bool(wins(step, layer)) for layer in range(len(modules))])
            file.write(lines.encode(step, Routing(tuple(modules), EXPERTS, scores, torch.stack([fft, ~fft], 1))))


def write_state(folder, steps):
    """Write a history in which every step was logged."""
    log = [
        {
            "step": step,
            "loss": 2 / step,
            "lr/fft": 1e-3 / step,
            "lr/lora": 1e-2 / step,
            "grad_norm": 1.0,
            "epoch": 0.1 * step,
        }
        for step in range(1, steps + 1)
    ]
    log += [{"step": steps, "train_loss": 1.0}]
    write_history(
        folder, SimpleNamespace(save_to_json=lambda path: Path(path).write_text(json.dumps({"log_history": log})))
    )


def prediction(row, right, wrote, subject="Paris"):
    rewrite = {
        "prompt": "{} is in",
        "subject": subject,
        "target_new": {"str": "Rome"},
        "target_true": {"str": "France"},
    }
    return {
        "row": row,
        "record": {"requested_rewrite": rewrite},
        "answers": [{"prompt": "", "target": "", "logprobs": [0.0]}, {"prompt": "", "text": wrote}],
        "outcome": {"efficacy_score": 100.0 if right else 0.0},
    }


def write_run(folder, name="a run", steps=6, modules=MODULES, wrote="Rome", subject="Paris", wins=alternate, **changes):
    """Write the folder of a run that never was, with four predictions of which each changed in another way."""
    folder.mkdir()
    write_log(folder / LOG_FILES["compact"], steps, modules, wins)
    write_state(folder, steps)
    for file, rights in ((PREDICTIONS_BEFORE_FILE, (0, 1, 0, 1)), (PREDICTIONS_FILE, (1, 0, 0, 1))):
        write_predictions(folder / file, [prediction(row, right, wrote, subject) for row, right in enumerate(rights)])
    result = small_result(
        config={"run_name": name, "output_dir": str(folder), "task": "fact", "method": "molf", "learning_rate": 1e-3},
        headline="efficacy_score",
        metrics={"efficacy_score": Metric(50.0, 4, 12.345678, 87.5), "score": Metric(1 / 3, 4)},
        metrics_before={"efficacy_score": Metric(25.125, 4, 0.0, 75.0)},
        routing=read_routing(folder / LOG_FILES["compact"]).shares,
    )
    write_result(folder, replace(result, **changes))
    return folder
