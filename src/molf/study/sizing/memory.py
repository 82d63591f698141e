"""How many parameters of which kind a run has, and how much memory it takes at its peak, part by part, without its weights."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers.utils.import_utils import is_torch_bf16_gpu_available

from molf.study.methods.trainable import is_adapter
from molf.study.sizing.activations import Activations, measure_activations
from molf.study.sizing.blueprint import LINEAR, Blueprint
from molf.study.sizing.sizes import largest_layer_bytes, moments_bytes

_FLOAT = 4
_MOMENTS = 8  # bytes per element: two float32 moments
_LOW_PART = 2  # bytes per element of what bfloat16 drops from a weight
_TILE_TOKENS, _TILE_WORDS = 4096, 32768  # TRL scores so many tokens over so many words of the vocabulary at a time
_TILE_COPIES = (
    8  # on a CPU: the tile, and what its softmax and its gradient take; an accelerator's kernel works in place
)


@dataclass(frozen=True)
class Count:
    """Elements of a kind of parameter.

    Attributes:
        total: All of them.
        trainable: Those that are trained.
    """

    total: int
    trainable: int


@dataclass(frozen=True)
class Memory:
    """Bytes by what takes them.

    Attributes:
        weights: ``size(dtype) * |base|``: the model's own weights.
        gradients: ``size(dtype) * |trained base|``; with ``optimizer_in_backward`` those of the largest layer, adapters included.
        states: ``8 * |trained base|``, two float32 moments, or about ``2 * |trained base|`` in 8 bits (``moments_bytes``); with
            bfloat16 weights under MoLF 2 more for each element, the low part of the weight.
        lora: ``(4 + 8) * |LoRA|`` for pairs in MoLF's optimizer (A, B and moments, all float32); adapters inside the model
            have gradients too, ``(4 + 4 + 8) * |LoRA|``, unless layers free them.
        activations: What the forward pass of a micro-batch keeps, with or without gradient checkpointing as the run has it.
        activations_all: The same without gradient checkpointing.
        activations_checkpointed: The same with it.
        logits: The scores of a tile of tokens and words, ``4 * c * min(tokens, 4096) * min(vocabulary, 32768)`` with c = 1 on
            an accelerator and 8 on a CPU, where the softmax makes copies; and where the head is trained its gradient in
            float32, ``4 * |head|``. The trainer never holds the scores of all tokens at once.
        accumulates: Whether a step has several micro-batches, so that gradients are there during the forward pass.
        released: Whether every layer frees its gradients at once.
    """

    weights: int
    gradients: int
    states: int
    lora: int
    activations: int
    activations_all: int
    activations_checkpointed: int
    logits: int
    accumulates: bool
    released: bool = False

    @property
    def resident(self) -> int:
        """What stays between steps, gradients left out: weights, states and LoRA."""
        return self.weights + self.states + self.lora

    @property
    def freeing_gradients_helps(self) -> bool:
        """Whether the peak would be lower if every layer freed its gradients at once."""
        return not self.released and (self.accumulates or self.gradients > self.activations + self.logits)

    @property
    def peak(self) -> int:
        """The most there is at a time.

        Gradients take the place of activations as the backward pass goes on, so it is
        ``resident + max(activations + logits, gradients)``; with accumulation the gradients of earlier micro-batches are
        there as well: ``resident + gradients + activations + logits``. So are those of the last layer if each frees them.
        """
        passing = self.activations + self.logits
        if self.accumulates or self.released:
            return self.resident + self.gradients + passing
        return self.resident + max(passing, self.gradients)


@dataclass(frozen=True)
class Needs:
    """What a run needs.

    Attributes:
        parameters: Counts by kind: ``base weight`` and ``bias`` of linear layers, ``LoRA``, and ``other`` (embeddings, norms,
            an untied head).
        memory: The estimate.
        tokens: Tokens of a micro-batch, padding included: sequences times length.
    """

    parameters: dict[str, Count]
    memory: Memory
    tokens: tuple[int, int]


def estimate(blueprint: Blueprint, accelerator: bool) -> Needs:
    """Count the parameters of a run and estimate its memory.

    The batch is as full as it can be: every sequence is ``max_length`` tokens long. The device's own context, the
    libraries, and what allocators waste come on top.

    Args:
        blueprint: The run's model without weights.
        accelerator: Whether it is to run on one.
    """
    batch, length = int(blueprint.setting("per_device_train_batch_size")), int(blueprint.setting("max_length") or 1024)
    bf16 = blueprint.setting("bf16")
    if bf16 is None:
        bf16 = not blueprint.setting("fp16") and is_torch_bf16_gpu_available()
    with blueprint.on_paper():
        kept = measure_activations(blueprint.model, batch, length, bool(bf16))
    return Needs(
        count_parameters(blueprint),
        _memory(blueprint, kept, batch * length, 1 if accelerator else _TILE_COPIES),
        (batch, length),
    )


def count_parameters(blueprint: Blueprint) -> dict[str, Count]:
    """Count the parameters of a run by kind."""
    model = blueprint.model
    head = model.get_output_embeddings()
    linears = [module for module in model.modules() if isinstance(module, LINEAR) and module is not head]
    kinds = {id(module.weight): "base weight" for module in linears}
    kinds |= {id(module.bias): "bias" for module in linears if module.bias is not None}
    by_kind: dict[str, list[nn.Parameter]] = {kind: [] for kind in ("base weight", "bias", "LoRA", "other")}
    for name, parameter in model.named_parameters():
        by_kind["LoRA" if is_adapter(name) else kinds.get(id(parameter), "other")].append(parameter)
    counts = {kind: Count(_elements(own), _elements(_trained(own))) for kind, own in by_kind.items()}
    if blueprint.pairs:
        counts["LoRA"] = Count(blueprint.pairs, blueprint.pairs)
    return counts


def available_memory() -> int | None:
    """Return the memory of the visible accelerator in bytes, or None without one."""
    if not torch.cuda.is_available():
        return None
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)


def _memory(blueprint: Blueprint, kept: Activations, tokens: int, copies: int) -> Memory:
    named = list(blueprint.model.named_parameters())
    base = [p for name, p in named if not is_adapter(name)]
    adapters = [p for name, p in named if is_adapter(name)]
    method = blueprint.config.method
    splits = method.routes and blueprint.config.model.dtype == "bfloat16" and method.bf16_update == "split"
    low_parts = _LOW_PART * _elements(_trained(base)) if splits else 0
    head = blueprint.model.get_output_embeddings().weight
    tile = min(tokens, _TILE_TOKENS) * min(len(head), _TILE_WORDS)
    released = method.optimizer_in_backward
    checkpointing = bool(blueprint.setting("gradient_checkpointing"))
    return Memory(
        weights=_bytes(base),
        gradients=largest_layer_bytes(named) if released else _bytes(_trained(base)),
        states=moments_bytes(_trained(base), method.optim_bits) + low_parts,
        lora=_bytes(adapters)
        + (_MOMENTS if released else _FLOAT + _MOMENTS) * _elements(_trained(adapters))
        + (_FLOAT + _MOMENTS) * blueprint.pairs,
        activations=kept.checkpointed if checkpointing else kept.kept,
        activations_all=kept.kept,
        activations_checkpointed=kept.checkpointed,
        logits=_FLOAT * (copies * tile + (head.numel() if head.requires_grad else 0)),
        accumulates=int(blueprint.setting("gradient_accumulation_steps")) > 1,
        released=released,
    )


def _trained(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [p for p in parameters if p.requires_grad]


def _elements(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)
