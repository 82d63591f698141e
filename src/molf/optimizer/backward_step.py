"""Gradient release: every layer is routed, moved and rid of its gradients inside backward, as soon as they are all there.

Autograd calls a hook when it has left the whole gradient of a parameter. Parameters that are not routed move at once; a routed
layer moves when the gradients of all its parameters have come. ``step`` takes what has not moved by then (a layer of which
only a part was used, gradients set by hand) and puts the decisions of all layers together.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from molf.layers.build import init_group
from molf.numerics.bf16 import Noise
from molf.numerics.distributed import Ranks
from molf.optimizer.step import noise_of, take
from molf.routing import Outcome, joined
from molf.setup.checks import RELEASED, check_release

if TYPE_CHECKING:
    from molf.optimizer import MoLF

__all__ = ["Release", "retire_others"]

logger = logging.getLogger(__name__)


@dataclass
class _Step:
    """What has happened since the last ``step``: whose gradients have come, and what became of what has moved, by number."""

    ranks: Ranks
    fused: bool
    noise: Noise | None
    arrived: set[Tensor] = field(default_factory=set)
    outcomes: dict[int, Outcome] = field(default_factory=dict)


class _Hook:
    """What autograd calls; it keeps neither optimizer nor model alive, and does nothing once they are gone."""

    def __init__(self, release: Release, number: int):
        self.release, self._number = weakref.ref(release), number

    def __call__(self, p: Tensor) -> None:
        release = self.release()
        if release is not None:
            release.arrive(self._number, p)


class Release:
    """The hooks of an optimizer on its parameters, and the step that is under way.

    Args:
        optimizer: With all its groups; it is not kept alive.
        model: What it was made for, where that is known.

    Raises:
        ValueError: If its settings can't be had together with gradient release; the reason is given.
    """

    def __init__(self, optimizer: MoLF, model: nn.Module | None):
        self._optimizer = weakref.ref(optimizer)
        self._step: _Step | None = None
        self._retired = False
        self._lock = threading.Lock()  # each device has a thread of its own in backward
        self._parts: list[tuple[int, int | None]] = []
        self._handles: list[Any] = []
        check_release(optimizer.max_grad_norm, optimizer.ranks(), model)
        for i in range(len(optimizer.param_groups)):
            self.watch(i)
        weakref.finalize(self, _remove, self._handles)

    def watch(self, i: int) -> None:
        """Put hooks on the parameters of the i-th group."""
        group = self._owner.param_groups[i]
        for j, p in enumerate(group["params"]):
            if j == 0 or "module" not in group:  # a routed layer is one part, ordinary parameters are one each
                self._parts.append((i, None if "module" in group else j))
            self._handles.append(p.register_post_accumulate_grad_hook(_Hook(self, len(self._parts) - 1)))

    @property
    def _owner(self) -> MoLF:
        optimizer = self._optimizer()
        assert optimizer is not None, "the optimizer holds this object, and hooks look first"
        return optimizer

    def arrive(self, number: int, p: Tensor) -> None:
        """Take the gradient of a parameter, which belongs to that part of the optimizer, as it comes.

        Raises:
            RuntimeError: If it comes for the second time since the last step.
        """
        if self._optimizer() is None:
            return
        with self._lock, torch.no_grad():
            step = self._begun()
            if p in step.arrived:
                raise RuntimeError(
                    f"{RELEASED}gradients can't be accumulated, but one has come twice since the last optimizer.step(): call "
                    "step() after every backward (gradient_accumulation_steps=1, a larger batch instead), and let no two "
                    "segments of reentrant checkpointing share a weight; or use optimizer_in_backward=False"
                )
            step.arrived.add(p)
            group = self._group(number)
            if all(q in step.arrived for q in group["params"]):
                self._move(step, number, group)

    def close(self, ranks: Ranks) -> Outcome:
        """Take what has not moved yet, and return what the step did as a whole.

        Raises:
            RuntimeError: If another optimizer has taken the model over, or gradients have come back.
            ValueError: If the gradients were scaled.
        """
        if self._retired:
            raise RuntimeError(
                "another MoLF was made for this model since, and gets its gradients: use that one, or make this one anew"
            )
        if getattr(self._owner, "grad_scale", None) is not None:
            raise ValueError(
                f"{RELEASED}a GradScaler's loss scale can't be divided out first: train in bf16 or float32, or use "
                "optimizer_in_backward=False"
            )
        with self._lock:
            step = self._begun(ranks)
            for number in range(len(self._parts)):
                group = self._group(number)
                if all(p.grad is None for p in group["params"]):
                    continue
                if number in step.outcomes:
                    raise RuntimeError(
                        f"{RELEASED}none may come back, but {_name(group)} has one after it has moved: something else sets "
                        "gradients (DDP, a second backward that failed). Call zero_grad() before step() to go on without it"
                    )
                self._move(step, number, group)
            self._step = None
        if left_out := [number for number, outcome in step.outcomes.items() if outcome.taken is False]:
            logger.warning(
                "%d of %d layers and other parameters left out of a step, %s first: a gradient is not finite. Their weights and "
                "moments are unchanged.",
                len(left_out),
                len(step.outcomes),
                _name(self._group(left_out[0])),
            )
        return joined([step.outcomes[number] for number in sorted(step.outcomes)])

    def refuse_unfinished(self) -> None:
        """Refuse to look at the state while layers have moved that ``step`` does not know of.

        Raises:
            RuntimeError: Saying what to do.
        """
        if self._step is not None:
            raise RuntimeError("the state can be taken between steps only: call step() after backward first")

    def forget(self) -> None:
        """Forget the step that was under way: another state is loaded."""
        self._step = None

    def retire(self) -> None:
        """Remove all hooks for good."""
        _remove(self._handles)
        self._retired = True

    def _begun(self, ranks: Ranks | None = None) -> _Step:
        """Return the step under way; the first gradient begins it."""
        if self._step is None:
            optimizer = self._owner
            check_release(optimizer.max_grad_norm, ranks or optimizer.ranks())
            ranks = ranks or optimizer.begin()
            fused = optimizer.choose(ranks)
            self._step = _Step(ranks, fused, None if fused else noise_of(optimizer, ranks))
        return self._step

    def _group(self, number: int) -> dict[str, Any]:
        """Return a part as a group: a routed one, or an ordinary one with a single parameter."""
        i, j = self._parts[number]
        group = self._owner.param_groups[i]
        return group if j is None else {**group, "params": [group["params"][j]]}

    def _move(self, step: _Step, number: int, group: dict[str, Any]) -> None:
        optimizer = self._owner
        init_group(group, optimizer.state, optimizer.bf16_update == "split", optimizer.optim_bits)
        step.outcomes[number] = take(optimizer, [group], step.ranks, step.fused, step.noise, number)
        for p in group["params"]:
            p.grad = None


def retire_others(groups: Sequence[dict[str, Any]], own: Release | None) -> None:
    """Remove the hooks of optimizers that were made for these parameters before: there is one that moves them."""
    for p in (p for group in groups for p in group["params"]):
        for hook in list((p._post_accumulate_grad_hooks or {}).values()):
            other = hook.release() if isinstance(hook, _Hook) else None
            if other is not None and other is not own:
                other.retire()


def _name(group: dict[str, Any]) -> str:
    return str(group.get("module", "an ordinary parameter"))


def _remove(handles: Iterable[Any]) -> None:
    for handle in handles:
        handle.remove()
