"""Pictures of the routing for experiment trackers, while a run goes on."""

import math
from typing import Any

import numpy as np
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from molf.integrations.routing_log import RoutingLog
from molf.study.results.routing_reader import RoutingReader
from molf.study.results.tables import routing_pixels

IMAGES = 10
"""Pictures of a run."""


class RoutingImages(TrainerCallback):  # type: ignore[misc]  # transformers is not typed here
    """Send a picture of the routing so far to TensorBoard, Weights & Biases and Trackio, ``IMAGES`` times in a run.

    Other trackers of ``report_to`` get none. The picture is drawn from the log, of which only what is new is read.

    Args:
        log: Writes the routing log, and is attached before this.
    """

    def __init__(self, log: RoutingLog):
        self._log = log
        self._reader: RoutingReader | None = None
        self._trainer: Any = None

    def attach(self, trainer: Trainer) -> "RoutingImages":
        """Add this callback to a trainer, after the trackers that it has."""
        self._trainer = trainer
        trainer.add_callback(self)
        return self

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Send a picture if one is due."""
        every = math.ceil(state.max_steps / IMAGES)
        due = state.global_step % every == 0 or state.global_step == state.max_steps
        if not (due and state.is_world_process_zero):
            return
        trackers = [own for own in self._trainer.callback_handler.callbacks if isinstance(own, _TRACKERS)]
        if not trackers:
            return
        if self._reader is None:  # resuming may have changed the path
            self._reader = RoutingReader(self._log.path)
        self._reader.poll()
        if (summary := self._reader.summary()) is None:
            return
        pixels = routing_pixels(summary, f"Routing until step {state.global_step}")
        for tracker in trackers:
            _send(tracker, pixels, state.global_step)


_TRACKERS = (TensorBoardCallback, WandbCallback, TrackioCallback)


def _send(tracker: Any, pixels: np.ndarray[Any, Any], step: int) -> None:
    if isinstance(tracker, TensorBoardCallback):
        tracker.tb_writer.add_image("routing", pixels, step, dataformats="HWC")
        return
    library = tracker._wandb if isinstance(tracker, WandbCallback) else tracker._trackio
    library.log({"routing": library.Image(pixels), "train/global_step": step})
