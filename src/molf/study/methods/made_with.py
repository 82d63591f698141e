"""Which settings a checkpoint was made with: with others it would not load, or load and mean something else."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainingArguments

from molf.integrations.whole_checkpoints import CheckpointPart
from molf.study.config.run_config import RunConfig

FILE_NAME = "made_with.json"
PROCESSES = "processes"
_METHOD = (
    "method",
    "ranks",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "target_modules",
    "exclude_modules",
    "freeze_non_linear",
    "lora_learning_rate",
)
_RATES = ("learning_rate", "weight_decay", "lr_scheduler_type", "warmup_steps")
_DATA = (
    "seed",
    "data_seed",
    "max_length",
    "truncation_mode",
    "packing",
    "packing_strategy",
    "completion_only_loss",
    "assistant_only_loss",
    "chat_template_path",
    "shuffle_dataset",
    "dataloader_drop_last",
    "train_sampling_strategy",
)


class MadeWith(CheckpointPart):
    """What shapes the model and the steps of a run, as a part of every checkpoint.

    How many steps are taken may change, how often something is saved or logged, and how many processes share a batch.

    Args:
        config: The run's settings.
        args: The trainer's, with all defaults.
        examples: What it is trained on.
        sharded: Whether its processes hold shards of the model, which makes checkpoints of another form.
    """

    def __init__(
        self,
        config: RunConfig,
        args: TrainingArguments,
        examples: Sequence[Mapping[str, Any]],
        sharded: bool = False,
    ):
        settings: dict[str, Any] = {"dtype": config.model.dtype, "sharded": sharded}
        settings |= {name: getattr(config.method, name) for name in _METHOD}
        settings |= {name: getattr(args, name) for name in (*_RATES, *_DATA)}
        settings["examples_per_step"] = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        settings["training_data"] = _fingerprint(config.task.task, examples)
        self.settings = {name: getattr(value, "value", value) for name, value in settings.items()}
        self.processes = args.world_size

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write them, and how many processes there are, which ``check`` does not ask about."""
        written = self.settings | {PROCESSES: self.processes}
        (folder / FILE_NAME).write_text(json.dumps(written, indent=1), encoding="utf-8")

    def check(self, folder: Path) -> None:
        """Compare them with a checkpoint's; what that does not have, as it is older or a plain Trainer's, is not asked about.

        Raises:
            ValueError: Naming those that differ.
        """
        there = made_with(folder)
        differing = [name for name, value in self.settings.items() if name in there and there[name] != value]
        if differing:
            words = ", ".join(f"{name}={there[name]} (here {self.settings[name]})" for name in differing)
            raise ValueError(
                f"{folder} was made with {words}: go on with the settings that it was made with, or pass --overwrite without "
                "--resume_from_checkpoint to train from the start"
            )


def made_with(checkpoint: Path) -> dict[str, Any]:
    """Return what a checkpoint was made with, as far as it says."""
    file = checkpoint / FILE_NAME
    if not file.is_file():
        return {}
    there: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return {"sharded": False} | there


def _fingerprint(task: str, examples: Sequence[Mapping[str, Any]]) -> str:
    """Name training examples by what they are, in their order, wherever they were read from."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(example, sort_keys=True, default=str).encode())
    return f"{len(examples)} examples of {task}, SHA-256 {digest.hexdigest()[:12]}"
