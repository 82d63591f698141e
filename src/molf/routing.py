"""The decision: which experts of each layer win the step.

Letters: M routed modules, E experts; ``scores [M, E]``, ``chosen [M, E]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Outcome", "Routing", "choose", "joined"]


def choose(scores: Tensor, top_k: int) -> Tensor:
    """Mark the ``top_k`` best experts of every module; ties go to the earlier expert, and a NaN score loses.

    Args:
        scores: ``[M, E]``, higher is better.
        top_k: Number of winners per module, 1 <= top_k <= E.

    Returns:
        Boolean ``[M, E]`` with exactly ``top_k`` true entries a row.
    """
    order = scores.nan_to_num(nan=-torch.inf).argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order[:, :top_k], True)


@dataclass(frozen=True)
class Routing:
    """What one optimizer step decided.

    Attributes:
        modules: Names of the M modules that were routed at this step (those that had a gradient).
        experts: Names of the E experts, in the order of the columns: ``fft``, then ``lora_r{rank}`` as given.
        scores: ``[M, E]`` float64; on the CPU, or after a fused step on the model's device.
        chosen: ``[M, E]`` bool beside it, true for the winners; of a module that was left out alone there is none.
        taken: False, or a false 0-dim tensor, if a fused step was left out because a gradient was not finite.
    """

    modules: tuple[str, ...]
    experts: tuple[str, ...]
    scores: Tensor
    chosen: Tensor
    taken: bool | Tensor = True

    def winners(self) -> dict[str, list[str]]:
        """Return each module's winning experts, best score first."""
        order = self.scores.argsort(dim=1, descending=True, stable=True).tolist()
        chosen = self.chosen.tolist()
        return {module: [self.experts[e] for e in order[i] if chosen[i][e]] for i, module in enumerate(self.modules)}

    def share(self, expert: str) -> float:
        """Return the share of all wins of this step that went to ``expert``, in [0, 1]."""
        if expert not in self.experts:
            raise ValueError(f"no expert {expert!r} here: the experts are {list(self.experts)}")
        return float(self.chosen[:, self.experts.index(expert)].sum() / self.chosen.sum())


@dataclass(frozen=True)
class Outcome:
    """What a step did. After a fused step everything is on the model's device.

    Attributes:
        routing: The decision; None if no layer was routed, because none had a gradient or the step was left out.
        norm: Of the gradients before clipping, 0-dim; those of LoRA pairs included if they are clipped.
        taken: False, or a false 0-dim tensor, if the step was left out because a gradient was not finite.
    """

    routing: Routing | None
    norm: Tensor
    taken: bool | Tensor


def joined(outcomes: Sequence[Outcome]) -> Outcome:
    """Put together what became of parts of a step that were taken one by one; the step is taken if all of them are."""
    if not outcomes:
        return Outcome(None, torch.zeros(()), taken=True)
    norms = torch.stack([outcome.norm.to(outcomes[0].norm.device, torch.float64) for outcome in outcomes])
    norm: Tensor = torch.linalg.vector_norm(norms)
    routings = [outcome.routing for outcome in outcomes if outcome.routing is not None]
    return Outcome(_joined(routings) if routings else None, norm, _all([outcome.taken for outcome in outcomes]))


def _joined(routings: Sequence[Routing]) -> Routing:
    # Some parts may have been decided on the host and others on a device, where the result is then: nobody waits for it.
    device = max((routing.scores.device for routing in routings), key=lambda device: device.type != "cpu")
    return Routing(
        tuple(module for routing in routings for module in routing.modules),
        routings[0].experts,
        torch.cat([routing.scores.to(device) for routing in routings]),
        torch.cat([(routing.chosen & routing.taken).to(device) for routing in routings]),
        _any([routing.taken for routing in routings]),
    )


def _any(taken: Sequence[bool | Tensor]) -> bool | Tensor:
    on_device = [x for x in taken if isinstance(x, Tensor)]
    on_host = any(x for x in taken if not isinstance(x, Tensor))
    return torch.stack(on_device).any() if on_device and not on_host else on_host


def _all(taken: Sequence[bool | Tensor]) -> bool | Tensor:
    on_device = [x for x in taken if isinstance(x, Tensor)]
    on_host = all(x for x in taken if not isinstance(x, Tensor))
    return torch.stack(on_device).all() if on_device and on_host else on_host
