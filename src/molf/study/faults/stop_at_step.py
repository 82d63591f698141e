"""The Trainer's side of being told to stop: finish the step, save a checkpoint, end the training."""

import os
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from molf.study.faults.preemption import StopRequest


class StopAtStep(TrainerCallback):  # type: ignore[misc]  # transformers is not typed here
    """Save and stop after the step in which this process, or any other of a distributed run, was asked to.

    The processes of a run that torchrun launched also stop when it is gone: nobody else could stop them then, or know that they
    still run.

    Args:
        request: What the signals of this process set.
    """

    def __init__(self, request: StopRequest):
        self.request = request
        self.launcher = os.getppid() if distributed.is_torchelastic_launched() else None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop where that was asked for."""
        if args.world_size > 1:
            self._agree(args.device)
        if self.request.received is not None:
            control.should_save = control.should_training_stop = True

    def _agree(self, device: torch.device) -> None:
        """Let every rank stop at the same step: a signal may reach one earlier than another, or one alone."""
        if self.request.received is None and self.launcher not in (None, os.getppid()):
            self.request.received = "the end of the process that launched it"
        asked = torch.tensor(self.request.received is not None, dtype=torch.int32, device=device)
        distributed.all_reduce(asked, op=distributed.ReduceOp.MAX)
        if asked and self.request.received is None:
            self.request.received = "a signal to another process"
