"""Routing scores: the two of the paper, and the base class for your own.

A score estimates how much loss an expert's next step removes, from its raw Adam moments ``m`` and ``v`` over all its N elements:

    EPD (Tang et al. 2026, Eq. 10)   score = (lr / N) * sum m^2 / (sqrt(v) + eps)
    PFN (Tang et al. 2026, Eq. 11)   score = sqrt( sum (m / (sqrt(v) + eps))^2 / N )

Bias correction is left out: it scales all experts of a layer by the same factor.
"""

from __future__ import annotations

import abc
import difflib

import torch
from torch import Tensor

from molf.errors import MolfError

__all__ = ["EPD", "PFN", "SCORES", "Score", "get_score"]


class Score(abc.ABC):
    """A routing score: a sum over an expert's elements, and a formula from the sum to the score.

    Subclass it, define ``term`` and ``finish``, and pass an instance: ``MoLF(..., score=MyScore())``. ``term`` must be
    element-wise, because the sum is computed piece by piece (blocks of a tensor, shards of a weight).
    """

    name: str

    @abc.abstractmethod
    def term(self, m: Tensor, v: Tensor, eps: float) -> Tensor:
        """Return the element-wise term of the sum, in the shape of ``m``.

        Args:
            m: First moment of any slice of an expert, any shape.
            v: Second moment of the same slice.
            eps: Adam's epsilon.
        """

    @abc.abstractmethod
    def finish(self, total: Tensor, n: Tensor, lr: Tensor) -> Tensor:
        """Return the scores of all experts; the highest wins.

        Args:
            total: Sum of ``term`` over the expert, ``[M, E]`` (modules x experts), float64.
            n: Number of elements N of each expert, ``[M, E]``.
            lr: Learning rate of each expert at this step, schedule included, ``[M, E]``.
        """

    def partial(self, m: Tensor, v: Tensor, u: Tensor, eps: float) -> Tensor:
        """Return the sum of ``term`` over one flat slice, 0-dim.

        Override this to reuse ``u = m / (sqrt(v) + eps)``, which is already computed.
        """
        return self.term(m, v, eps).sum()


class EPD(Score):
    """Expected preconditioned descent (paper Eq. 10): the loss reduction that one step promises, per parameter."""

    name = "epd"

    def term(self, m: Tensor, v: Tensor, eps: float) -> Tensor:
        """Return ``m^2 / (sqrt(v) + eps)``."""
        return m * m / (v.sqrt() + eps)

    def finish(self, total: Tensor, n: Tensor, lr: Tensor) -> Tensor:
        """Return ``lr / N * total``."""
        return lr / n * total

    def partial(self, m: Tensor, v: Tensor, u: Tensor, eps: float) -> Tensor:
        """Return ``sum m * u``."""
        return torch.dot(m, u)


class PFN(Score):
    """Preconditioned Frobenius norm (paper Eq. 11): the ablation that ignores gradient size and learning rate."""

    name = "pfn"

    def term(self, m: Tensor, v: Tensor, eps: float) -> Tensor:
        """Return ``(m / (sqrt(v) + eps))^2``."""
        return (m / (v.sqrt() + eps)).square()

    def finish(self, total: Tensor, n: Tensor, lr: Tensor) -> Tensor:
        """Return ``sqrt(total / N)``."""
        return (total / n).sqrt()

    def partial(self, m: Tensor, v: Tensor, u: Tensor, eps: float) -> Tensor:
        """Return ``sum u^2``."""
        return torch.dot(u, u)


SCORES: dict[str, Score] = {"epd": EPD(), "pfn": PFN()}


def get_score(score: str | Score) -> Score:
    """Return the score of that name, or the given ``Score`` itself.

    Raises:
        MolfError: For a name that is not in ``SCORES``.
        TypeError: For anything that is neither a name nor a ``Score``.
    """
    if isinstance(score, Score):
        return score
    if not isinstance(score, str):
        raise TypeError(f"score must be one of {sorted(SCORES)} or a molf.Score, got {type(score).__name__}")
    if score not in SCORES:
        near = difflib.get_close_matches(score, SCORES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise MolfError(f"unknown score {score!r}: use one of {sorted(SCORES)} or a molf.Score of your own{hint}")
    return SCORES[score]
