"""What a forward pass saves for the backward pass, found by running it on a model without weights."""

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.overrides import TorchFunctionMode
from transformers.modeling_layers import GradientCheckpointingLayer

from molf.errors import MolfError

_OUTSIDE = -1  # the block number of what is saved outside of blocks


@dataclass(frozen=True)
class Activations:
    """Bytes that autograd saves for one batch, up to the last hidden states.

    Attributes:
        kept: All saved tensors: no weights, but their copies in a lower precision.
        checkpointed: The peak under gradient checkpointing: the input of every block, what is saved outside of blocks, and
            all that the largest block saves while it is recomputed.
    """

    kept: int
    checkpointed: int


def measure_activations(model: nn.Module, batch: int, length: int, bf16: bool) -> Activations:
    """Run a model without weights on a full batch and add up what autograd saves, each storage once.

    Call it in the fake mode of the model. The result is that of a real forward pass on a CPU; attention kernels of an accelerator
    save the same tensors.

    Args:
        model: A causal language model or a PEFT model around one, in training mode.
        batch: Number of sequences.
        length: Tokens of each.
        bf16: Whether to autocast to bfloat16.

    Raises:
        MolfError: If the forward pass looks at values, such as the routing of some mixtures of experts.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    blocks = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    saved = _SavedTensors({p.untyped_storage()._cdata for p in model.parameters()})
    hooks = [hook for number, block in enumerate(blocks) for hook in saved.register(number, block)]
    ids = torch.zeros(batch, length, dtype=torch.long)
    # transformers uses a 4-D mask as it is, but would look at the values of a 2-D one for SDPA, and there are none.
    mask = (batch, 1, length, length) if base._supports_sdpa else (batch, length)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones(mask, dtype=torch.bool),
        "position_ids": ids,
        "use_cache": False,
    }
    try:
        with (
            torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor),
            _GroupedProducts(),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16),
        ):
            base.base_model(**inputs)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise MolfError(
            f"the forward pass of {type(base).__name__} looks at values ({error.func}), and a model without weights has none: "
            "its memory can't be planned; train a few steps on the device instead (--max_steps 2)"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return saved.activations(len(blocks))


class _GroupedProducts(TorchFunctionMode):
    """Runs the products of stacked experts by transformers' own operator: torch's knows tensors without storage in bfloat16 only.

    Both save the same tensors, but for the offsets of the groups.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one function."""
        if func is torch._grouped_mm:
            return torch.ops.transformers.grouped_mm_fallback(*args[:2], kwargs["offs"])
        return func(*args, **(kwargs or {}))


class _SavedTensors:
    """Counts each saved storage for the first block that saves it."""

    def __init__(self, weights: set[int]):
        self.weights = weights
        self.block = _OUTSIDE
        self.inputs = 0
        # The tensor keeps its storage alive, so its address is not reused.
        self.saved: dict[int, tuple[int, Tensor]] = {}

    def register(self, number: int, block: nn.Module) -> tuple[Any, Any]:
        def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.block = number
            self.inputs += args[0].nbytes

        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.block = _OUTSIDE

        return block.register_forward_pre_hook(enter), block.register_forward_hook(leave)

    def pack(self, tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in self.weights:
            self.saved.setdefault(key, (self.block, tensor))
        return tensor

    def activations(self, blocks: int) -> Activations:
        by_block = dict.fromkeys(range(_OUTSIDE, blocks), 0)
        for block, tensor in self.saved.values():
            by_block[block] += tensor.untyped_storage().nbytes()
        outside = by_block.pop(_OUTSIDE)
        return Activations(
            kept=outside + sum(by_block.values()),
            checkpointed=outside + self.inputs + max(by_block.values(), default=0),
        )
