"""One matrix of a stack, as the user's views see it: two-dimensional, and whole on every rank."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from torch import Tensor

from molf.layers.base import LoraPair
from molf.layers.merged import apply_lora_delta_, base_weight
from molf.layers.stacked import StackedLayer
from molf.numerics.bf16 import Noise, load
from molf.numerics.distributed import full

__all__ = ["StackedMatrix"]


class StackedMatrix:
    """The i-th matrix of a stack. If the stack is sharded, every rank has to read, and to set, the same.

    Args:
        group: The stack's parameter group.
        state: The optimizer's state; ``init_state`` made the stack's entries.
        noise: For stochastic rounding, None if low parts are kept.
        i: Which matrix.
    """

    def __init__(self, group: dict[str, Any], state: MutableMapping[Any, dict[str, Any]], noise: Noise | None, i: int):
        self._layer, self._state, self._i = StackedLayer(group, state, noise, range(i, i + 1)), state, i
        self.experts = self._layer.experts

    @property
    def base(self) -> list[Tensor]:
        """The weight ``[out, in]``, and the bias ``[out]`` if one trains."""
        weight, *bias = (full(p.detach())[self._i] for p in self._layer.base)
        return [self._layer.oriented(weight), *bias]

    @property
    def pairs(self) -> list[LoraPair]:
        """The matrix's pairs, live unless the stack is sharded."""
        return [pair._replace(A=full(pair.A)[self._i], B=full(pair.B)[self._i]) for pair in self._layer.pairs]

    def base_weight(self) -> Tensor:
        """Return ``W = W_eff - sum_i s_i B_i A_i``, a new tensor."""
        return base_weight(self._effective(), self.pairs)

    def set_base_weight(self, value: Tensor) -> None:
        """Set ``W``; the effective weight follows."""
        effective = self._effective()
        self._set(0, effective + (value - base_weight(effective, self.pairs)))

    def set_bias(self, value: Tensor) -> None:
        """Set the bias."""
        self._set(1, value)

    def set_pair(self, i: int, A: Tensor | None, B: Tensor | None) -> None:  # noqa: N803 - the paper's letters
        """Set a pair; the effective weight follows and ``W`` stays."""
        effective, pair = self._effective().clone(), self.pairs[i]
        before = pair._replace(A=pair.A.clone(), B=pair.B.clone())
        A, B = pair.A if A is None else A, pair.B if B is None else B
        self._layer.set_pair_rows(i, A, B)
        apply_lora_delta_(effective, before, pair._replace(A=A, B=B))
        self._set(0, effective)

    def _effective(self) -> Tensor:
        p = self._layer.base[0]
        low = self._state[p].get("low")
        weight = load(full(p.detach())[self._i], None if low is None else full(low)[self._i])
        return self._layer.oriented(weight)

    def _set(self, k: int, value: Tensor) -> None:
        """Set the k-th parameter's matrix where it is held."""
        p = self._layer.base[k]
        rows = self._layer.load_rows(p)
        for row in rows:
            row.copy_(self._layer.oriented(value) if k == 0 else value)
        self._layer.store_rows(p, rows)
