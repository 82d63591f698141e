"""A run whose model is sharded over its processes (FSDP2, ``--fsdp True``): what it needs, and the whole model at its end."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import CPUOffloadPolicy, StateDictType
from transformers import TrainingArguments

from molf.integrations.whole_checkpoints import CheckpointPart
from molf.study.config.run_config import RunConfig
from molf.study.methods.adapters import add_adapters
from molf.study.methods.recipe import Recipe
from molf.study.run.models import load_model_and_tokenizer

FOLDER_NAME = "trained_weights"
_REPLACED = "leave fsdp out, and every process holds the whole model (DDP)"


class TrainedShards(CheckpointPart):
    """All that is trained beside or in adapters, as a part of every checkpoint: each rank writes and reads what it holds.

    The Trainer saves one adapter of a sharded model, and nothing of its base. Any number of ranks goes on from this.
    """

    replaces_weights = True
    every_rank = True

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write this rank's shards."""
        save(_trained(model), checkpoint_id=folder / FOLDER_NAME)

    def restore(self, model: nn.Module, folder: Path) -> None:
        """Give a model, trained in the same way, the weights of a checkpoint.

        Raises:
            ValueError: The checkpoint was not written by such a run.
        """
        if not (folder / FOLDER_NAME).is_dir():
            raise ValueError(
                f"{folder} has no {FOLDER_NAME}: it was not written by a sharded run that trains adapters; go on with the "
                "settings that it was made with, or pass --overwrite to train from the start"
            )
        weights = _trained(model)
        load(weights, checkpoint_id=folder / FOLDER_NAME)
        set_model_state_dict(model, weights, options=StateDictOptions(strict=False))


def _trained(model: nn.Module) -> dict[str, Any]:
    return get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True))


def check_processes(args: TrainingArguments) -> None:
    """Refuse to shard a model over one process, before a trainer is made.

    Raises:
        ValueError: Saying what to do.
    """
    if args.fsdp and args.parallel_mode.value != "distributed":
        raise ValueError(
            "fsdp shards a model over several processes, and this is the only one: start it with "
            "torchrun --nproc_per_node N -m molf train ..."
        )


def check_sharding(trainer: Any, recipe: Recipe) -> None:
    """Refuse what can't be sharded, and a trainer that silently does something else.

    Args:
        trainer: It shards where that was asked for, by the run's settings or by ``accelerate launch``.
        recipe: The method.

    Raises:
        ValueError: Saying what to do.
    """
    if not trainer.is_fsdp_enabled:
        if trainer.args.fsdp:
            raise ValueError(
                f"fsdp: accelerate shards models on accelerators only, and this run is on {trainer.args.device}; {_REPLACED}"
            )
        return
    plugin = trainer.accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError(
            "fsdp_config asks for version 1, which hides the layers' weights in flat ones: use version 2, the default"
        )
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise ValueError(
            f"fsdp_config asks for cpu_offload, where the optimizer can't communicate: leave it out, or {_REPLACED}"
        )
    split = recipe.molf is not None and recipe.molf.get("bf16_update", "split") == "split"
    low_parts = split and any(p.dtype == torch.bfloat16 for p in trainer.model.parameters())
    if low_parts and plugin.state_dict_type == StateDictType.FULL_STATE_DICT:
        raise ValueError(
            "FULL_STATE_DICT gathers the int16 low parts of bf16 weights, which process groups can't: leave state_dict_type out "
            "(SHARDED_STATE_DICT), or use --dtype float32"
        )
    if recipe.adalora is not None or (recipe.lora or {}).get("init_lora_weights") == "eva":
        raise ValueError(
            f"methods that give every layer a rank of its own (adalora, eva) can't be sharded with fsdp: {_REPLACED}"
        )


def whole_model(trainer: Any, config: RunConfig, recipe: Recipe) -> Any:
    """Return the trained model unsharded, on the first rank's CPU; every rank has to ask for it.

    Args:
        trainer: Its model is sharded, and stays so.
        config: The run.
        recipe: Its method.

    Returns:
        A model like the one that was loaded, with the trained weights and the adapters; None on all ranks but the first.
    """
    weights = trainer.accelerator.get_state_dict(trainer.model)
    if not trainer.is_world_process_zero():
        return None
    model, _ = load_model_and_tokenizer(config.model, bool(config.train.get("trust_remote_code", False)))
    if recipe.lora is not None:
        recipe = replace(recipe, lora=recipe.lora | {"init_lora_weights": False})  # an SVD of every layer, for PiSSA
    model = add_adapters(model, recipe, freeze_rest=bool(config.method.freeze_non_linear))
    model.load_state_dict(weights)
    return model
