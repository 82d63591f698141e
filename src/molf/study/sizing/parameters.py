"""How many parameters a model has, by kind."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from molf.study.methods.trainable import is_adapter

LINEAR = (nn.Linear, Conv1D)


@dataclass(frozen=True)
class Count:
    """Elements of one kind of parameter.

    Attributes:
        total: All of them.
        trainable: Those that train.
    """

    total: int
    trainable: int

    def __add__(self, other: "Count") -> "Count":
        """Add up two kinds."""
        return Count(self.total + other.total, self.trainable + other.trainable)


def count_parameters(model: nn.Module, pairs: int = 0) -> dict[str, Count]:
    """Count the parameters of a model by kind.

    Returns:
        Counts of ``base weight`` and ``bias`` of linear layers, ``LoRA``, and ``other`` (embeddings, norms, the head).
    """
    causal_lm: Any = model
    head = causal_lm.get_output_embeddings()
    linears = [module for module in model.modules() if isinstance(module, LINEAR) and module is not head]
    kinds = {id(module.weight): "base weight" for module in linears}
    kinds |= {id(module.bias): "bias" for module in linears if module.bias is not None}
    counts = {"base weight": Count(0, 0), "bias": Count(0, 0), "LoRA": Count(pairs, pairs), "other": Count(0, 0)}
    for name, p in model.named_parameters():
        kind = "LoRA" if is_adapter(name) else kinds.get(id(p), "other")
        counts[kind] += Count(p.numel(), p.numel() if p.requires_grad else 0)
    return counts


def base_count(counts: Mapping[str, Count]) -> Count:
    """Add up the counts of all kinds but LoRA."""
    return sum((count for kind, count in counts.items() if kind != "LoRA"), Count(0, 0))
