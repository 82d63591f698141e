"""The decision: which experts of each layer win a step.

Letters: M routed modules, E experts; ``scores [M, E]``, ``chosen [M, E]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from molf.errors import MolfError

__all__ = ["Outcome", "Routing", "choose", "merge_outcomes"]


def choose(scores: Tensor, top_k: int) -> Tensor:
    """Mark the ``top_k`` best experts of every module; ties go to the earlier expert, and a NaN score loses.

    Args:
        scores: ``[M, E]``, higher is better.
        top_k: Number of winners per module, 1 <= top_k <= E.

    Returns:
        Boolean ``[M, E]`` with exactly ``top_k`` true entries a row.
    """
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, _order(scores)[:, :top_k], True)


def _order(scores: Tensor) -> Tensor:
    """Return the experts of every module, best first."""
    return scores.nan_to_num(nan=-torch.inf).argsort(dim=1, descending=True, stable=True)


@dataclass(frozen=True)
class Routing:
    """The decision of one optimizer step.

    Attributes:
        modules: Names of the M modules that were routed at this step (those that had a gradient).
        experts: Names of the E experts in column order: ``fft``, then ``lora_r{rank}`` as given.
        scores: ``[M, E]`` float64, on the CPU or, after a fused step, on the model's device.
        chosen: ``[M, E]`` bool on the same device, true for winners. A module that was skipped alone has none.
        taken: False, or a false 0-dim tensor, if a fused step was skipped because a gradient was not finite.
    """

    modules: tuple[str, ...]
    experts: tuple[str, ...]
    scores: Tensor
    chosen: Tensor
    taken: bool | Tensor = True

    def winners(self) -> dict[str, list[str]]:
        """Return each module's winning experts, best score first."""
        order, chosen = _order(self.scores).tolist(), self.chosen.tolist()
        return {module: [self.experts[e] for e in order[i] if chosen[i][e]] for i, module in enumerate(self.modules)}

    def share(self, expert: str) -> float:
        """Return the share of this step's wins that went to ``expert``, in [0, 1].

        Raises:
            MolfError: If no expert has that name.
        """
        if expert not in self.experts:
            raise MolfError(f"no expert {expert!r} here: the experts are {list(self.experts)}")
        return float(self.chosen[:, self.experts.index(expert)].sum() / self.chosen.sum())


@dataclass(frozen=True)
class Outcome:
    """What a step did. After a fused step all tensors are on the model's device.

    Attributes:
        routing: The decision; None if no layer had a gradient or the step was skipped.
        norm: Gradient norm before clipping, 0-dim; includes LoRA gradients if they are clipped.
        taken: False, or a false 0-dim tensor, if the step was skipped because a gradient was not finite.
    """

    routing: Routing | None
    norm: Tensor
    taken: bool | Tensor


def merge_outcomes(outcomes: Sequence[Outcome]) -> Outcome:
    """Merge the outcomes of units that moved one by one into one; it counts as taken if all of them were."""
    if not outcomes:
        return Outcome(None, torch.zeros((), dtype=torch.float32), taken=True)
    norms = torch.stack([outcome.norm.to(outcomes[0].norm.device, torch.float64) for outcome in outcomes])
    norm: Tensor = torch.linalg.vector_norm(norms)
    routings = [outcome.routing for outcome in outcomes if outcome.routing is not None]
    taken = _reduce([outcome.taken for outcome in outcomes], every=True)
    return Outcome(_concat_routings(routings) if routings else None, norm, taken)


def _concat_routings(routings: Sequence[Routing]) -> Routing:
    # Some units may have decided on the host, others on a device. Collect on the device, so that nothing syncs.
    device = max((routing.scores.device for routing in routings), key=lambda device: device.type != "cpu")
    return Routing(
        tuple(module for routing in routings for module in routing.modules),
        routings[0].experts,
        torch.cat([routing.scores.to(device) for routing in routings]),
        torch.cat([(routing.chosen & routing.taken).to(device) for routing in routings]),
        _reduce([routing.taken for routing in routings], every=False),
    )


def _reduce(taken: Sequence[bool | Tensor], every: bool) -> bool | Tensor:
    """Return whether every (or any) value is true: a tensor only if the host's values do not settle it."""
    on_device = [x for x in taken if isinstance(x, Tensor)]
    on_host = [x for x in taken if not isinstance(x, Tensor)]
    settled = all(on_host) if every else any(on_host)
    if not on_device or settled is not every:
        return settled
    values = torch.stack(on_device)
    return values.all() if every else values.any()
