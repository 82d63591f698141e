"""MoLF for any Hugging Face or TRL trainer, without a subclass."""

from __future__ import annotations

from typing import Any

from torch import nn

from molf.integrations.release_settings import check_release_settings
from molf.optimizer import MoLF

__all__ = ["MoLFFactory", "trainer_optimizer"]


class MoLFFactory:
    """What the Trainer asks for when an optimizer needs the model itself: ``MoLFFactory()(model, **options)``."""

    def __call__(self, model: nn.Module, **options: Any) -> MoLF:
        """Build the optimizer of this model."""
        return MoLF(model, **options)


def trainer_optimizer(args: Any = None, **options: Any) -> tuple[type[MoLFFactory], dict[str, Any]]:
    """Return what ``Trainer(optimizer_cls_and_kwargs=...)`` takes to train with MoLF.

    The Trainer builds the optimizer itself, after placing the model, and saves and resumes it like its own. Learning rate
    and weight decay are taken from these options; the schedule is the Trainer's. Give ``max_grad_norm`` here and set the
    Trainer's to 0: only the optimizer sees the LoRA gradients. Trainers whose constructor lacks the argument take it as an
    attribute: ``trainer.optimizer_cls_and_kwargs = molf.trainer_optimizer(...)`` before ``trainer.train()``.

    Args:
        args: The Trainer's own ``TrainingArguments``; needed with ``optimizer_in_backward=True``, with which not all of them
            go together.
        **options: The keyword arguments of ``molf.MoLF``.

    Raises:
        ValueError: With ``optimizer_in_backward=True``, if the arguments are missing, accumulate, clip or scale the loss.
    """
    if options.get("optimizer_in_backward"):
        if args is None:
            raise ValueError(
                "optimizer_in_backward=True: give the Trainer's arguments too, trainer_optimizer(args, ...), so that settings "
                "which can't be had with it are refused and not ignored"
            )
        check_release_settings(vars(args))
    return MoLFFactory, options
