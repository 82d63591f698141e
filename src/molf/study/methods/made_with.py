"""Which settings a checkpoint was made with: with others it would not load, or load and mean something else."""

import json
from pathlib import Path
from typing import Any

from torch import nn

from molf.integrations.whole_checkpoints import CheckpointPart
from molf.study.config import RunConfig

FILE_NAME = "made_with.json"
_NAMES = (
    "method",
    "ranks",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "target_modules",
    "exclude_modules",
    "freeze_non_linear",
    "dtype",
)


class MadeWith(CheckpointPart):
    """The settings that shape what is trained, as a part of every checkpoint.

    Args:
        config: The run's settings.
        sharded: Whether its processes hold shards of the model, which makes checkpoints of another form.
    """

    def __init__(self, config: RunConfig, sharded: bool = False):
        self.settings = {name: value for name, value in config.to_dict().items() if name in _NAMES} | {
            "sharded": sharded
        }

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write them."""
        (folder / FILE_NAME).write_text(json.dumps(self.settings, indent=1), encoding="utf-8")

    def check(self, folder: Path) -> None:
        """Compare them with a checkpoint's; one without them, which a plain Trainer wrote, is not asked.

        Raises:
            ValueError: Naming those that differ.
        """
        file = folder / FILE_NAME
        if not file.is_file():
            return
        there: dict[str, Any] = {"sharded": False} | json.loads(file.read_text(encoding="utf-8"))
        differing = [name for name, value in self.settings.items() if there.get(name) != value]
        if differing:
            words = ", ".join(f"{name}={there.get(name)} (here {self.settings[name]})" for name in differing)
            raise ValueError(
                f"{folder} was made with {words}: go on with the settings that it was made with, or pass --overwrite without "
                "--resume_from_checkpoint to train from the start"
            )
