"""The merged form: the model's weight is the effective weight, and the LoRA pairs live in the optimizer's state.

    W_eff = W + sum_i s_i B_i A_i       W_eff, W [out, in], A_i [r_i, in], B_i [out, r_i]

Backward gives ``G = dL/dW_eff``. Every expert's exact gradient follows from it at the step:

    dW = G        dB_i = s_i G A_i^T        dA_i = s_i B_i^T G

After the step the winner's change is added to ``W_eff``. ``W`` itself is never stored.

Under FSDP2, ``W_eff``, ``B`` and their moments are sharded by rows, so ``dW``, ``dB`` and the change of ``W_eff`` are local.
``A`` is replicated, and ``dA`` is a sum over the shards.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from molf.layers.base import LoraPair, winners_of
from molf.layers.pairs_in_state import PairsInState
from molf.numerics.adamw import Rates, TensorState
from molf.numerics.distributed import is_sharded, local, local_part, shard_rows_like
from molf.numerics.tf32 import tf32_products

__all__ = ["MergedLayer", "apply_lora_delta_", "base_weight", "decay_base_", "expert_gradients"]


def expert_gradients(grad: Tensor, pair: LoraPair, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return ``(dA, dB)`` of a pair from the gradient ``G [out, in]`` of the effective weight, or from some of its rows.

    Args:
        grad: The gradient.
        pair: The pair, with the same rows of B.
        out: Memory for dA; None for new memory.
    """
    dA, dB = torch.zeros_like(pair.A) if out is None else out, torch.empty_like(pair.B)
    if pair.b_is_nonzero:
        torch.addmm(dA, pair.B.T, grad, beta=0, alpha=pair.scale, out=dA)
    return dA, torch.addmm(dB, grad, pair.A.T, beta=0, alpha=pair.scale, out=dB)


def base_weight(effective: Tensor, pairs: Sequence[LoraPair]) -> Tensor:
    """Return ``W = W_eff - sum_i s_i B_i A_i``, a new tensor."""
    weight = effective.clone()
    for pair in pairs:
        weight.addmm_(pair.B, pair.A, alpha=-pair.scale)
    return weight


def decay_base_(effective: Tensor, pairs: Sequence[LoraPair], decay: float) -> None:
    """Decay only ``W`` inside ``W_eff``: ``W_eff -= decay * (W_eff - sum_i s_i B_i A_i)``."""
    if decay == 0:
        return
    nonzero = [pair for pair in pairs if pair.b_is_nonzero]
    if not nonzero:
        effective.mul_(1 - decay)
    for i, pair in enumerate(nonzero):
        effective.addmm_(pair.B, pair.A, beta=1 - decay if i == 0 else 1.0, alpha=decay * pair.scale)


def apply_lora_delta_(effective: Tensor, before: LoraPair, after: LoraPair) -> None:
    """Add a pair's change to ``W_eff`` as ``s (B dA + dB A')``: the difference ``B'A' - BA`` would cancel.

    Args:
        effective: ``W_eff [out, in]``.
        before: A copy of the pair before the change; overwritten.
        after: The pair now.
    """
    dA = torch.sub(after.A, before.A, out=before.A)
    if before.b_is_nonzero:
        effective.addmm_(before.B, dA, alpha=after.scale)
    dB = torch.sub(after.B, before.B, out=before.B)
    effective.addmm_(dB, after.A, alpha=after.scale)


class MergedLayer(PairsInState):
    """A layer whose weight is the effective weight; its pairs are tensors in the state of that weight."""

    @property
    def _local_pairs(self) -> list[LoraPair]:
        """The pairs with this rank's rows of B."""
        return [pair._replace(B=local(pair.B)) for pair in self.pairs]

    def base_weight(self) -> Tensor:
        """Return ``W = W_eff - sum_i s_i B_i A_i``, a new tensor."""
        return shard_rows_like(base_weight(self._load(self.base[0]), self._local_pairs), self.base[0])

    def set_base_weight(self, value: Tensor) -> None:
        """Set ``W``; the effective weight follows."""
        change = local_part(value, self.base[0]) - local(self.base_weight())
        self._write(self.base[0], self._load(self.base[0]) + change)

    def set_pair(self, i: int, A: Tensor | None, B: Tensor | None) -> None:  # noqa: N803 - the paper's letters
        """Set a pair; the effective weight follows and ``W`` stays."""
        pair = self._local_pairs[i]
        before = _copy(pair)
        if A is not None:
            pair.A.copy_(A)
        if B is not None:
            pair.B.copy_(local_part(B, self.pairs[i].B))
        self._count_updates(i + 1)
        effective = self._load(self.base[0]).clone()
        apply_lora_delta_(effective, before, pair)
        self._write(self.base[0], effective)

    @property
    def reduced_numel(self) -> int:
        """Elements of ``dA`` of the pairs with nonzero B; the other ``dA`` are zero."""
        return sum(pair.A.numel() for pair in self.pairs if pair.b_is_nonzero) if is_sharded(self.base[0]) else 0

    def write_grads_into(self, out: Tensor) -> None:
        """Compute the pairs' gradients, with those of A in ``out``; a layer that is whole on every rank needs no sum."""
        if not is_sharded(self.base[0]):
            return
        sizes = [pair.A.numel() if pair.b_is_nonzero else 0 for pair in self.pairs]
        for i, dA in enumerate(torch.split(out, sizes)):
            pair = self._local_pairs[i]
            self._tensors[i + 1] = self._pair_tensors(i + 1, pair, dA.view_as(pair.A) if pair.b_is_nonzero else None)

    def _expert_tensors(self, i: int) -> list[TensorState]:
        if i == 0:
            return [self._tensor(p) for p in self.base if p.grad is not None]
        return self._pair_tensors(i, self._local_pairs[i - 1])

    def _pair_tensors(self, i: int, pair: LoraPair, out: Tensor | None = None) -> list[TensorState]:
        with tf32_products(pair.A.device):
            gradients = expert_gradients(local(self.gradients()[0]).to(pair.A.dtype), pair, out)
        return [self.pair_tensor(i, key)._replace(grad=grad) for key, grad in zip("AB", gradients, strict=True)]

    def begin_update(self, chosen: Tensor) -> list[tuple[Rates, TensorState]]:
        """Decay ``W`` inside ``W_eff`` if ``fft`` won, copy the winning pairs, and return what AdamW has to move."""
        winners = winners_of(chosen)
        weight, *bias = self.tensors(0)
        self._effective, pairs = self._load(self.base[0]), self._local_pairs
        self._moved = [(i, pair, _copy(pair)) for i, pair in enumerate(pairs, start=1) if i in winners]
        work = []
        if 0 in winners:
            rates = self._rates(0)
            with tf32_products(self._effective.device):
                decay_base_(self._effective, pairs, rates.lr * rates.weight_decay)
            undecayed = self._rates(0, decayed=False)
            work = [(undecayed, weight._replace(param=self._effective, low=None)), *((undecayed, x) for x in bias)]
        for i, _, _ in self._moved:
            work += [(self._rates(i), tensor) for tensor in self.tensors(i)]
        return work

    def finish_update(self) -> None:
        """Apply the pairs' changes to ``W_eff`` and write it back into the model."""
        with tf32_products(self._effective.device):
            for i, pair, before in self._moved:
                apply_lora_delta_(self._effective, before, pair)
                self._count_updates(i)
        self._store(self.base[0], self._effective)
        del self._effective, self._moved


def _copy(pair: LoraPair) -> LoraPair:
    return pair._replace(A=pair.A.clone(), B=pair.B.clone())
