"""A training that is done: noted beside the trained model until the result is there, so that nothing after it loses it."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from molf.errors import MolfError
from molf.files import atomic_write
from molf.integrations.checkpoint_folder import checkpoints
from molf.study.config.run_config import RunConfig
from molf.study.config.sameness import differing
from molf.study.results.result import Training, as_metrics
from molf.study.run.models import load_model_and_tokenizer
from molf.tasks import Metric

TRAINED_FILE = ".trained.json"


@dataclass(frozen=True)
class Trained:
    """What is known of a training that took its last step.

    Attributes:
        training: What it took.
        metrics_before: Metrics of the model before it, where that was measured.
    """

    training: Training
    metrics_before: dict[str, Metric] | None


def note_trained(config: RunConfig, trained: Trained) -> None:
    """Note that the model in the run's folder is the trained one."""
    with atomic_write(config.output_dir / TRAINED_FILE) as partial:
        partial.write_text(
            json.dumps({"config": config.to_dict(), **asdict(trained)}, indent=1, default=str), encoding="utf-8"
        )


def forget_trained(config: RunConfig) -> None:
    """Remove the note: the result is written, or the model about to be replaced."""
    (config.output_dir / TRAINED_FILE).unlink(missing_ok=True)


def load_trained(config: RunConfig) -> Any:
    """Load the trained model from the run's folder."""
    source = replace(config.model, model_name_or_path=str(config.output_dir))
    return load_model_and_tokenizer(source, bool(config.train.get("trust_remote_code", False)))[0]


def find_trained(config: RunConfig, main: bool) -> Trained | None:
    """Return what was noted, on every process the same; None where there is training to do.

    Args:
        config: The run; where it is not to go on from the last state of its folder, nothing is found.
        main: Whether this is the first process, whose folder counts.

    Raises:
        ValueError: The training that is done was another one, and left no checkpoint to go on from.
    """
    found: list[Trained | None] = [None]
    file = config.output_dir / TRAINED_FILE
    if main and config.resume_from is True and file.is_file():
        found[0] = _read(file, config)
    broadcast_object_list(found)
    return found[0]


def _read(file: Path, config: RunConfig) -> Trained | None:
    noted = json.loads(file.read_text(encoding="utf-8"))
    different = differing(noted["config"], config, "training")
    if not different:
        before = noted["metrics_before"]
        return Trained(Training(**noted["training"]), None if before is None else as_metrics(before))
    if checkpoints(file.parent):
        return None
    raise MolfError(
        f"{file.parent} holds a trained model that is not evaluated yet. It was trained with {', '.join(different)}. Use the "
        "settings that it was trained with, or pass --overwrite without --resume_from_checkpoint to train from the start"
    )
