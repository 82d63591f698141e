"""Runs whose model is sharded by FSDP2 (``--fsdp True``): what they need, their checkpoints, and the whole model at the end."""

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

from molf.errors import MolfError
from molf.integrations.whole_checkpoints import CheckpointPart
from molf.study.config.run_config import RunConfig
from molf.study.methods.adapters import add_adapters
from molf.study.methods.recipe import Recipe
from molf.study.run.models import load_model_and_tokenizer

FOLDER_NAME = "trained_weights"
_DDP = "leave --fsdp out, so that every process holds the whole model (DDP)"


class TrainedShards(CheckpointPart):
    """All trained weights of a sharded model with adapters, as a part of every checkpoint.

    The Trainer would save one adapter only. Each rank writes and reads its own shards; any number of ranks can resume.
    """

    replaces_weights = True
    every_rank = True

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write this rank's shards."""
        save(_trained(model), checkpoint_id=folder / FOLDER_NAME)

    def restore(self, model: nn.Module, folder: Path) -> None:
        """Load the weights of a checkpoint into a model with the same method."""
        if not (folder / FOLDER_NAME).is_dir():
            raise MolfError(
                f"{folder} has no {FOLDER_NAME}, so no sharded run with adapters wrote it: use the settings of the checkpoint, "
                "or pass --overwrite without --resume_from_checkpoint to train from the start"
            )
        weights = _trained(model)
        load(weights, checkpoint_id=folder / FOLDER_NAME)
        set_model_state_dict(model, weights, options=StateDictOptions(strict=False))


def _trained(model: nn.Module) -> dict[str, Any]:
    return get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True))


def check_processes(args: TrainingArguments) -> None:
    """Check, before anything is loaded, that the processes fit the devices and the sharding."""
    if args.n_gpu > 1:  # the Trainer would wrap the model in nn.DataParallel, which multiplies the batch
        raise MolfError(
            f"{args.n_gpu} GPUs are visible to one process: set CUDA_VISIBLE_DEVICES=0 to train on one of them, or start a "
            f"process for each with torchrun --nproc_per_node {args.n_gpu} -m molf train ..."
        )
    if args.fsdp and args.parallel_mode.value != "distributed":
        raise MolfError(
            "--fsdp shards a model over several processes, but there is only one: start them with "
            "torchrun --nproc_per_node N -m molf train ..."
        )


def check_sharding(trainer: Any, recipe: Recipe) -> None:
    """Check that a model which is to be sharded can be, and will be."""
    if not trainer.is_fsdp_enabled:
        if trainer.args.fsdp:
            raise MolfError(
                f"--fsdp: accelerate shards models on accelerators only, but this run is on {trainer.args.device}; {_DDP}"
            )
        return
    plugin = trainer.accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise MolfError(
            "fsdp_config asks for version 1, which flattens the weights of the layers: use version 2, the default"
        )
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise MolfError(
            f"fsdp_config asks for cpu_offload, but the optimizer communicates on the GPU: leave it out, or {_DDP}"
        )
    split = recipe.molf is not None and recipe.molf.get("bf16_update", "split") == "split"
    low_parts = split and any(p.dtype == torch.bfloat16 for p in trainer.model.parameters())
    if low_parts and plugin.state_dict_type == StateDictType.FULL_STATE_DICT:
        raise MolfError(
            "fsdp_config asks for FULL_STATE_DICT, but the int16 low parts of bf16 weights cannot be gathered: leave "
            "state_dict_type out (SHARDED_STATE_DICT), or use --dtype float32"
        )
    if recipe.adalora is not None or (recipe.lora or {}).get("init_lora_weights") == "eva":
        raise MolfError(f"methods with a different rank in every layer (adalora, eva) cannot be sharded: {_DDP}")
    if recipe.whole is not None:
        raise MolfError(f"method static, in which every layer trains in its own way, is not sharded: {_DDP}")


def whole_model(trainer: Any, config: RunConfig, recipe: Recipe) -> Any:
    """Gather the trained model on the CPU of rank 0; every rank must make this call.

    Returns:
        A model with the trained weights and adapters on rank 0, None on the others.
    """
    weights = trainer.accelerator.get_state_dict(trainer.model)
    if not trainer.is_world_process_zero():
        return None
    model, _ = load_model_and_tokenizer(config.model, bool(config.train.get("trust_remote_code", False)))
    if recipe.lora is not None:
        recipe = replace(recipe, lora=recipe.lora | {"init_lora_weights": False})  # skips PiSSA's SVD of every layer
    model = add_adapters(model, recipe, freeze_rest=bool(config.method.freeze_non_linear))
    model.load_state_dict(weights)
    return model
