"""bf16 weights that lose nothing: a 16-bit low part beside the weight, or stochastic rounding.

A bf16 weight keeps 8 significant bits, so most single fine-tuning updates round away entirely. Two ways out:

* ``split`` (default): the optimizer keeps the 16 bits that bf16 drops. ``join(high, low)`` is the exact float32 weight,
  and the model holds it rounded to the nearest bf16 (halves away from zero). Costs 2 bytes a parameter.
* ``stochastic``: round up or down at random, in proportion, so that updates survive in expectation. Costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["APART", "BF16_UPDATES", "Noise", "join", "load", "master_dtype", "split", "stochastic_round", "store"]

BF16_UPDATES = ("split", "stochastic")
APART = 0x9E3779B97F4A7C15
"""Between the seeds of two parameters; odd and large, so that no step of one has the seed of a step of another."""


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that moments and updates are computed in: float64 stays, all else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Split float32 into its nearest bf16 and the int16 rest; ``join`` undoes it exactly."""
    bits = x.view(torch.int32)
    high = (bits + 0x8000) >> 16
    low = (bits - (high << 16)).to(torch.int16)
    return high.to(torch.int16).view(torch.bfloat16), low


def join(high: Tensor, low: Tensor) -> Tensor:
    """Return the float32 tensor whose bf16 rounding is ``high`` and whose rest is ``low``.

    A weight that was zeroed by hand keeps its old rest, and below zero there is no float: such a rest counts as none.
    """
    bits = high.view(torch.int16).to(torch.int32)
    rest = torch.where(bits & 0x7FFF == 0, low.clamp(min=0), low)
    return ((bits << 16) + rest).view(torch.float32)


class Noise:
    """The random numbers of one step's stochastic rounding: every parameter has its own, whichever comes first.

    What every rank holds whole is rounded alike on all of them; shards have random numbers of their own.

    Args:
        seed: Of this step, so that a resumed run rounds exactly as an uninterrupted one.
        streams: A number for every parameter that no other has.
    """

    def __init__(self, seed: int, streams: Mapping[Tensor, int]):
        self._seed, self._streams = seed, streams
        self._generators: dict[Tensor, torch.Generator] = {}

    def of(self, param: Tensor) -> torch.Generator:
        """Return the generator of a parameter, which goes on where its last use left it."""
        if param not in self._generators:
            seed = (self._seed + self._streams[param] * APART) % 2**63
            self._generators[param] = torch.Generator(param.device).manual_seed(seed)
        return self._generators[param]


def stochastic_round(x: Tensor, generator: torch.Generator) -> Tensor:
    """Round float32 to bf16, up with the probability of the distance covered: the expectation is ``x`` itself."""
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    return ((x.view(torch.int32) + noise) >> 16).to(torch.int16).view(torch.bfloat16)


def load(param: Tensor, low: Tensor | None) -> Tensor:
    """Return the full-precision value of a parameter: itself where it is one already, else a float32 copy."""
    if low is not None:
        return join(param, low)
    return param.to(master_dtype(param.dtype))


def store(value: Tensor, param: Tensor, low: Tensor | None, noise: Noise | None, whole: Tensor) -> None:
    """Write a full-precision value back where ``load`` took it from.

    Args:
        value: The updated float32 copy; or ``param`` itself, which was then updated in place, and nothing is to be done.
        param: The model's parameter (or a slice of it).
        low: Its low part, where it has one.
        noise: For stochastic rounding, needed for a bf16 parameter without a low part.
        whole: The parameter itself, which the noise is drawn for.
    """
    if value.dtype == param.dtype:
        return
    if low is not None:
        high, rest = split(value)
        param.copy_(high)
        low.copy_(rest)
    else:
        assert noise is not None, "a bf16 parameter without a low part is rounded stochastically"
        param.copy_(stochastic_round(value, noise.of(whole)))
