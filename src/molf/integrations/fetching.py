"""Decisions on their way from an accelerator to the host, while nobody waits for them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from molf.routing import Routing

__all__ = ["Fetch"]


class Fetch:
    """A copy of a decision on the host, begun now. A GPU's goes into pinned memory beside the work that follows.

    Args:
        routing: The decision; the next step may overwrite it.
    """

    def __init__(self, routing: Routing):
        device = routing.scores.device
        taken = _to_host(routing.taken) if isinstance(routing.taken, Tensor) else routing.taken
        self._routing = replace(routing, scores=_to_host(routing.scores), chosen=_to_host(routing.chosen), taken=taken)
        self._copied: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._copied = torch.cuda.current_stream(device).record_event()

    @property
    def done(self) -> bool:
        """Whether it is there."""
        return self._copied is None or bool(self._copied.query())  # type: ignore[no-untyped-call]

    def get(self) -> Routing:
        """Return it, waiting if need be."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._routing


def _to_host(x: Tensor) -> Tensor:
    # Of other accelerators it is not sure that the copy can be waited for.
    return x.to("cpu", non_blocking=x.is_cuda)
