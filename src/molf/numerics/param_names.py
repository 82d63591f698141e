"""The names of an optimizer's parameters in its model, and what has become of them since."""

from __future__ import annotations

import itertools
import logging
import weakref
from collections.abc import Sequence
from typing import Any

from torch import nn

from molf.numerics.distributed import is_sharded

__all__ = ["ParamNames"]

logger = logging.getLogger(__name__)

# Names in a message.
_SHOWN = 5


class ParamNames:
    """Names of an optimizer's parameters, to find their replacements after ``fully_shard`` and to notice other changes.

    ``fully_shard`` puts new parameters into the model. An optimizer that was built before has to look them up.

    Args:
        model: The model; only weakly referenced.
        groups: The groups of its parameters.
    """

    def __init__(self, model: nn.Module, groups: Sequence[dict[str, Any]]):
        names = {id(p): name for name, p in model.named_parameters()}
        self._model = weakref.ref(model)
        self._names = [[names[id(p)] for p in group["params"]] for group in groups]
        self._untrained: set[int] = set()
        self._lost = 0

    def of(self, i: int, j: int) -> str | None:
        """Return the name of the j-th parameter of the i-th group; None if it was added later."""
        known = i < len(self._names) and j < len(self._names[i])
        return self._names[i][j] if known else None

    def refresh(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Put the model's current parameters into the groups, unless the old ones have gradients or other shapes.

        Returns:
            Whether there are new ones.
        """
        model = self._model()
        if model is None or any(p.grad is not None for group in groups for p in group["params"]):
            return False
        try:
            now = [[model.get_parameter(name) for name in names] for names in self._names]
        except AttributeError:  # the model was wrapped since, which changed its names
            return False
        before = (p for group in groups for p in group["params"])
        new = [(p, q) for p, q in zip(before, itertools.chain.from_iterable(now), strict=False) if p is not q]
        held = set(map(id, itertools.chain.from_iterable(now)))
        if not new or any(p.shape != q.shape or id(p) in held for p, q in new):
            return False  # other layers, not shards of the same, or groups that were removed or reordered
        for group, params in zip(groups, now, strict=False):  # groups that were added later have no names
            group["params"] = params
        return True

    def warn_of_changes(self, groups: Sequence[dict[str, Any]]) -> None:
        """Warn, once for each, of parameters with gradients that don't move, and of those that have left the model.

        What has a gradient doesn't move if it is in no group, or is the bias of a weight without one, by which all is routed.

        The walk over all modules takes less than a percent of a step, even with thousands of small layers.

        Args:
            groups: The optimizer's groups, before the step uses up their gradients.
        """
        model = self._model()
        if model is None:
            return
        own = set(map(id, itertools.chain.from_iterable(group["params"] for group in groups)))
        found, untrained = _look_through(model, own)
        beside = _beside_a_frozen_weight(groups)
        untrained |= beside
        new, lost = untrained - self._untrained, len(own) - len(found)
        if not new and lost <= self._lost:
            return
        names = {id(p): name for name, p in model.named_parameters() if id(p) in new}
        changes = {
            "with a gradient, but in no group": [name for key, name in names.items() if key not in beside],
            "with a gradient, but beside a routed weight without": [n for key, n in names.items() if key in beside],
        }
        if lost > self._lost:
            changes["in a group, but no longer in the model"] = self._gone(groups, found)
        self._untrained |= new
        self._lost = max(self._lost, lost)
        if any(changes.values()):
            logger.warning(
                "The model has changed since this optimizer was made, which does not follow: %s. Unfreeze parameters and replace "
                "layers first, or make a new optimizer, MoLF(model, ...)",
                "; ".join(f"{what}: {_listed(names)}" for what, names in changes.items() if names),
            )

    def _gone(self, groups: Sequence[dict[str, Any]], found: set[int]) -> list[str]:
        """Return names of parameters that the model does not hold; FSDP may hold whole ones in place of their shards."""
        named = zip((n for names in self._names for n in names), (p for g in groups for p in g["params"]), strict=False)
        return [name for name, p in named if id(p) not in found and not is_sharded(p)]


def _beside_a_frozen_weight(groups: Sequence[dict[str, Any]]) -> set[int]:
    """Return ids of the biases that have a gradient while the weight that they are routed with has none."""
    found = set()
    for group in groups:
        if "form" in group and group["form"] in ("merged", "stacked") and group["params"][0].grad is None:
            found.update([id(p) for p in group["params"][1:] if p.grad is not None])
    return found


def _look_through(model: nn.Module, own: set[int]) -> tuple[set[int], set[int]]:
    """Return ids of the model's parameters: those in ``own``, and the others that train and have gradients."""
    found, others = set(), set()
    seen: set[nn.Module] = set()
    left: list[nn.Module | None] = [model]
    while left:
        module = left.pop()
        if module is None or module in seen:
            continue
        seen.add(module)
        for p in module._parameters.values():
            if id(p) in own:
                found.add(id(p))
            elif p is not None and p.requires_grad and p.grad is not None:
                others.add(id(p))
        left.extend(module._modules.values())
    return found, others


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f", ... ({len(names)})" if len(names) > _SHOWN else "")
