"""AdaLoRA in any trainer: what PEFT leaves to the training loop, as a callback."""

import math
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

ORTHOGONALITY = 0.5
"""Weight of the orthogonality of A and B in the loss, PEFT's default."""


class AdaLoraAllocation(TrainerCallback):  # type: ignore[misc]  # transformers is not typed here
    """Fit AdaLoRA's schedule to the run's, keep its factors orthogonal, and let it allocate the ranks at every step.

    No trainer does any of it, and without it AdaLoRA is a LoRA whose ranks never change:

    - The number of steps is known when training starts: ranks are left alone for the first ``warmup`` share of it, then cut,
      and stay as they are for the last ``settled`` share.
    - The gradient of the orthogonality term, which does not depend on the data, is put in place before the step's first
      batch, so that it is clipped with the rest and counts once however many batches a step has. PEFT adds the term to the
      model's ``loss``, which TRL's trainer does not use; its ``orth_reg_weight`` must be 0 here, or it could count twice.
    - The ranks are allocated after the optimizer's step, while the gradients that measure importance are still there.

    Args:
        warmup: Share of the steps before the first cut.
        settled: Share of the steps after the last cut.
        orthogonality: Weight of the orthogonality term; 0 for none.
    """

    def __init__(self, warmup: float = 0.1, settled: float = 0.3, orthogonality: float = ORTHOGONALITY):
        self.warmup = warmup
        self.settled = settled
        self.orthogonality = orthogonality

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Fit the schedule to the number of steps.

        Raises:
            ValueError: The run has one step only.
        """
        config = _config(model)
        if state.max_steps < 2:
            raise ValueError(
                "AdaLoRA needs at least two steps, one to measure importance and one to allocate ranks by it"
            )
        config.total_step = state.max_steps
        config.tinit = math.ceil(self.warmup * state.max_steps)
        config.tfinal = int(self.settled * state.max_steps)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Put the gradient of the orthogonality term in place."""
        if not self.orthogonality:
            return
        factors = _factors(model)
        with torch.enable_grad():
            term = self.orthogonality * orthogonality(list(factors.items()))
        # Not backward(): the hooks of distributed training wait for the gradients of the batch.
        for factor, gradient in zip(factors.values(), torch.autograd.grad(term, list(factors.values())), strict=True):
            factor.grad = gradient if factor.grad is None else factor.grad + gradient

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Allocate the ranks."""
        model.base_model.update_and_allocate(state.global_step + 1)


def orthogonality(factors: list[tuple[str, Tensor]]) -> Tensor:
    """Return how far factors are from orthogonal: the mean of ``||A A^T - I||`` and ``||B^T B - I||`` (Zhang et al. 2023).

    Args:
        factors: Names with ``lora_A`` or ``lora_B`` in them, and A [r, in] or B [out, r].
    """
    distances = []
    for name, factor in factors:
        gram = factor @ factor.T if "lora_A" in name else factor.T @ factor
        distances.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)))
    return torch.stack(distances).mean()


def allocated_ranks(model: PeftModel) -> dict[str, int]:
    """Return the rank of every adapted layer: the number of its singular values that are not 0, as all are at first."""
    return {
        name.partition(".lora_E")[0]: int(values.count_nonzero())
        for name, values in model.named_parameters()
        if ".lora_E." in name
    }


def _config(model: Any) -> Any:
    return model.peft_config[model.base_model.trainable_adapter_name]


def _factors(model: Any) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad and (".lora_A." in n or ".lora_B." in n)}
