from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from transformers import TrainerState
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from molf.study.run.tracker_images import IMAGES, RoutingImages
from report_runs import write_log


class Library:
    """Stands in for wandb and trackio, which take an object of their own for a picture."""

    class Image:
        def __init__(self, pixels):
            self.pixels = pixels

    def __init__(self):
        self.logged = []

    def log(self, values):
        self.logged.append(values)


def tracker(kind, **attributes):
    """A callback of the Trainer's that has started to log."""
    made = kind.__new__(kind)
    vars(made).update(attributes)
    return made


def run(log, *trackers, steps=25, main=True):
    callbacks = list(trackers)
    handler = SimpleNamespace(callbacks=callbacks)
    images = RoutingImages(SimpleNamespace(path=log)).attach(
        SimpleNamespace(callback_handler=handler, add_callback=callbacks.append)
    )
    assert callbacks[-1] is images, "after the trackers, which start first"
    state = TrainerState(max_steps=steps, is_world_process_zero=main)
    for state.global_step in range(1, steps + 1):
        if state.global_step > 3:  # the first decisions were no good
            write_log(log, state.global_step)
        images.on_step_end(None, state, None)


@pytest.mark.parametrize(("kind", "name"), [(WandbCallback, "_wandb"), (TrackioCallback, "_trackio")])
def test_pictures_for_libraries(tmp_path, kind, name):
    library = Library()
    run(tmp_path / "log", SimpleNamespace(), tracker(kind, **{name: library}))
    assert [values["train/global_step"] for values in library.logged] == [6, 9, 12, 15, 18, 21, 24, 25]
    first, *_, last = (values["routing"].pixels for values in library.logged)
    assert first.dtype == np.uint8 and first.shape == last.shape and (first != last).any()


def test_pictures_in_an_event_file(tmp_path):
    """Written by TensorBoard's own writer through the Trainer's callback, and read back from its file."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(tmp_path / "events")
    run(tmp_path / "log", TensorBoardCallback(writer), steps=4)
    writer.close()
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert events.Tags()["images"] == ["routing"]
    (image,) = events.Images("routing")
    assert (image.step, image.width > image.height > 300) == (4, True)
    (tmp_path / "image.png").write_bytes(image.encoded_image_string)
    with Image.open(tmp_path / "image.png") as read:
        assert len(np.unique(np.asarray(read))) > 20


def test_nothing_is_drawn_without_a_tracker_or_on_another_process(tmp_path, monkeypatch):
    monkeypatch.setattr("molf.study.run.tracker_images.routing_pixels", None)
    run(tmp_path / "log", SimpleNamespace())
    library = Library()
    run(tmp_path / "log", tracker(WandbCallback, _wandb=library), main=False)
    assert library.logged == []


def test_there_are_few(tmp_path):
    library = Library()
    log = tmp_path / "log"
    write_log(log, 1)
    callbacks = [tracker(WandbCallback, _wandb=library)]
    images = RoutingImages(SimpleNamespace(path=log)).attach(
        SimpleNamespace(callback_handler=SimpleNamespace(callbacks=callbacks), add_callback=callbacks.append)
    )
    state = TrainerState(max_steps=10_000, is_world_process_zero=True)
    for state.global_step in range(1, 10_001):
        images.on_step_end(None, state, None)
    assert len(library.logged) == IMAGES
