"""The settings of a run in its checkpoints: with others a checkpoint would not load, or load and mean something else."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from molf.errors import MolfError
from molf.files import read_json
from molf.integrations.checkpoint_folder import SETTINGS_FILE
from molf.integrations.whole_checkpoints import CheckpointPart
from molf.study.config.run_config import RunConfig
from molf.study.config.sameness import shaping

PROCESSES = "processes"


class CheckpointSettings(CheckpointPart):
    """The settings that shape a checkpoint, saved with it and compared when a run resumes from it.

    The number of steps, the saving and logging intervals, and the number of processes that share a batch may change; whether the
    model is sharded may not, as checkpoints then have another layout.
    """

    def __init__(
        self,
        config: RunConfig,
        args: TrainingArguments,
        examples: Sequence[Mapping[str, Any]],
        sharded: bool = False,
        base: str = "",
        template: str | dict[str, str] | None = None,
    ):
        declared = vars(args) | vars(config.method) | vars(config.model)
        settings = {name: declared[name] for name in shaping("checkpoint")}
        settings["sharded"] = sharded
        settings["examples_per_step"] = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        settings["training_data"] = _fingerprint(config.task.task, examples)
        settings["base_model"] = base
        if isinstance(template, dict):  # some tokenizers have several, by name
            template = json.dumps(template, sort_keys=True)
        settings["chat_template"] = template and _sha(template.encode())
        if config.method.allocation:  # by its contents, wherever it is
            settings["recipe"] = _sha(Path(config.method.allocation).read_bytes())
        if config.method.routes:  # the Trainer does not clip then
            settings["max_grad_norm of MoLF"] = config.train["max_grad_norm"]
        self.settings = {name: _plain(value) for name, value in settings.items()}
        self.processes = args.world_size

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the settings and, for information, the number of processes."""
        written = self.settings | {PROCESSES: self.processes}
        (folder / SETTINGS_FILE).write_text(json.dumps(written, indent=1), encoding="utf-8")

    def check(self, folder: Path) -> None:
        """Compare the settings with those of a checkpoint.

        Settings that the checkpoint does not record, because an older version or a plain Trainer wrote it, are not compared.
        """
        saved = read_settings(folder)
        differing = [name for name, value in self.settings.items() if name in saved and saved[name] != value]
        if differing:
            words = ", ".join(f"{name}={saved[name]} (here {self.settings[name]})" for name in differing)
            raise MolfError(
                f"{folder} was made with {words}: use the settings of the checkpoint, or pass --overwrite without "
                "--resume_from_checkpoint to train from the start"
            )


def read_settings(checkpoint: Path) -> dict[str, Any]:
    """Return the settings that a checkpoint records."""
    file = checkpoint / SETTINGS_FILE
    if not file.is_file():
        return {}
    try:
        saved: dict[str, Any] = read_json(file, dict[str, Any])
    except MolfError as error:
        raise MolfError(
            f"{file}, the settings of the checkpoint, is damaged: {error}; resume from another one"
        ) from error
    return {"sharded": False} | saved


def _plain(value: Any) -> Any:
    """Return a setting as JSON takes it: the trainer has enumerations and an object of its own for accelerate."""
    return value.to_dict() if isinstance(value, AcceleratorConfig) else getattr(value, "value", value)


def model_fingerprint(model: nn.Module) -> str:
    """Identify a model by its parameters' names, shapes and first values, wherever it was read from."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        first = parameter.detach().flatten()[:8].float().tolist()
        digest.update(repr((name, tuple(parameter.shape), first)).encode())
    return f"SHA-256 {digest.hexdigest()[:12]}"


def _sha(data: bytes) -> str:
    return f"SHA-256 {hashlib.sha256(data).hexdigest()[:12]}"


def _fingerprint(task: str, examples: Sequence[Mapping[str, Any]]) -> str:
    """Identify training examples by their contents and order, wherever they were read from."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(example, sort_keys=True, default=str).encode())
    return f"{len(examples)} examples of {task}, SHA-256 {digest.hexdigest()[:12]}"
