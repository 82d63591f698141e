"""What a run's model forgets, from the base model before training to the trained one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from molf.study.engine.retention import Probe, Reading, compare, make_probe, read
from molf.study.run.job import Job, StudyTrainer
from molf.study.run.model_limits import ModelLimits
from molf.study.run.process_group import all_wait
from molf.tasks.retention import Retention

__all__ = ["BaseReading", "measure", "read_base"]


@dataclass(frozen=True)
class BaseReading:
    """What the base model was asked, and what it said."""

    probe: Probe
    reading: Reading


def read_base(job: Job, trainer: StudyTrainer) -> BaseReading | None:
    """Ask the base model on rank 0, before the Trainer shards it; None elsewhere, and if the run measures no retention."""
    found = None
    if job.background is None:
        return None
    with all_wait():
        if trainer.is_world_process_zero():
            limits = ModelLimits.of(job.model)
            asked = map(job.task.requests, job.eval_rows)
            probe = make_probe(job.tokenizer, job.background[0], asked, limits.positions)
            named = ((f"a text of {job.background[1]}", ids, len(ids)) for ids in probe.texts)
            limits.check(job.tokenizer, named, "set retention: 'off'")
            place = trainer.model.device
            model = trainer.model.to(trainer.args.device)
            found = BaseReading(probe, read(model, probe, batch_tokens=job.config.task.eval_batch_tokens))
            trainer.model.to(place)
    return found


def measure(job: Job, model: Any, device: torch.device, base: BaseReading | None) -> Retention | None:
    """Ask the trained model the same and compare; None without a base to compare with."""
    if base is None or job.background is None:
        return None
    after = read(model.to(device), base.probe, batch_tokens=job.config.task.eval_batch_tokens)
    return compare(base.reading, after, job.background[1])
