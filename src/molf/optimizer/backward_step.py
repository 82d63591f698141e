"""``optimizer_in_backward``: every layer moves inside backward, as soon as its gradients are complete, and frees them.

Autograd calls a hook when a parameter's gradient is complete. An ordinary parameter moves at once; a routed layer moves when all
its parameters have their gradients. ``step`` then moves what is left (a layer of which only a part was used, gradients set by
hand) and merges the outcomes.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from molf.errors import MolfError
from molf.layers.build import init_state_
from molf.numerics.context import StepContext
from molf.optimizer.step import step_groups
from molf.routing import Outcome, merge_outcomes
from molf.setup.checks import NO_GRADIENTS_KEPT

__all__ = ["BackwardStep", "detach_others"]

logger = logging.getLogger(__name__)


@dataclass
class _Pending:
    """The step under way: its context, the parameters whose gradients are complete, and the outcomes by unit."""

    context: StepContext
    ready: set[Tensor] = field(default_factory=set)
    outcomes: dict[int, Outcome] = field(default_factory=dict)


class _Hook:
    """The callable that autograd holds. It does nothing once the optimizer is gone."""

    def __init__(self, owner: BackwardStep, unit: int):
        self.owner, self._unit = weakref.ref(owner), unit

    def __call__(self, p: Tensor) -> None:
        owner = self.owner()
        if owner is not None:
            owner.on_grad_ready(self._unit, p)


class BackwardStep:
    """The hooks of an optimizer on its parameters, and the step under way.

    A unit is what moves at once: a routed layer, or one ordinary parameter.

    Args:
        groups: All groups of the optimizer.
        begin: Returns the context of a new step, with all groups and their state; a bound method, weakly referenced.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], begin: Callable[[], StepContext]):
        self._begin = weakref.WeakMethod(begin)
        self._pending: _Pending | None = None
        self._detached = False
        self._lock = threading.Lock()  # in backward, every device has a thread of its own
        self._units: list[tuple[int, int | None]] = []
        self._handles: list[Any] = []
        weakref.finalize(self, _remove, self._handles)
        self.follow(groups)

    def follow(self, groups: Sequence[dict[str, Any]]) -> None:
        """Put the hooks on the parameters that are in the groups now."""
        _remove(self._handles)
        self._handles.clear()
        self._units.clear()
        for i, group in enumerate(groups):
            self.register_hooks(i, group)

    def register_hooks(self, i: int, group: dict[str, Any]) -> None:
        """Register hooks on the parameters of the i-th group; what is frozen has no gradient to wait for."""
        for j, p in enumerate(group["params"]):
            if j == 0 or "module" not in group:
                self._units.append((i, None if "module" in group else j))
            if p.requires_grad:
                self._handles.append(p.register_post_accumulate_grad_hook(_Hook(self, len(self._units) - 1)))

    def on_grad_ready(self, unit: int, p: Tensor) -> None:
        """Move the unit of a parameter if this was its last missing gradient.

        Raises:
            RuntimeError: If the gradient comes for the second time since the last step.
        """
        begin = self._begin()
        if begin is None:
            return
        with self._lock, torch.no_grad():
            pending = self._pending = self._pending or _Pending(begin().with_noise())
            if p in pending.ready:
                raise RuntimeError(
                    f"{NO_GRADIENTS_KEPT}gradients cannot be accumulated, but one came twice since the last optimizer.step(): "
                    "call step() after every backward (gradient_accumulation_steps=1 and a larger batch instead), and let no "
                    "two segments of reentrant checkpointing share a weight; or use optimizer_in_backward=False"
                )
            pending.ready.add(p)
            group = self._group(pending, unit)
            if all(q in pending.ready for q in group["params"]):
                _move(pending, unit, group)

    @property
    def context(self) -> StepContext | None:
        """The context of the step under way, None if no gradient is complete yet."""
        return None if self._pending is None else self._pending.context

    def finish(self, context: StepContext, grad_scale: Tensor | None) -> Outcome:
        """Move what has not moved yet and return the outcome of the whole step.

        Args:
            context: Of this step.
            grad_scale: A GradScaler's loss scale, which is refused.

        Raises:
            MolfError: If the gradients were scaled.
            RuntimeError: If another optimizer has taken the model over, or gradients have come back.
        """
        if self._detached:
            raise RuntimeError(
                "another MoLF was built for this model since and receives its gradients: use that one, or build this one anew"
            )
        if grad_scale is not None:
            raise MolfError(
                f"{NO_GRADIENTS_KEPT}a GradScaler's loss scale cannot be divided out first: train in bf16 or float32, or use "
                "optimizer_in_backward=False"
            )
        with self._lock:
            pending = self._pending = self._pending or _Pending(context.with_noise())
            for unit in range(len(self._units)):
                group = self._group(pending, unit)
                if all(p.grad is None for p in group["params"]):
                    continue
                if unit in pending.outcomes:
                    raise RuntimeError(
                        f"{NO_GRADIENTS_KEPT}none may come back, but {_name(group)} has one after it has moved: something else "
                        "sets gradients (DDP, a second backward that failed). Call zero_grad() before step() to go on without it"
                    )
                _move(pending, unit, group)
            self._pending = None
        skipped = [unit for unit, outcome in pending.outcomes.items() if outcome.taken is False]
        if skipped:
            logger.warning(
                "Skipped %d of %d layers and other parameters, the first is %s: a gradient, or its square, is not finite. "
                "Their weights and moments are unchanged.",
                len(skipped),
                len(pending.outcomes),
                _name(self._group(pending, skipped[0])),
            )
        return merge_outcomes([pending.outcomes[unit] for unit in sorted(pending.outcomes)])

    def check_finished(self) -> None:
        """Check that no layer has moved since the last ``step``.

        Raises:
            RuntimeError: If one has: the state is then inconsistent.
        """
        if self._pending is not None:
            raise RuntimeError("the state is only consistent between steps: call step() after backward first")

    def reset(self) -> None:
        """Discard the step under way, because another state is loaded."""
        self._pending = None

    def detach(self) -> None:
        """Remove all hooks for good."""
        _remove(self._handles)
        self._detached = True

    def _group(self, pending: _Pending, unit: int) -> dict[str, Any]:
        """Return a unit as a group: a routed one, or an ordinary one with a single parameter."""
        i, j = self._units[unit]
        group = pending.context.groups[i]
        return group if j is None else {**group, "params": [group["params"][j]]}


def _move(pending: _Pending, unit: int, group: dict[str, Any]) -> None:
    context = pending.context
    init_state_([group], context)
    pending.outcomes[unit] = step_groups([group], context, unit)
    for p in group["params"]:
        p.grad = None


def detach_others(groups: Sequence[dict[str, Any]], own: BackwardStep | None) -> None:
    """Remove the hooks of optimizers that were built for these parameters before: only one may move them."""
    for p in (p for group in groups for p in group["params"]):
        for hook in list((p._post_accumulate_grad_hooks or {}).values()):
            other = hook.owner() if isinstance(hook, _Hook) else None
            if other is not None and other is not own:
                other.detach()


def _name(group: dict[str, Any]) -> str:
    return str(group.get("module", "an ordinary parameter"))


def _remove(handles: Iterable[Any]) -> None:
    for handle in handles:
        handle.remove()
