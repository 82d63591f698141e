"""A training that is done: noted beside the trained model until the result is there, so that nothing after it loses it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from molf.files import atomic_write
from molf.integrations.checkpoint_folder import checkpoints
from molf.study.config.run_config import RunConfig
from molf.study.results.result import Training, as_metrics
from molf.study.run.models import load_model_and_tokenizer
from molf.tasks import Metric

TRAINED_FILE = ".trained.json"
_FREE = {
    "output_root",
    "output_dir",
    "run_name",
    "resume_from_checkpoint",
    "overwrite",
    "clean_ckpt_at_end",
    "eval_limit",
    "eval_batch_tokens",
    "generation_backend",
    "disable_tqdm",
}
"""Settings that a finished training has nothing to do with."""


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
        partial.write_text(json.dumps({"config": _settings(config), **asdict(trained)}, indent=1), encoding="utf-8")


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
    there, here = noted["config"], _settings(config)
    differing = [name for name in there | here if there.get(name) != here.get(name)]
    if not differing:
        before = noted["metrics_before"]
        return Trained(Training(**noted["training"]), None if before is None else as_metrics(before))
    if checkpoints(file.parent):
        return None
    words = ", ".join(f"{name}={there.get(name)} (here {here.get(name)})" for name in differing)
    raise ValueError(
        f"{file.parent} holds a trained model that waits for its evaluation, and was trained with {words}: go on with the "
        "settings that it was trained with, or pass --overwrite without --resume_from_checkpoint to train from the start"
    )


def _settings(config: RunConfig) -> Mapping[str, Any]:
    settings = {name: value for name, value in config.to_dict().items() if name not in _FREE}
    plain: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return plain
