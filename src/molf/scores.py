"""The two routing scores of the paper, and room for a user's own.

An expert's score says how much loss reduction its next step promises, from its raw Adam moments ``m`` and ``v`` over all
its N elements:

    EPD (Tang et al. 2026, Eq. 10)   score = (lr / N) * sum m^2 / (sqrt(v) + eps)
    PFN (Tang et al. 2026, Eq. 11)   score = sqrt( sum (m / (sqrt(v) + eps))^2 / N )

Bias correction is left out: it scales all experts of a layer alike.
"""

from __future__ import annotations

import abc
import difflib

import torch
from torch import Tensor

__all__ = ["EPD", "PFN", "SCORES", "Score", "get_score"]


class Score(abc.ABC):
    """A routing score: a sum over an expert's elements, and a formula that turns the sum into a score.

    Subclass it, define ``term`` and ``finish``, and pass an instance as ``MoLF(..., score=MyScore())``. The sum is taken
    piecewise (blocks of a tensor, shards of a weight), so ``term`` must be element-wise.
    """

    name: str

    @abc.abstractmethod
    def term(self, m: Tensor, v: Tensor, eps: float) -> Tensor:
        """Return the element-wise term to be summed, of the shape of ``m``.

        Args:
            m: First moment of any slice of an expert, any shape.
            v: Second moment of the same slice.
            eps: Adam's epsilon.
        """

    @abc.abstractmethod
    def finish(self, total: Tensor, n: Tensor, lr: Tensor) -> Tensor:
        """Turn the sums of all experts into their scores; a higher score wins.

        Args:
            total: Sum of ``term`` over the expert, ``[M, E]`` (modules x experts), float64.
            n: Number of elements of each expert, ``[M, E]``.
            lr: Learning rate of each expert at this step, schedule included, ``[M, E]``.
        """

    def partial(self, m: Tensor, v: Tensor, u: Tensor, eps: float) -> Tensor:
        """Sum ``term`` over one flat slice, a 0-dim tensor.

        ``u = m / (sqrt(v) + eps)`` is at hand when this is called: override to build on it instead of computing it again.
        """
        return self.term(m, v, eps).sum()


class EPD(Score):
    """Expected preconditioned descent (paper Eq. 10): the loss that one step is expected to remove, per parameter."""

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
    """Preconditioned Frobenius norm (paper Eq. 11): the scale-free ablation, blind to gradient size and learning rate."""

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
        ValueError: For a name that is not in ``SCORES``.
        TypeError: For anything that is neither a name nor a ``Score``.
    """
    if isinstance(score, Score):
        return score
    if not isinstance(score, str):
        raise TypeError(f"score must be one of {sorted(SCORES)} or a molf.Score, got {type(score).__name__}")
    if score not in SCORES:
        near = difflib.get_close_matches(score, SCORES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown score {score!r}: use one of {sorted(SCORES)} or a molf.Score of your own{hint}")
    return SCORES[score]
