"""The note of a finished training, kept beside the model until the result is written: a run killed between is only evaluated."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from molf.errors import MolfError
from molf.files import atomic_write, read_json
from molf.integrations.checkpoint_folder import can_resume
from molf.study.config.run_config import RunConfig
from molf.study.config.sameness import differing
from molf.study.results.result import Training
from molf.tasks import Metric

TRAINED_FILE = ".trained.json"


@dataclass(frozen=True)
class Trained:
    """The measurements of a finished training, and the metrics of the model before it, if they were measured."""

    training: Training
    metrics_before: dict[str, Metric] | None


def note_trained(config: RunConfig, trained: Trained) -> None:
    """Note that the model in the run's folder is fully trained."""
    with atomic_write(config.output_dir / TRAINED_FILE) as partial:
        noted = {"config": config.to_dict(), **asdict(trained)}
        partial.write_text(json.dumps(noted, indent=1, default=str), encoding="utf-8")


def forget_trained(config: RunConfig) -> None:
    """Remove the note: the result is written, or the model is about to be replaced."""
    (config.output_dir / TRAINED_FILE).unlink(missing_ok=True)


def find_trained(config: RunConfig, main: bool) -> Trained | None:
    """Return the finished training that a run can resume after, the same on every process; None if it has to train.

    Args:
        config: The run; unless it resumes from the last state of its folder, nothing is found.
        main: Whether this is rank 0, whose folder counts.

    Raises:
        MolfError: The finished training had other settings, and there is no complete checkpoint to resume from; or its note is
            damaged.
    """
    found: list[Trained | None] = [None]
    file = config.output_dir / TRAINED_FILE
    if main and config.resume_from is True and file.is_file():
        found[0] = _read(file, config)
    broadcast_object_list(found)
    return found[0]


@dataclass(frozen=True)
class _Note(Trained):
    config: dict[str, Any]


def _read(file: Path, config: RunConfig) -> Trained | None:
    try:
        noted: _Note = read_json(file, _Note)
    except MolfError as error:
        raise MolfError(
            f"{file}, the note that this model is trained, is damaged: {error}; remove it to resume from the last checkpoint, or "
            "pass --overwrite without --resume_from_checkpoint to train from the start"
        ) from error
    different = differing(noted.config, config, "training")
    if not different:
        return Trained(noted.training, noted.metrics_before)
    if can_resume(file.parent):
        return None
    raise MolfError(
        f"{file.parent} holds a trained model that is not evaluated yet. It was trained with {', '.join(different)}. Use the "
        "settings that it was trained with, or pass --overwrite without --resume_from_checkpoint to train from the start"
    )
