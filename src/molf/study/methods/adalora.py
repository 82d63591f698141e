"""AdaLoRA in any Trainer: a callback does what PEFT leaves to the training loop."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerState

from molf.errors import MolfError

ORTHOGONALITY = 0.5
"""Weight of the orthogonality term in the loss, PEFT's default."""
WARMUP, FIXED = 0.1, 0.3


class AdaLoraAllocation(TrainerCallback):  # type: ignore[misc]  # transformers is not typed here
    """Fit AdaLoRA's schedule to the run, keep its factors orthogonal, and allocate the ranks at every step.

    No Trainer does this by itself, and without it AdaLoRA is a LoRA whose ranks never change:

    - The schedule needs the number of steps, which is known when training starts: ranks stay as they are for the first
      ``WARMUP`` share of the steps, then are cut, and stay fixed for the last ``FIXED`` share.
    - The gradient of the orthogonality term does not depend on the data. It is added before the first batch of a step, so it is
      clipped with the other gradients and counts once, however many batches a step accumulates. PEFT adds the term to the
      model's ``loss``, which TRL does not use; set PEFT's ``orth_reg_weight`` to 0 so that it never counts twice.
    - The ranks are allocated after the optimizer's step, while the gradients that measure importance still exist.

    Args:
        orthogonality: Weight of the orthogonality term; 0 for none.
    """

    def __init__(self, orthogonality: float = ORTHOGONALITY):
        self.orthogonality = orthogonality

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, *, model: Any, **kwargs: Any) -> None:
        """Fit the schedule to the number of steps."""
        if state.max_steps < 2:
            raise MolfError(
                f"method adalora with {state.max_steps} training step: it needs at least two steps, one to measure importance "
                "and one to allocate ranks; train longer or use method lora"
            )
        config = adalora_config(model)
        config.total_step = state.max_steps
        config.tinit = math.ceil(WARMUP * state.max_steps)
        config.tfinal = int(FIXED * state.max_steps)

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, *, model: Any, **kwargs: Any) -> None:
        """Add the gradient of the orthogonality term."""
        if not self.orthogonality:
            return
        factors = {
            n: p for n, p in model.named_parameters() if p.requires_grad and (".lora_A." in n or ".lora_B." in n)
        }
        with torch.enable_grad():
            term = self.orthogonality * orthogonality(factors)
        # Not backward(): hooks of distributed training would take this for the batch's gradients.
        for factor, gradient in zip(factors.values(), torch.autograd.grad(term, list(factors.values())), strict=True):
            factor.grad = gradient if factor.grad is None else factor.grad + gradient

    def on_optimizer_step(self, args: Any, state: TrainerState, control: Any, *, model: Any, **kwargs: Any) -> None:
        """Allocate the ranks."""
        model.base_model.update_and_allocate(state.global_step + 1)


def orthogonality(factors: Mapping[str, Tensor]) -> Tensor:
    """Return the mean of ``||A A^T - I||`` and ``||B^T B - I||`` over all A [r, in] and B [out, r] (Zhang et al. 2023)."""
    distances = []
    for name, factor in factors.items():
        gram = factor @ factor.T if "lora_A" in name else factor.T @ factor
        distances.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)))
    return torch.stack(distances).mean()


def adalora_config(model: Any) -> Any:
    """Return the ``AdaLoraConfig`` of the adapter that trains."""
    return model.peft_config[model.base_model.trainable_adapter_name]
