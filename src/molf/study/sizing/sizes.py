"""Parameters of a loaded model, and what stays in memory between steps; ``memory`` plans all of it, without loading any."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from molf.numerics.quantization import block_count, is_large_matrix
from molf.study.methods.trainable import is_adapter

_MOMENTS = 8  # bytes per element: two float32 moments
_PACKED, _MAXIMA = 2, 8  # bytes per element and per block: two 8-bit moments and their block maxima
_PAIR = 4  # bytes per element of MoLF's A and B, in float32


@dataclass(frozen=True)
class Sizes:
    """Parameter counts and the memory that follows from them, in elements and bytes.

    Attributes:
        parameters: Elements of the model's own weights.
        trainable: Those of them that are trained.
        lora: Elements of all LoRA pairs, inside the model (PEFT) or in the optimizer (MoLF).
        weights_bytes: The model's weights, a PEFT adapter included.
        gradients_bytes: One gradient per trained weight, in the weight's type; of the largest layer if each is freed at once.
        optimizer_bytes: Two moments per trained weight, float32 or in 8 bits.
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


def measure(
    model: nn.Module,
    routed: Iterable[nn.Linear] = (),
    ranks: Sequence[int] = (),
    optim_bits: int = 32,
    released: bool = False,
) -> Sizes:
    """Count parameters and estimate memory.

    With W all weights, T the trained ones (adapters included) and P = sum over routed layers [out, in] and ranks r of
    r * (in + out)::

        weights = bytes(W)    gradients = bytes(T)    optimizer = moments(T)    LoRA pairs = (4 + 8) * P

    Temporary memory of a step and activations, which depend on batch and sequence length, are not in it.

    Args:
        model: The model as it is trained, with its PEFT adapter if it has one.
        routed: The layers that MoLF routes; none for the baselines.
        ranks: MoLF's LoRA ranks.
        optim_bits: Bits of MoLF's moments.
        released: Whether MoLF frees the gradients of a layer as soon as they are there.
    """
    named = list(model.named_parameters())
    adapter = sum(p.numel() for name, p in named if is_adapter(name))
    trained = [p for _, p in named if p.requires_grad]
    own = moments_bytes((p for name, p in named if p.requires_grad and not is_adapter(name)), optim_bits)
    pairs = sum(rank * (layer.in_features + layer.out_features) for layer in routed for rank in ranks)
    return Sizes(
        parameters=sum(p.numel() for _, p in named) - adapter,
        trainable=sum(p.numel() for name, p in named if p.requires_grad and not is_adapter(name)),
        lora=sum(p.numel() for name, p in named if p.requires_grad and is_adapter(name)) + pairs,
        weights_bytes=sum(p.numel() * p.element_size() for _, p in named),
        gradients_bytes=largest_layer_bytes(named) if released else sum(p.nbytes for p in trained),
        optimizer_bytes=own + moments_bytes(p for name, p in named if p.requires_grad and is_adapter(name)),
        lora_pairs_bytes=(_PAIR + _MOMENTS) * pairs,
    )


def largest_layer_bytes(named: Iterable[tuple[str, Tensor]]) -> int:
    """Return the bytes of the gradients of the layer that has most, its adapters included.

    Args:
        named: All parameters by name.
    """
    by_layer: dict[str, int] = {}
    for name, p in named:
        layer = name.split(".lora_")[0] if is_adapter(name) else name.rpartition(".")[0].removesuffix(".base_layer")
        by_layer[layer] = by_layer.get(layer, 0) + p.requires_grad * p.nbytes
    return max(by_layer.values(), default=0)


def moments_bytes(parameters: Iterable[Tensor], optim_bits: int = 32) -> int:
    """Return the bytes of two moments of each parameter: ``8 N`` in float32.

    In 8 bits a matrix ``[out, in]`` of 4096 elements or more takes ``2 N + 8 out ceil(in / 256)``.
    """
    total = 0
    for p in parameters:
        if optim_bits == 8 and is_large_matrix(p):
            total += _PACKED * p.numel() + _MAXIMA * len(p) * block_count(p.numel() // len(p))
        else:
            total += _MOMENTS * p.numel()
    return total
