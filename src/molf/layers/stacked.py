"""Stacked matrices: those of a mixture's experts in one parameter, each of them routed on its own.

A mixture of experts keeps the matrices of its n experts in one parameter ``[n, out, in]``, or ``[n, in, out]`` (transposed).
Every matrix is what a merged layer is (``molf.layers.merged``), with pairs, moments, scores and a decision of its own. Their
tensors are stacks too, ``A [n, r, in]`` and ``B [n, out, r]``, and products are batched, so no work is done matrix by matrix.

A matrix that no token reached has a gradient of zero at this step. Its moments decay, as AdamW's would, and the winner by these
moments moves on. One that was never reached has only zero moments and equal scores: ``fft`` wins, whose step is then its decay.

Under FSDP2 everything is sharded by matrices, A too, so all gradients are local.
"""

from __future__ import annotations

import functools
import math
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from molf.layers.base import RoutedLayer
from molf.layers.pairs_in_state import PairsInState
from molf.numerics.adamw import Rates, TensorState
from molf.numerics.bf16 import Noise, load, store
from molf.numerics.distributed import first_row, is_sharded, local
from molf.numerics.tf32 import tf32_products

__all__ = ["StackedLayer", "matrix_names"]


@functools.lru_cache(maxsize=1024)
def matrix_names(name: str, n: int) -> tuple[str, ...]:
    """Return the names of the n matrices of a stack: ``experts.down_proj[0]`` and so on."""
    return tuple(f"{name}[{i}]" for i in range(n))


@dataclass
class _Rows:
    """Some matrices of a stacked tensor, gathered for an update and put back after it."""

    whole: TensorState
    index: Tensor
    taken: TensorState

    @classmethod
    def of(cls, whole: TensorState, index: Tensor) -> _Rows:
        if len(index) == whole.stacked:
            return cls(whole, index, whole)
        taken = whole.map(lambda x: x.index_select(0, index))
        return cls(whole, index, taken._replace(stacked=len(index)))

    def put_back(self) -> None:
        if self.taken is self.whole:
            return
        changed = ("param", "exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax")
        for key in changed if self.whole.is_quantized else changed[:1]:
            getattr(self.whole, key).index_copy_(0, self.index, getattr(self.taken, key))


class StackedLayer(PairsInState):
    """The matrices of one stacked parameter, or some of them.

    The pairs are stacks, too: ``lora_r8.A [n, r, in]``, ``lora_r8.B [n, out, r]``. The bias is ``[n, out]``.

    Args:
        group: The stack's parameter group.
        state: The optimizer's state; ``init_state`` made the stack's entries.
        noise: For stochastic rounding, None if low parts are kept.
        rows: Which matrices, of all ranks; None for all.
    """

    def __init__(
        self,
        group: dict[str, Any],
        state: MutableMapping[Any, dict[str, Any]],
        noise: Noise | None,
        rows: range | None = None,
    ):
        super().__init__(group, state, noise)
        weight = group["params"][0]
        n = weight.shape[0]
        self.rows = range(n) if rows is None else rows
        self.numel = self.numel // n * len(self.rows)
        self._transposed: bool = group["transposed"]
        first = first_row(weight)
        start = max(self.rows.start, first)
        stop = max(start, min(self.rows.stop, first + len(local(weight))))
        self._held = slice(start - first, stop - first)  # of this rank's shard
        self._place = slice(start - self.rows.start, stop - self.rows.start)  # among ``rows``

    @property
    def modules(self) -> tuple[str, ...]:
        """The names of the matrices."""
        return matrix_names(self.name, len(self.base[0]))[self.rows.start : self.rows.stop]

    def parts(self, budget: int) -> Sequence[RoutedLayer]:
        """Return the stack in parts of at most ``budget`` elements, or of one matrix; gradients that exist are shared out."""
        size = max(1, budget // max(1, self.numel // len(self.rows)))
        if size >= len(self.rows):
            return [self]
        cuts = range(self.rows.start, self.rows.stop, size)
        rows = [range(first, min(first + size, self.rows.stop)) for first in cuts]
        parts = [StackedLayer(self.group, self._state, self._noise, own) for own in rows]
        for part in parts:
            own = slice(part._held.start - self._held.start, part._held.stop - self._held.start)
            for i, tensors in self._tensors.items():
                part._tensors[i] = [_cut(x, own) for x in tensors]
        return parts

    def numel_of(self, tensors: Sequence[TensorState]) -> int:
        """Return the number of elements of an expert of one matrix."""
        return sum(math.prod(x.param.shape[1:]) for x in tensors)

    def is_sharded(self, tensor: TensorState) -> bool:
        """Return whether the stack is sharded; then all its tensors are."""
        return is_sharded(self.base[0])

    def sums_of_all(self, sums: Tensor) -> Tensor:
        """Return this rank's sums among zeros for the matrices of other ranks."""
        if len(sums) == len(self.rows):
            return sums
        every = sums.new_zeros(len(self.rows), sums.shape[1])
        every[self._place] = sums
        return every

    def _expert_tensors(self, i: int) -> list[TensorState]:
        if i == 0:
            return [_cut(self._tensor(p).local, self._held) for p in self.base if p.grad is not None]
        A, B = (_cut(self.pair_tensor(i, key).local, self._held) for key in "AB")
        pair, grad = self.pairs[i - 1], local(self.gradients()[0])[self._held].to(A.param.dtype)
        grad = self.oriented(grad)
        dA = torch.zeros_like(A.param)
        dB = torch.empty_like(B.param)
        with tf32_products(grad.device):
            if pair.b_is_nonzero:
                dA.baddbmm_(B.param.mT, grad, beta=0, alpha=pair.scale)
            dB.baddbmm_(grad, A.param.mT, beta=0, alpha=pair.scale)
        return [A._replace(grad=dA), B._replace(grad=dB)]

    def begin_update(self, chosen: Tensor) -> list[tuple[Rates, TensorState]]:
        """Gather what the winners move, and decay ``W`` inside the effective weights where ``fft`` won."""
        self._chosen, own = chosen, chosen[self._place]
        self._winners = [own[:, i].nonzero().view(-1).to(self.base[0].device) for i in range(len(self.experts))]
        self._values = [self.load_rows(p) for p in self.base]
        self._gathered: list[_Rows] = []
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        work = [*self._begin_fft(self._winners[0])] if len(self._winners[0]) else []
        for i, index in enumerate(self._winners[1:], start=1):
            if len(index):
                A, B = self.tensors(i)
                self._before[i] = (A.param.index_select(0, index), B.param.index_select(0, index))
                work += [(self._rates(i), self._gather(x, index)) for x in (A, B)]
        return work

    def _begin_fft(self, index: Tensor) -> list[tuple[Rates, TensorState]]:
        weight, *bias = self._base_tensors()
        taken = self._gather(weight, index)
        rates = self._rates(0)
        undecayed = self._rates(0, decayed=False)
        if decay := rates.lr * rates.weight_decay:
            taken.param.mul_(1 - decay)
            for i, pair in enumerate(self.pairs, start=1):
                if pair.b_is_nonzero:
                    A, B = (x.param.index_select(0, index) for x in self.tensors(i))
                    self._add_product_(taken.param, B, A, decay * pair.scale)
        return [(undecayed, taken), *((undecayed, self._gather(x, index)) for x in bias)]

    def quantized_losers(self, chosen: Tensor) -> list[TensorState]:
        """Return the 8-bit tensors of the matrices whose ``fft`` expert lost, gathered."""
        index = (~chosen[self._place][:, 0]).nonzero().view(-1).to(self.base[0].device)
        quantized = [x for x in self._base_tensors() if x.is_quantized] if len(index) else []
        return [self._gather(x, index) for x in quantized]

    def finish_update(self) -> None:
        """Put back what moved, add the pairs' changes to the effective weights, and write these into the model."""
        for rows in self._gathered:
            rows.put_back()
        for i, before in self._before.items():
            self._add_pair_change_(i, before)
        for i, won in enumerate(self._chosen.sum(0).tolist()[1:], start=1):
            self._count_updates(i, won)  # of all ranks, so that they agree
        for p, value in zip(self.base, self._values, strict=True):
            self.store_rows(p, value)
        del self._chosen, self._winners, self._values, self._gathered, self._before

    def _add_pair_change_(self, i: int, before: tuple[Tensor, Tensor]) -> None:
        """Add ``s (B dA + dB A')`` of the i-th expert's winners to their effective weights."""
        index, pair, every = self._winners[i], self.pairs[i - 1], self._values[0]
        A, B = (x.param.index_select(0, index) for x in self.tensors(i))
        effective = every if len(index) == len(every) else every.index_select(0, index)
        if pair.b_is_nonzero:
            self._add_product_(effective, before[1], A - before[0], pair.scale)
        self._add_product_(effective, B - before[1], A, pair.scale)
        if effective is not every:
            every.index_copy_(0, index, effective)

    def _add_product_(self, weight: Tensor, B: Tensor, A: Tensor, alpha: float) -> None:  # noqa: N803 - the paper's letters
        """Add ``alpha B A`` to weights as they are stored."""
        left, right = (A.mT, B.mT) if self._transposed else (B, A)
        with tf32_products(weight.device):
            weight.baddbmm_(left, right, alpha=alpha)

    def _base_tensors(self) -> list[TensorState]:
        """Return the ``fft`` expert's tensors with the values that move in place of the parameters."""
        values = {p: value for p, value in zip(self.base, self._values, strict=True) if p.grad is not None}
        return [x._replace(param=value, low=None) for x, value in zip(self.tensors(0), values.values(), strict=True)]

    def _gather(self, tensor: TensorState, index: Tensor) -> TensorState:
        self._gathered.append(_Rows.of(tensor, index))
        return self._gathered[-1].taken

    def oriented(self, weight: Tensor) -> Tensor:
        """Return weights ``[..., out, in]`` of those as they are stored, or the other way round: a view."""
        return weight.mT if self._transposed else weight

    def load_rows(self, p: Tensor) -> Tensor:
        """Return the layer's matrices of a parameter, as far as this rank holds them, in full precision."""
        low = self._state[p].get("low")
        return load(local(p.detach())[self._held], None if low is None else local(low)[self._held])

    def store_rows(self, p: Tensor, value: Tensor) -> None:
        """Write back what ``load_rows`` returned, after a change."""
        low = self._state[p].get("low")
        held = local(p.detach())[self._held]
        store(value, held, None if low is None else local(low)[self._held], self._noise, p)

    def set_pair_rows(self, i: int, A: Tensor, B: Tensor) -> None:  # noqa: N803 - the paper's letters
        """Set the i-th pair of all of the layer's matrices to ``A [r, in]`` and ``B [out, r]``; the weights stay."""
        for key, value in (("A", A), ("B", B)):
            for row in local(self.pair_tensor(i + 1, key).param)[self._held]:
                row.copy_(value)
        self._count_updates(i + 1)


def _cut(tensor: TensorState, rows: slice) -> TensorState:
    """Return some rows of a stack's local tensor."""
    return tensor.map(lambda x: x[rows])._replace(stacked=len(range(*rows.indices(len(tensor.param)))))
