"""The reference model of preference and RL trainers if the experts are PEFT adapters."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from molf.errors import MolfError

_REF = "ref"  # TRL's name of the adapter that it makes the reference model


def prepare_reference(trainer: Any, adapters: Sequence[str]) -> None:
    """Make the base model the reference model, or refuse where it is not what the training starts from.

    TRL makes the reference model of one adapter's copy and activates one adapter after every use of it. With several experts the
    other ones would not train, so the copy is deleted here, and TRL then runs the base model with all adapters disabled.

    Args:
        trainer: A trainer with a ``PeftModel``; one without a reference model is left alone.
        adapters: The adapters that are experts.

    Raises:
        MolfError: The base model trains too, or an expert is not at its start (``B = 0``).
    """
    model = trainer.model
    # GRPO and RLOO need no reference at beta = 0.
    if getattr(trainer, "ref_model", model) is not None or getattr(trainer, "beta", 1.0) == 0:
        return
    if trained := [name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name]:
        raise MolfError(
            f"the reference model would be the base model, which trains too ({trained[0]}, ...): {_advice(trainer)}"
        )
    if len(adapters) == 1 and _REF in model.peft_config and adapters[0] == "default":
        return  # TRL's copy of the one adapter is right
    if moved := _moved(model, adapters):
        raise MolfError(
            f"the reference model would be the base model, but training starts from experts that have trained ({moved}): "
            f"{_advice(trainer)}"
        )
    if _REF in model.peft_config:
        model.delete_adapter(_REF)


def _moved(model: nn.Module, adapters: Sequence[str]) -> str | None:
    """Return the name of a B that is not zero, if there is one."""
    own = tuple(f".lora_B.{adapter}.weight" for adapter in adapters)
    return next((name for name, p in model.named_parameters() if name.endswith(own) and p.detach().any()), None)


def _advice(trainer: Any) -> str:
    if trainer.__class__.__name__.startswith(("GRPO", "RLOO")):  # they take no ref_model
        return (
            "start from a model that has them merged, molf.add_lora_experts(molf.merge(model)), or set beta=0, or use a plain "
            "model, of which the trainer loads a second copy as its ref_model"
        )
    return "give the trainer a copy of the model as it is now, ref_model=copy.deepcopy(model)"
