"""An optimizer that was made before its model was sharded: ``fully_shard`` puts new parameters into the model."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

__all__ = ["Names", "refuse_orphans"]


class Names:
    """The names of the parameters in an optimizer's groups, by which they are found again in the model.

    Args:
        model: The model; it is not kept alive.
        groups: The groups of its parameters.
    """

    def __init__(self, model: nn.Module, groups: Sequence[dict[str, Any]]):
        names = {id(p): name for name, p in model.named_parameters()}
        self._model = weakref.ref(model)
        self._names = [[names[id(p)] for p in group["params"]] for group in groups]

    def follow(self, groups: Sequence[dict[str, Any]]) -> None:
        """Put the parameters that the model has now into the groups, if backward left no gradient on those that are there."""
        model = self._model()
        if model is None or any(p.grad is not None for group in groups for p in group["params"]):
            return
        try:
            now = [[model.get_parameter(name) for name in names] for names in self._names]
        except AttributeError:  # wrapped since, so that names have changed
            return
        for group, params in zip(groups, now, strict=False):  # a group that was added later has no names
            group["params"] = params


def refuse_orphans(groups: Sequence[dict[str, Any]], state: dict[Tensor, Any]) -> None:
    """Refuse state of parameters that are in no group any more: it was made before the model was sharded.

    Raises:
        RuntimeError: Saying what to do.
    """
    if state.keys() - {p for group in groups for p in group["params"]}:
        raise RuntimeError(
            "the model was sharded after this optimizer had state, which can't follow its parameters: shard first, then load the "
            "state, assign experts and take steps"
        )
