"""Which of a Trainer's settings can't be had together with gradient release. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["check_release_settings"]

_REASONS = {
    "gradient_accumulation_steps": (1, "would need the gradients of all micro-steps together"),
    "max_grad_norm": (0, "would need the norm of all gradients together"),
    "fp16": (False, "scales the loss, and the scale would have to be divided out of all gradients together"),
}


def check_release_settings(settings: Mapping[str, Any]) -> None:
    """Refuse what needs all gradients before the first layer moves.

    Args:
        settings: A Trainer's settings by name; missing ones are not in the way.

    Raises:
        ValueError: Naming the setting, with the reason and what to set.
    """
    for name, (allowed, reason) in _REASONS.items():
        value = settings.get(name) or allowed
        if value != allowed:
            raise ValueError(
                f"optimizer_in_backward=True with {name}={value}: a layer moves as soon as its gradient is there, but {name} "
                f"{reason}; set {name}={allowed}"
            )
