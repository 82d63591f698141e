"""The Trainer's side of a stop request: finish the step, save a checkpoint, end the training."""

import os
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from molf.study.faults.preemption import StopRequest


class StopAtStep(TrainerCallback):  # type: ignore[misc]  # transformers is not typed here
    """Save and stop after the step in which any process of the run was asked to stop.

    Processes that torchrun launched also stop when it is gone: nobody could stop them then, or know that they still run.
    """

    def __init__(self, request: StopRequest):
        self.request = request
        self.launcher = os.getppid() if distributed.is_torchelastic_launched() else None
        self.group: Any = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop if that was asked for."""
        if args.world_size > 1:
            self._agree()
        if self.request.received is not None:
            control.should_save = control.should_training_stop = True

    def _agree(self) -> None:
        """Stop all ranks at the same step, since a signal may reach only one of them, or one earlier.

        The flag goes over gloo, from CPU to CPU: the default group would make every step wait for the device.
        """
        if self.request.received is None and self.launcher not in (None, os.getppid()):
            self.request.received = "the end of the process that launched it"
        if self.group is None:
            self.group = distributed.new_group(backend="gloo")
        asked = torch.tensor(self.request.received is not None, dtype=torch.int32)
        distributed.all_reduce(asked, op=distributed.ReduceOp.MAX, group=self.group)
        if asked and self.request.received is None:
            self.request.received = "a signal to another process"
