"""bf16 weights that keep small updates: a 16-bit low part beside the weight, or stochastic rounding.

A bf16 weight has 8 significant bits, so most single fine-tuning updates round away entirely. Two remedies:

* ``split`` (default): the optimizer keeps the 16 bits that bf16 drops. ``join(high, low)`` is the exact float32 weight;
  the model holds its nearest bf16 (halves away from zero). Costs 2 bytes a parameter.
* ``stochastic``: round up or down at random so that the expectation is exact. Costs no memory.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["SEED_STRIDE", "BF16_UPDATES", "Noise", "join", "load", "master_dtype", "split", "stochastic_round", "store"]

BF16_UPDATES = ("split", "stochastic")
SEED_STRIDE = 0x9E3779B97F4A7C15
"""Distance between the seeds of two parameters: large and odd, so that no two steps share a seed."""


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of moments and updates: float64 for float64 weights, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Split float32 into its nearest bf16 and an int16 remainder; ``join`` restores it exactly."""
    bits = x.view(torch.int32)
    high = (bits + 0x8000) >> 16
    low = (bits - (high << 16)).to(torch.int16)
    return high.to(torch.int16).view(torch.bfloat16), low


def join(high: Tensor, low: Tensor) -> Tensor:
    """Return the float32 tensor with bf16 rounding ``high`` and remainder ``low``.

    A weight that the user set to zero keeps its old remainder. A negative one is ignored: no float lies there.
    """
    bits = high.view(torch.int16).to(torch.int32)
    remainder = torch.where(bits & 0x7FFF == 0, low.clamp(min=0), low)
    return ((bits << 16) + remainder).view(torch.float32)


class Noise:
    """Random numbers for one step of stochastic rounding, one stream per parameter, independent of the order of updates.

    Args:
        seed: Depends on the step, so that a resumed run rounds exactly like an uninterrupted one.
        streams: A distinct number per parameter. Replicated parameters have the same number on every rank, shards do not.
    """

    def __init__(self, seed: int, streams: Mapping[Tensor, int]):
        self._seed, self._streams = seed, streams
        self._generators: dict[Tensor, torch.Generator] = {}

    def of(self, param: Tensor) -> torch.Generator:
        """Return the generator of a parameter; a second call continues its stream."""
        if param not in self._generators:
            seed = (self._seed + self._streams[param] * SEED_STRIDE) % 2**63
            self._generators[param] = torch.Generator(param.device).manual_seed(seed)
        return self._generators[param]


def stochastic_round(x: Tensor, generator: torch.Generator) -> Tensor:
    """Round float32 to one of its two bf16 neighbours at random so that the expectation is ``x``."""
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    return ((x.view(torch.int32) + noise) >> 16).to(torch.int16).view(torch.bfloat16)


def load(param: Tensor, low: Tensor | None) -> Tensor:
    """Return a parameter in full precision: itself, or a float32 copy of a bf16 one."""
    if low is not None:
        return join(param, low)
    return param.to(master_dtype(param.dtype))


def store(value: Tensor, param: Tensor, low: Tensor | None, noise: Noise | None, whole: Tensor) -> None:
    """Write back what ``load`` returned, after an update.

    Args:
        value: The updated float32 copy, or ``param`` itself, which then needs no write.
        param: The model's parameter, or a slice of it.
        low: Its low part, or None.
        noise: Needed for a bf16 parameter without a low part.
        whole: The whole parameter; selects the noise stream.
    """
    if value.dtype == param.dtype:
        return
    if low is not None:
        high, remainder = split(value)
        param.copy_(high)
        low.copy_(remainder)
    else:
        assert noise is not None, "a bf16 parameter without a low part needs noise"
        param.copy_(stochastic_round(value, noise.of(whole)))
