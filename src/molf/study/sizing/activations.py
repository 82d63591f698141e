"""What a forward pass keeps for the backward pass, found by running it on a model without weights."""

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

_OUTSIDE = -1  # the place of what no block keeps


@dataclass(frozen=True)
class Activations:
    """Bytes that a forward pass keeps for one batch, up to the last hidden states.

    Attributes:
        kept: All that autograd saves, weights left out but their copies in a lower precision counted.
        checkpointed: The most there is at a time under gradient checkpointing: the input of every block, what is kept
            outside of blocks, and all that the largest block keeps while it is computed again.
    """

    kept: int
    checkpointed: int


def measure_activations(model: nn.Module, batch: int, length: int, bf16: bool) -> Activations:
    """Run a model without weights on a full batch, and add up what autograd saves, each storage once.

    Call it in the mode that the model was made in. The numbers are those of a real forward pass on a CPU; an accelerator's
    attention kernels save the same tensors.

    Args:
        model: A causal language model or a PEFT model around one, in training mode.
        batch: Sequences.
        length: Tokens of each.
        bf16: Whether autocast to bfloat16 is on.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    blocks = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    books = _Books({p.untyped_storage()._cdata for p in model.parameters()})
    hooks = [hook for number, block in enumerate(blocks) for hook in books.follow(number, block)]
    ids = torch.zeros(batch, length, dtype=torch.long)
    inputs = {
        "input_ids": ids,
        # A mask of one row per token is taken as it is; a flatter one would be examined, and there are no values here.
        "attention_mask": torch.ones(batch, 1, length, length, dtype=torch.bool),
        "position_ids": ids,
        "use_cache": False,
    }
    try:
        with (
            torch.autograd.graph.saved_tensors_hooks(books.pack, lambda kept: kept),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16),
        ):
            base.base_model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return books.closed(len(blocks))


class _Books:
    """Who keeps which storage: the first block to save it, or none."""

    def __init__(self, weights: set[int]):
        self.weights = weights
        self.place = _OUTSIDE
        self.inputs = 0
        self.kept: dict[int, tuple[int, Tensor]] = {}  # the tensor holds its storage, so that no other gets its address

    def follow(self, number: int, block: nn.Module) -> tuple[Any, Any]:
        def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.place = number
            self.inputs += args[0].nbytes

        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.place = _OUTSIDE

        return block.register_forward_pre_hook(enter), block.register_forward_hook(leave)

    def pack(self, tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in self.weights:
            self.kept.setdefault(key, (self.place, tensor))
        return tensor

    def closed(self, blocks: int) -> Activations:
        by_place = dict.fromkeys(range(_OUTSIDE, blocks), 0)
        for place, tensor in self.kept.values():
            by_place[place] += tensor.untyped_storage().nbytes()
        outside = by_place.pop(_OUTSIDE)
        return Activations(
            kept=outside + sum(by_place.values()),
            checkpointed=outside + self.inputs + max(by_place.values(), default=0),
        )
