"""Checkpoints of a model that trains adapters and its own weights: PEFT saves the adapters only."""

from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import nn

from molf.integrations.whole_checkpoints import CheckpointPart
from molf.study.methods.trainable import trained_base

FILE_NAME = "trained_base.safetensors"


class TrainedBase(CheckpointPart):
    """The trained weights of the base model, as a part of every checkpoint."""

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the weights."""
        save_file({name: p.detach().contiguous() for name, p in trained_base(model).items()}, folder / FILE_NAME)

    def restore(self, model: nn.Module, folder: Path) -> None:
        """Give a model, trained in the same way, the base weights of a checkpoint.

        Raises:
            ValueError: The checkpoint was not written by such a run.
        """
        file = folder / FILE_NAME
        saved = load_file(file) if file.is_file() else {}
        weights = trained_base(model)
        if saved.keys() != weights.keys():
            raise ValueError(
                f"{folder} does not hold the base weights that this run trains ({len(saved)} of {len(weights)}): go on with "
                "the settings that it was made with, or pass --overwrite to train from the start"
            )
        for name, p in weights.items():
            p.data.copy_(saved[name])
