"""What a Trainer needs to build MoLF, and which of its settings MoLF cannot work with."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from molf.errors import MolfError
from molf.optimizer import MoLF

logger = logging.getLogger(__name__)

# Trainer settings that optimizer_in_backward cannot work with: the value it needs, and why.
_RELEASE_SETTINGS = {
    "gradient_accumulation_steps": (1, "needs the gradients of all micro-batches together"),
    "max_grad_norm": (0, "needs the norm of all gradients together"),
    "fp16": (False, "scales the loss, and unscaling needs all gradients together"),
}


class MoLFFactory:
    """Builds MoLF when a Trainer asks for its optimizer: ``MoLFFactory()(model, **options)``."""

    def __call__(self, model: nn.Module, args: Any = None, *, adapters: Sequence[str] = (), **options: Any) -> MoLF:
        """Build the optimizer of a model.

        Args:
            model: The model.
            args: The Trainer's arguments, which axolotl passes on; not read.
            adapters: PEFT adapters to activate first, because resuming leaves only one of them active.
            **options: Keyword arguments of ``molf.MoLF``.
        """
        if adapters:
            activate(model, adapters)
        return MoLF(model, **options)


def activate(model: Any, adapters: Sequence[str]) -> None:
    """Activate adapters of a ``PeftModel`` together, so that they run and train; its own ``set_adapter`` takes only one."""
    model.base_model.set_adapter(list(adapters))


def trainer_optimizer(args: Any = None, **options: Any) -> tuple[type[MoLFFactory], dict[str, Any]]:
    """Return what ``Trainer(optimizer_cls_and_kwargs=...)`` takes; ``molf.use_in(trainer, ...)`` takes all trainers.

    Options that are not given have MoLF's defaults, not the values of the Trainer's arguments.

    Args:
        args: The Trainer's ``TrainingArguments``; required with ``optimizer_in_backward=True``, which not all of them allow.
        **options: Keyword arguments of ``molf.MoLF``.

    Raises:
        MolfError: With ``optimizer_in_backward=True``, ``args`` is missing or sets accumulation, clipping or fp16.
    """
    if options.get("optimizer_in_backward"):
        if args is None:
            raise MolfError("optimizer_in_backward=True needs the Trainer's arguments: use molf.use_in(trainer, ...)")
        check_release_settings(vars(args))
    if args is not None:
        clip_once(args, options.get("max_grad_norm"))
    return MoLFFactory, options


def check_release_settings(settings: Mapping[str, Any]) -> None:
    """Check that a Trainer's settings allow ``optimizer_in_backward``; missing ones do."""
    for name, (allowed, reason) in _RELEASE_SETTINGS.items():
        value = settings.get(name) or allowed
        if value != allowed:
            raise MolfError(
                f"optimizer_in_backward=True with {name}={value}: every layer is updated as soon as its gradient is ready, but "
                f"{name} {reason}; set {name}={allowed}"
            )


def clip_once(args: Any, max_grad_norm: float | None) -> None:
    """Turn the Trainer's gradient clipping off if MoLF clips.

    Both would clip: the Trainer the model's gradients, then MoLF those of all experts together. ``max_grad_norm`` of a Trainer is
    1.0 by default, so a value there need not be a user's wish, but one given to MoLF is.
    """
    if max_grad_norm is not None and args.max_grad_norm:
        logger.warning(
            "MoLF clips the gradients of all experts to max_grad_norm=%g, so the Trainer's clipping to %g is now off. "
            "Set max_grad_norm=0 of the Trainer to avoid this warning",
            max_grad_norm,
            args.max_grad_norm,
        )
        args.max_grad_norm = 0.0
