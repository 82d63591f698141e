"""Checkpoints of a model that trains adapters and its own weights: PEFT saves the adapters only."""

import os
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from molf.study.sizing.sizes import is_adapter

FILE_NAME = "trained_base.safetensors"


class TrainedBase(TrainerCallback):  # type: ignore[misc]  # transformers is not typed here
    """Add the trained weights of the base model to every ``checkpoint-N`` folder, from which ``restore_base`` takes them."""

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Write the file, whole or not at all."""
        if not state.is_world_process_zero:
            return
        file = Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE_NAME
        partial = file.with_name(f"{FILE_NAME}.partial")
        save_file({name: p.detach().contiguous() for name, p in trained_base(model).items()}, partial)
        os.replace(partial, file)


def restore_base(model: nn.Module, checkpoint: Path) -> None:
    """Give a model the base weights of a checkpoint.

    Args:
        model: The model with its adapters, trained in the same way.
        checkpoint: A ``checkpoint-N`` folder.

    Raises:
        ValueError: The checkpoint was not written by such a run.
    """
    file = checkpoint / FILE_NAME
    saved = load_file(file) if file.is_file() else {}
    weights = trained_base(model)
    if saved.keys() != weights.keys():
        raise ValueError(
            f"{checkpoint} does not hold the base weights that this run trains ({len(saved)} of {len(weights)}): go on with "
            "the settings that it was made with, or pass --overwrite to train from the start"
        )
    for name, p in weights.items():
        p.data.copy_(saved[name])


def trained_base(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights that are trained and belong to no adapter, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad and not is_adapter(name)}
