"""How much memory a run takes at its peak, estimated from its model without weights."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils.import_utils import is_torch_bf16_gpu_available

from molf.numerics.quantization import block_count, is_quantizable
from molf.study.methods.trainable import is_adapter
from molf.study.sizing.activations import measure_activations
from molf.study.sizing.blueprint import Blueprint
from molf.study.sizing.parameters import Count, count_parameters

# Bytes per element.
_FLOAT = 4
_MOMENTS = 8  # two float32 moments
_8_BIT_MOMENTS, _BLOCK_MAXIMA = 2, 8  # two 8-bit moments; two float32 maxima per block
_LOW_PART = 2  # the bits of a float32 weight that bfloat16 drops

# TRL computes logits in tiles of this many tokens and words of the vocabulary.
_TILE_TOKENS, _TILE_WORDS = 4096, 32768
_CPU_TILE_COPIES = 8  # softmax and its gradient copy the tile on a CPU; an accelerator's kernel works in place


@dataclass(frozen=True)
class Memory:
    """Bytes by use.

    Attributes:
        weights: ``size(dtype) * |base|``.
        gradients: ``size(dtype) * |trained base|``; with ``optimizer_in_backward`` those of the largest layer, adapters included.
        states: ``8 * |trained base|``, two float32 moments, or about ``2 * |trained base|`` in 8 bits (``moments_bytes``); MoLF
            with bfloat16 weights adds 2 for each element, the low part of the weight.
        lora: ``(4 + 8) * |LoRA|`` for pairs in MoLF's optimizer (A, B and moments, all float32); adapters in the model also
            have gradients, ``(4 + 4 + 8) * |LoRA|``, except with ``optimizer_in_backward``.
        activations: What the forward pass of a micro-batch saves, with or without gradient checkpointing as configured.
        activations_all: The same without gradient checkpointing.
        activations_checkpointed: The same with gradient checkpointing.
        logits: One tile of logits, ``4 * c * min(tokens, 4096) * min(vocabulary, 32768)`` with c = 1 on an accelerator and 8 on
            a CPU, plus the float32 gradient of a head that trains, ``4 * |head|``.
        accumulates: Whether a step has several micro-batches, so that gradients exist during the forward pass.
        released: Whether every layer frees its gradients inside backward (``optimizer_in_backward``).
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
        """Bytes that stay between steps, without gradients: weights, states and LoRA."""
        return self.weights + self.states + self.lora

    @property
    def freeing_gradients_helps(self) -> bool:
        """Whether ``optimizer_in_backward`` would lower the peak."""
        return not self.released and (self.accumulates or self.gradients > self.activations + self.logits)

    @property
    def peak(self) -> int:
        """The largest sum at any time.

        Gradients replace activations as the backward pass proceeds: ``resident + max(activations + logits, gradients)``. With
        accumulation the gradients of earlier micro-batches exist as well, and with ``optimizer_in_backward`` those of one
        layer: ``resident + gradients + activations + logits``.
        """
        passing = self.activations + self.logits
        if self.accumulates or self.released:
            return self.resident + self.gradients + passing
        return self.resident + max(passing, self.gradients)


@dataclass(frozen=True)
class Needs:
    """What a run needs.

    Attributes:
        parameters: Counts by kind, as ``count_parameters`` returns them.
        memory: The estimate.
        tokens: Sequences of a micro-batch and tokens of each, padding included.
    """

    parameters: dict[str, Count]
    memory: Memory
    tokens: tuple[int, int]


def estimate(blueprint: Blueprint, accelerator: bool) -> Needs:
    """Count the parameters of a run and estimate its memory.

    Every sequence of a batch counts as ``max_length`` tokens long. The device's context, the libraries, and what allocators waste
    come on top.
    """
    batch, length = int(blueprint.setting("per_device_train_batch_size")), int(blueprint.setting("max_length") or 1024)
    memory = _memory(blueprint, batch, length, accelerator)
    return Needs(count_parameters(blueprint.model, blueprint.pairs), memory, (batch, length))


def available_memory() -> int | None:
    """Return the memory of the visible accelerator in bytes, or None without one."""
    if not torch.cuda.is_available():
        return None
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)


def _memory(blueprint: Blueprint, batch: int, length: int, accelerator: bool) -> Memory:
    bf16 = blueprint.setting("bf16")
    if bf16 is None:
        bf16 = not blueprint.setting("fp16") and is_torch_bf16_gpu_available()
    with blueprint.fake_mode:
        saved = measure_activations(blueprint.model, batch, length, bool(bf16))
    named = list(blueprint.model.named_parameters())
    base = [p for name, p in named if not is_adapter(name)]
    adapters = [p for name, p in named if is_adapter(name)]
    method = blueprint.config.method
    splits = method.routes and blueprint.config.model.dtype == "bfloat16" and method.bf16_update == "split"
    low_parts = _LOW_PART * _numel(_trained(base)) if splits else 0
    head = blueprint.model.get_output_embeddings().weight
    tile = min(batch * length, _TILE_TOKENS) * min(len(head), _TILE_WORDS) * (1 if accelerator else _CPU_TILE_COPIES)
    released = method.optimizer_in_backward
    return Memory(
        weights=_bytes(base),
        gradients=_largest_layer_bytes(named) if released else _bytes(_trained(base)),
        states=moments_bytes(_trained(base), method.optim_bits) + low_parts,
        lora=_bytes(adapters)
        + (_MOMENTS if released else _FLOAT + _MOMENTS) * _numel(_trained(adapters))
        + (_FLOAT + _MOMENTS) * blueprint.pairs,
        activations=saved.checkpointed if blueprint.setting("gradient_checkpointing") else saved.kept,
        activations_all=saved.kept,
        activations_checkpointed=saved.checkpointed,
        logits=_FLOAT * (tile + (head.numel() if head.requires_grad else 0)),
        accumulates=int(blueprint.setting("gradient_accumulation_steps")) > 1,
        released=released,
    )


def moments_bytes(parameters: Iterable[Tensor], optim_bits: int = 32) -> int:
    """Return the bytes of two moments of each parameter: ``8 N`` in float32.

    In 8 bits a matrix ``[out, in]`` of 4096 elements or more takes ``2 N + 8 out ceil(in / 256)``.
    """
    total = 0
    for p in parameters:
        if optim_bits == 8 and is_quantizable(p):
            total += _8_BIT_MOMENTS * p.numel() + _BLOCK_MAXIMA * len(p) * block_count(p.numel() // len(p))
        else:
            total += _MOMENTS * p.numel()
    return total


def _largest_layer_bytes(named: Iterable[tuple[str, Tensor]]) -> int:
    """Return the bytes of the largest layer's gradients, those of its adapters included."""
    by_layer: dict[str, int] = {}
    for name, p in named:
        layer = name.split(".lora_")[0] if is_adapter(name) else name.rpartition(".")[0].removesuffix(".base_layer")
        by_layer[layer] = by_layer.get(layer, 0) + p.requires_grad * p.nbytes
    return max(by_layer.values(), default=0)


def _trained(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [p for p in parameters if p.requires_grad]


def _numel(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def _bytes(parameters: Iterable[Tensor]) -> int:
    return sum(p.nbytes for p in parameters)
