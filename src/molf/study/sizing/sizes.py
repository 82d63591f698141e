"""How many parameters a run trains and how much memory they take."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

_MOMENTS = 8  # bytes per element: two float32 moments
_PAIR = 4  # bytes per element of MoLF's A and B, in float32


@dataclass(frozen=True)
class Sizes:
    """Parameter counts and the memory that follows from them, in elements and bytes.

    Attributes:
        parameters: Elements of the model's own weights.
        trainable: Those of them that are trained.
        lora: Elements of all LoRA pairs, inside the model (PEFT) or in the optimizer (MoLF).
        weights_bytes: The model's weights, a PEFT adapter included.
        gradients_bytes: One gradient per trained weight, in the weight's type.
        optimizer_bytes: Two float32 moments per trained weight.
        lora_pairs_bytes: MoLF's pairs: A, B and their two moments, all float32.
    """

    parameters: int
    trainable: int
    lora: int
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    lora_pairs_bytes: int

    @property
    def total_bytes(self) -> int:
        """Everything that stays in memory between steps; activations come on top."""
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.lora_pairs_bytes


def measure(model: nn.Module, routed: Iterable[nn.Linear] = (), ranks: Sequence[int] = ()) -> Sizes:
    """Count parameters and estimate memory.

    With W all weights, T the trained ones (adapters included) and P = sum over routed layers [out, in] and ranks r of
    r * (in + out)::

        weights = bytes(W)    gradients = bytes(T)    optimizer = 8 * |T|    LoRA pairs = (4 + 8) * P

    Temporary memory of a step and activations, which depend on batch and sequence length, are not in it.

    Args:
        model: The model as it is trained, with its PEFT adapter if it has one.
        routed: The layers that MoLF routes; none for the baselines.
        ranks: MoLF's LoRA ranks.
    """
    named = list(model.named_parameters())
    adapter = sum(p.numel() for name, p in named if is_adapter(name))
    trained = [p for _, p in named if p.requires_grad]
    pairs = sum(rank * (layer.in_features + layer.out_features) for layer in routed for rank in ranks)
    return Sizes(
        parameters=sum(p.numel() for _, p in named) - adapter,
        trainable=sum(p.numel() for name, p in named if p.requires_grad and not is_adapter(name)),
        lora=sum(p.numel() for name, p in named if p.requires_grad and is_adapter(name)) + pairs,
        weights_bytes=sum(p.numel() * p.element_size() for _, p in named),
        gradients_bytes=sum(p.numel() * p.element_size() for p in trained),
        optimizer_bytes=_MOMENTS * sum(p.numel() for p in trained),
        lora_pairs_bytes=(_PAIR + _MOMENTS) * pairs,
    )


def is_adapter(name: str) -> bool:
    """Tell a parameter of PEFT's from the model's own; AdaLoRA's rank count is one that does not train."""
    return ".lora_" in name or ".ranknum." in name
