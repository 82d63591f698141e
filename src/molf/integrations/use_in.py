"""MoLF in any Hugging Face or TRL trainer, by one call."""

import difflib
import functools
import inspect
import logging
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any, TypeVar

from peft import PeftModel
from torch import nn
from transformers import Trainer, TrainerCallback

from molf.errors import MolfError
from molf.integrations.lora_experts import trained_adapters, unsaved_parameters
from molf.integrations.reference_model import prepare_reference
from molf.integrations.trainer import MoLFFactory, activate, check_release_settings, clip_once
from molf.optimizer import MoLF

logger = logging.getLogger(__name__)

AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)

# What Trainers call options of MoLF.
_TRAINER_NAMES = {"learning_rate": "lr", "lora_learning_rate": "lora_lr", "adam_epsilon": "eps", "adam_beta1": "betas"}
_ADAMW = ("adamw_torch", "adamw_torch_fused")  # what a Trainer takes by default


def use_in(trainer: AnyTrainer, **options: Any) -> AnyTrainer:
    """Train with MoLF in a Trainer of transformers or TRL: ``molf.use_in(trainer, ranks=(32,)).train()``.

    Works with every Trainer that builds its optimizer when training starts: ``Trainer``, and TRL's SFT, DPO, KTO, GRPO, RLOO and
    Reward trainers. Schedules, accumulation, checkpoints, resuming, DDP and FSDP2 stay the Trainer's.

    What is not given comes from the Trainer's arguments: ``lr`` (``learning_rate``), ``weight_decay`` (LoRA experts' is at most
    0.01), ``betas``, ``eps`` and ``max_grad_norm``. MoLF clips in the step, where it sees the gradients of all experts, and the
    Trainer does not; with ``max_grad_norm=None`` nobody does.

    Of a model with several PEFT adapters as experts, the Trainer activates only one when it loads a checkpoint: all are activated
    again. Where TRL would make an adapter the reference model, the base model without adapters is it. A Trainer saves adapters
    only: base weights that train beside them are named in a warning, and such a run is not resumed.

    Args:
        trainer: The trainer, before ``train()``; made without ``optimizers`` and ``optimizer_cls_and_kwargs``.
        **options: Keyword arguments of ``molf.MoLF``.

    Returns:
        The same trainer.

    Raises:
        MolfError: DeepSpeed is enabled, the trainer has an optimizer already, ``optimizer_in_backward`` meets accumulation,
            clipping or fp16, the base model would be the reference model but trains or has trained experts, or
            ``load_best_model_at_end`` is set and there are several adapters, or base weights that train beside them.
        TypeError: An option is unknown, or ``trainer`` is no trainer.
    """
    if not isinstance(trainer, Trainer):
        kind = f"the class {trainer.__name__}" if isinstance(trainer, type) else type(trainer).__name__
        raise TypeError(
            f"use_in takes a trainer, of transformers or TRL, got {kind}: make one first, SFTTrainer(model, ...) for example"
        )
    check_names(options)
    if trainer.is_deepspeed_enabled:
        raise MolfError(
            "the trainer uses DeepSpeed, whose ZeRO flattens parameters and takes other optimizers' place, and MoLF routes "
            "matrices: leave deepspeed out and use FSDP2, which shards weights, gradients and optimizer state like ZeRO-3: "
            "TrainingArguments(fsdp=True)"
        )
    if (given := _given_optimizer(trainer)) is not None:
        raise MolfError(
            f"the trainer has an optimizer already ({given}): make it without optimizers and optimizer_cls_and_kwargs, and "
            "call use_in before train()"
        )
    if trainer.args.optim not in _ADAMW:
        logger.warning("optim=%r of the Trainer has no effect: its optimizer is MoLF", str(trainer.args.optim.value))
    adapted = isinstance(trainer.model, PeftModel)
    adapters = trained_adapters(trainer.model) if adapted else ()
    unsaved = _check_adapters(trainer, adapters) if adapted else []
    args = copy(trainer.args)  # the user may give the same arguments to another trainer
    # An earlier call has turned the Trainer's clipping off.
    earlier = next((own for own in trainer.callback_handler.callbacks if isinstance(own, InUse)), None)
    clipping = args.max_grad_norm or (None if earlier is None else earlier.clipping)
    options.setdefault("max_grad_norm", clipping or None)
    args.max_grad_norm = 0.0
    if options.get("optimizer_in_backward"):
        check_release_settings({**vars(args), "max_grad_norm": options["max_grad_norm"]})
    trainer.args = args
    trainer.optimizer_cls_and_kwargs = functools.partial(_Factory, args, adapters), options
    trainer.remove_callback(InUse)
    trainer.add_callback(InUse(adapters, clipping, unsaved))
    return trainer


def _check_adapters(trainer: AnyTrainer, adapters: Sequence[str]) -> list[str]:
    """Check that a Trainer can train adapters as experts; return the trained parameters that its checkpoints will not have."""
    prepare_reference(trainer, adapters)
    whole = getattr(trainer, "parts", ())  # of WholeCheckpoints
    unsaved = [] if whole else unsaved_parameters(trainer.model, adapters)
    if trainer.args.load_best_model_at_end and len(adapters) > 1:
        raise MolfError(
            f"load_best_model_at_end with the adapters {', '.join(adapters)}: the Trainer would load only one of them; set it to "
            "False and load the best checkpoint's adapters after training"
        )
    if trainer.args.load_best_model_at_end and unsaved:
        raise MolfError(f"load_best_model_at_end would load the adapters only, but {_base_trains(unsaved)}")
    if unsaved:
        logger.warning(
            "Checkpoints, and what the trainer saves, will have the adapters only, but %s. Or save "
            "molf.merge(trainer.model) in the end",
            _base_trains(unsaved),
        )
    return unsaved


class _Factory(MoLFFactory):
    """Builds MoLF with what a Trainer's arguments say when training starts: a hyperparameter search changes them."""

    def __init__(self, args: Any, adapters: Sequence[str]):
        self._args, self._adapters = args, adapters

    def __call__(self, model: nn.Module, *_: Any, **options: Any) -> MoLF:
        """Build the optimizer of a model; axolotl gives the Trainer's arguments, too."""
        args = self._args
        decay = options.get("weight_decay", args.weight_decay)
        settings = {
            "lr": args.learning_rate,
            "weight_decay": decay,
            "lora_weight_decay": min(decay, 0.01),
            "betas": (args.adam_beta1, args.adam_beta2),
            "eps": args.adam_epsilon,
        }
        return super().__call__(model, adapters=self._adapters, **{**settings, **options})


class InUse(TrainerCallback):  # type: ignore[misc]
    """Makes sure, when training starts, that MoLF and all of its experts train.

    Args:
        adapters: The PEFT adapters that are experts.
        clipping: ``max_grad_norm`` of the Trainer's arguments, which another call of ``use_in`` asks for.
        unsaved: Trained parameters that checkpoints do not have.
    """

    def __init__(self, adapters: Sequence[str] = (), clipping: float | None = None, unsaved: Sequence[str] = ()):
        self._adapters, self._unsaved = adapters, unsaved
        self.clipping = clipping

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any, **kwargs: Any) -> None:
        """Activate all experts, after the Trainer has loaded a checkpoint.

        Raises:
            MolfError: The Trainer built another optimizer, its settings have become such that MoLF cannot work with them, or it
                resumes from a checkpoint without weights that train.
        """
        molf = getattr(optimizer, "optimizer", optimizer)
        if not isinstance(molf, MoLF):
            raise MolfError(
                f"this trainer built {type(molf).__name__} although molf.use_in gave it MoLF: its create_optimizer does not read "
                "optimizer_cls_and_kwargs. Use a trainer that does, or pass optimizers=(molf.MoLF(model, ...), None)"
            )
        if state.global_step and self._unsaved:
            raise MolfError(
                f"the checkpoint of step {state.global_step} has the adapters only, but {_base_trains(self._unsaved)}"
            )
        if state.global_step and not any(molf.state.values()):
            logger.warning(
                "The checkpoint of step %d has no state of the optimizer (save_only_model), so the moments, the LoRA experts of "
                "a plain model and the schedule begin anew; set save_only_model=False for runs that are to be resumed",
                state.global_step,
            )
        if molf.optimizer_in_backward:
            check_release_settings(vars(args))
        clip_once(args, molf.max_grad_norm)
        if self._adapters:
            activate(model, self._adapters)


def _base_trains(names: Sequence[str]) -> str:
    return (
        f"{len(names)} parameters of the base model train, too ({names[0]}, ...). Give the trainer the plain model to have whole "
        "checkpoints: molf.use_in(trainer, ranks=...) takes the same steps with it"
    )


def check_names(options: Mapping[str, Any]) -> None:
    """Check that ``MoLF`` has options of these names.

    Raises:
        TypeError: It has not.
    """
    known = [name for name in inspect.signature(MoLF).parameters if name != "model"]
    for name in options:
        if name not in known:
            close = [_TRAINER_NAMES[name]] if name in _TRAINER_NAMES else difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise TypeError(f"molf.MoLF has no option {name!r}: {hint}It has {', '.join(known)}")


def _given_optimizer(trainer: Any) -> str | None:
    """Return the name of the optimizer that a trainer was given, or has made; an earlier ``use_in`` does not count."""
    if trainer.optimizer is not None:
        return type(trainer.optimizer).__name__
    kind, _ = trainer.optimizer_cls_and_kwargs or (None, None)
    if kind is None or getattr(kind, "func", None) is _Factory:
        return None
    return str(getattr(kind, "__name__", kind))
