"""The trainer's settings: TRL's ``SFTConfig`` with the defaults of the published recipe."""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import HfHubHTTPError
from torch.utils.data import DataLoader
from transformers import get_scheduler
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.utils import is_liger_kernel_available
from transformers.utils.import_utils import is_torch_bf16_gpu_available
from trl import SFTConfig

from molf.errors import MolfError
from molf.study.config.fields import setting
from molf.study.config.fsdp_config import resolve_fsdp
from molf.study.config.run_config import PUBLISHED_RECIPE, suggestion

_NOT_LISTED = ("azure_ml", "flyte")
"""Trackers that transformers does not always list as available, even if they are."""


_NOT_READ = {
    "model_init_kwargs": "a model is loaded by dtype, attn_implementation and trust_remote_code",
    "dataset_text_field": "texts are in the column text",
    "dataset_kwargs": "rows are always tokenised and cut",
}
"""Settings of TRL's trainer that have no effect, as it gets a model and tokens; and why."""


def _published(name: str, help: str) -> Any:
    return setting(PUBLISHED_RECIPE[name], help)


@dataclass
class TrainConfig(SFTConfig):  # type: ignore[misc]  # TRL is not typed
    """``trl.SFTConfig`` with the defaults of the published recipe, and bf16 autocast if the accelerator supports it."""

    _argument_group_name: ClassVar[str] = "training (every field of trl.SFTConfig)"

    # What each of them shapes is in TRAINER_LEVELS, which needs no TRL.
    learning_rate: float = _published(
        "learning_rate", "Learning rate of full-rank updates, and of LoRA ones unless lora_learning_rate is given."
    )
    weight_decay: float = _published("weight_decay", "Weight decay of full-rank updates.")
    per_device_train_batch_size: int = _published("per_device_train_batch_size", "Examples per device and micro-step.")
    gradient_accumulation_steps: int = _published("gradient_accumulation_steps", "Micro-steps per optimizer step.")
    num_train_epochs: float = _published("num_train_epochs", "Passes over the training rows.")
    lr_scheduler_type: str = _published("lr_scheduler_type", "Schedule of all learning rates: cosine, linear, ...")
    warmup_steps: float = _published("warmup_steps", "Warm-up, in steps; below 1 a share of all steps.")
    max_grad_norm: float = _published("max_grad_norm", "Largest gradient norm before clipping; 0 for no clipping.")
    seed: int = _published("seed", "Seed of every random choice of the run.")
    report_to: None | str | list[str] = _published(
        "report_to", "Experiment tracker: none, tensorboard, wandb, trackio, ..."
    )
    save_strategy: str = _published("save_strategy", "When to write checkpoint-N folders: no, steps or epoch.")

    bf16: bool | None = setting(
        None, "bfloat16 autocast; where unset, on accelerators that have bfloat16 unless fp16 is set."
    )

    dataloader_pin_memory: bool = setting(True, "Pin host memory where there is an accelerator.")

    def __post_init__(self) -> None:
        # Without accelerators, the ranks of a machine would each train a copy of their own unless the CPU is asked for.
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
            self.use_cpu = True
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        self.dataloader_pin_memory = (
            self.dataloader_pin_memory and not self.use_cpu and torch.accelerator.is_available()
        )
        # Newer transformers warn about the old names, which TRL and its users still use.
        for new, old in (
            ("activation_checkpointing", "gradient_checkpointing"),
            ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"),
        ):
            if getattr(self, new, False) is None:
                setattr(self, new, getattr(self, old))
        resolve_fsdp(self)
        super().__post_init__()


def build_train_config(settings: Mapping[str, Any]) -> TrainConfig:
    """Build the trainer's settings.

    Raises:
        MolfError: A name is not a field of ``TrainConfig``, a setting has no effect, ``fsdp_config`` is not usable, a tracker of
            ``report_to`` is unknown or not installed, or DeepSpeed is asked for.
    """
    known = [f.name for f in fields(TrainConfig) if f.init]
    for name in settings:
        if name not in known:
            raise MolfError(f"unknown setting {name!r}{suggestion(name, known)}")
    if settings.get("deepspeed") or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise MolfError(
            "deepspeed is not supported: ZeRO flattens and partitions the weights, and MoLF needs each layer's matrix. Shard the "
            "model by FSDP2 instead: torchrun --nproc_per_node N -m molf train --fsdp True ..."
        )
    if settings.get("save_only_model"):
        raise MolfError(
            "save_only_model=True would leave checkpoints that no run can resume from, also after a signal; leave it out, and "
            "limit checkpoints by save_total_limit or save_strategy. The model itself is always saved at the end"
        )
    for name, why in _NOT_READ.items():
        if settings.get(name) not in (None, "text", {}):
            raise MolfError(f"{name}={settings[name]} has no effect, as {why}; leave it out")
    _check_trackers(settings.get("report_to"))
    _check_numbers(settings)
    if settings.get("load_best_model_at_end") and "save_steps" not in settings:  # a checkpoint at every evaluation
        every = settings.get("eval_steps") or settings.get("logging_steps") or TrainConfig.logging_steps
        settings = {**settings, "save_steps": every}
    with trainer_errors():
        config = TrainConfig(**settings)
        _build_once(config)
    _check_validation(config)
    _check_available(config)
    return config


_MANY_STEPS = 10**6  # if their number is not known yet


@contextmanager
def trainer_errors() -> Iterator[None]:
    """Turn errors of the libraries about the trainer's settings into a ``MolfError`` of one line."""
    try:
        yield
    except MolfError:
        raise
    except (ValueError, TypeError, ImportError, ConnectionError, HfHubHTTPError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise MolfError(f"the trainer does not take these settings: {reason}") from error


def _build_once(config: TrainConfig) -> None:
    """Build what the Trainer builds when the training starts, for its errors: the schedule and the loading of batches."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate)
    steps = config.max_steps if config.max_steps > 0 else _MANY_STEPS
    get_scheduler(
        config.lr_scheduler_type,
        optimizer,
        num_warmup_steps=config.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=config.lr_scheduler_kwargs,
    )
    DataLoader(
        [0],  # type: ignore[arg-type]
        num_workers=config.dataloader_num_workers,
        prefetch_factor=config.dataloader_prefetch_factor,
        persistent_workers=config.dataloader_persistent_workers,
    )


def _check_available(config: TrainConfig) -> None:
    if config.use_liger_kernel and not is_liger_kernel_available():
        raise MolfError(
            "use_liger_kernel=True: the package is not installed; pip install liger-kernel, or leave it out"
        )
    if config.activation_offloading and (config.use_cpu or not torch.accelerator.is_available()):
        raise MolfError(
            "activation_offloading=True moves activations from an accelerator, and there is none; leave it out"
        )
    if config.push_to_hub and HF_HUB_OFFLINE:
        raise MolfError("push_to_hub=True, but HF_HUB_OFFLINE forbids it: unset one of them")
    if config.push_to_hub and config.save_strategy == "no":
        raise MolfError(
            "push_to_hub=True uploads checkpoints, and save_strategy=no writes none: give another save_strategy, or upload the "
            "finished run with `hf upload NAME FOLDER`"
        )


_AT_LEAST_ONE = ("per_device_train_batch_size", "gradient_accumulation_steps", "max_length")
_AT_LEAST_ZERO = ("learning_rate", "weight_decay", "max_grad_norm", "neftune_noise_alpha", "router_aux_loss_coef")
_BELOW_ONE = ("adam_beta1", "adam_beta2", "label_smoothing_factor")


def _check_numbers(settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise MolfError(f"{name}={value} must be a finite number")
        if name in _AT_LEAST_ONE and value is not None and value < 1:
            raise MolfError(f"{name}={value} must be at least 1")
        if name in _AT_LEAST_ZERO and value is not None and value < 0:
            raise MolfError(f"{name}={value} must be 0 or more")
        if name in _BELOW_ONE and not 0 <= value < 1:
            raise MolfError(f"{name}={value} must be at least 0 and below 1")
    seed, epsilon = settings.get("seed"), settings.get("adam_epsilon")
    if seed is not None and not 0 <= seed < 2**32:
        raise MolfError(f"seed={seed} must be between 0 and 4294967295 (2**32 - 1)")
    if epsilon is not None and not epsilon > 0:
        raise MolfError(f"adam_epsilon={epsilon} must be above 0, as steps are divided by sqrt(v) + adam_epsilon")
    steps, epochs = settings.get("max_steps"), settings.get("num_train_epochs")
    if steps is not None and steps < 1 and steps != -1:
        raise MolfError(f"max_steps={steps} must be at least 1, or -1 to train for num_train_epochs")
    if epochs is not None and not epochs > 0:
        raise MolfError(f"num_train_epochs={epochs} must be above 0; `molf eval` evaluates without training")


def _check_validation(config: TrainConfig) -> None:
    """Check what chooses the best checkpoint; the Trainer would ignore some of it, or notice in the middle of the training."""
    metric = config.metric_for_best_model
    if metric not in (None, "loss", "eval_loss"):
        raise MolfError(f"metric_for_best_model={metric}: evaluations during training measure the loss only; use loss")
    if config.greater_is_better:
        raise MolfError("greater_is_better=True would keep the weights with the highest loss; leave it out")
    choosing = "load_best_model_at_end" if config.load_best_model_at_end else "save_strategy=best"
    if (config.load_best_model_at_end or config.save_strategy == "best") and config.eval_strategy == "no":
        raise MolfError(f"{choosing} needs evaluations during training: pass --eval_strategy steps or epoch too")


def evaluates_in_training(config: TrainConfig) -> bool:
    """Return whether the Trainer evaluates, for which rows are held out."""
    return bool(config.eval_strategy != "no" or config.eval_on_start)


def _check_trackers(report_to: None | str | list[str]) -> None:
    trackers = [report_to] if isinstance(report_to, str) else report_to or []
    for name in trackers:
        if name in ("all", "none", *get_available_reporting_integrations(), *_NOT_LISTED):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            known = sorted(INTEGRATION_TO_CALLBACK)
            raise MolfError(
                f"report_to={name} is not a tracker{suggestion(name, known)} (known: none, {', '.join(known)})"
            )
        raise MolfError(f"report_to={name}: the tracker is not installed; pip install {name}, or use --report_to none")
