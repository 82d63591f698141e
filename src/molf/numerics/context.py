"""Everything one optimizer step needs to know, as one value that is handed down from ``MoLF.step``."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from molf.numerics.bf16 import Noise
from molf.numerics.distributed import Ranks, is_sharded
from molf.numerics.param_names import ParamNames
from molf.scores import Score

__all__ = ["StepContext"]


@dataclass(frozen=True)
class StepContext:
    """One step: the optimizer's settings, its groups and state, and what holds for this step alone.

    Attributes:
        groups: All parameter groups of the optimizer.
        state: The optimizer's state by parameter.
        ranks: The ranks that train the model together.
        score: Scores the experts of a layer.
        top_k: How many experts of a layer move.
        max_grad_norm: Clip the norm of all experts' gradients to this; None for no clipping.
        stochastic: Whether bf16 weights are rounded stochastically, and not kept with their low part.
        optim_bits: Bits of the moments of large matrices, 32 or 8.
        fused: Whether MoLF's Triton kernels take the step.
        fused_required: Whether the user insists on them (``fused=True``).
        fused_steps: The kernels' cached tables by unit, kept from step to step.
        grad_scale: A GradScaler's loss scale to divide gradients by, or None.
        found_inf: Nonzero if the GradScaler found a non-finite gradient, or None.
        noise: For stochastic rounding by PyTorch's kernels, else None.
        names: Of the parameters in the model, if that is known.
    """

    groups: Sequence[dict[str, Any]]
    state: MutableMapping[Any, dict[str, Any]]
    ranks: Ranks
    score: Score
    top_k: int = 1
    max_grad_norm: float | None = None
    stochastic: bool = False
    optim_bits: int = 32
    fused: bool = False
    fused_required: bool = False
    fused_steps: dict[int, Any] = field(default_factory=dict)
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    noise: Noise | None = None
    names: ParamNames | None = None

    def name_of(self, p: Tensor) -> str:
        """Return the name of a parameter in the model, or where it is in the groups."""
        where = ((i, j) for i, group in enumerate(self.groups) for j, q in enumerate(group["params"]) if q is p)
        i, j = next(where)
        known = None if self.names is None else self.names.of(i, j)
        return known or f"parameter {j} of {self.groups[i].get('module', f'group {i}')}"

    @property
    def seed(self) -> int:
        """The seed of the first routed layer, equal at every step and on every rank."""
        return int(next(group["lora_seed"] for group in self.groups if "module" in group))

    def with_noise(self) -> StepContext:
        """Return this context with the noise that PyTorch's kernels need. Call it before any layer counts the step."""
        return self if self.fused else replace(self, noise=self._make_noise())

    def without_fused(self) -> StepContext:
        """Return this context for a step by PyTorch's kernels."""
        return replace(self, fused=False).with_noise()

    def _make_noise(self) -> Noise | None:
        if not self.stochastic:
            return None
        # Of all, because any of them may rest: the sum is new whenever something has moved.
        step = sum(int(entries.get("step", 0)) for entries in self.state.values())
        params = [p for group in self.groups for p in group["params"]]
        # Replicated parameters are rounded alike on all ranks; every shard has a stream of its own.
        offset = (self.ranks.shard_index + 1) * len(params)
        streams = {p: i + offset * is_sharded(p) for i, p in enumerate(params)}
        return Noise((self.seed * 1_000_003 + step) % 2**63, streams)
