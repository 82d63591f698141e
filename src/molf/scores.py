"""Routing scores: the two of the paper, four others, and the base class for your own.

A score estimates how much loss an expert's next step removes, from its raw Adam moments ``m`` and ``v`` over all its N elements:

    EPD (Tang et al. 2026, Eq. 10)   score = (lr / N) * sum m^2 / (sqrt(v) + eps)
    PFN (Tang et al. 2026, Eq. 11)   score = sqrt( sum (m / (sqrt(v) + eps))^2 / N )
    descent                          score = lr * sum m^2 / (sqrt(v) + eps), EPD without 1 / N
    coherence                        sum m^2 / (sqrt(v) + eps) / sum sqrt(v): how far past gradients agreed
    random                           every expert is equally likely: the control of every comparison
    shuffled                         EPD, dealt to other modules: the control of what EPD knows about a module

Bias correction is left out: it scales all experts of a layer by the same factor.
"""

from __future__ import annotations

import abc
import copy
import difflib
import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from molf.errors import MolfError

__all__ = [
    "EPD",
    "PFN",
    "SCORES",
    "Coherence",
    "Descent",
    "Evidence",
    "Random",
    "Score",
    "Shuffled",
    "get_score",
    "scores_of",
    "try_score",
]


@dataclass(frozen=True)
class Evidence:
    """What a score may decide by, for M modules and E experts. Tensors are float64, ``[M, E]`` unless noted, on one device.

    Attributes:
        modules: Names of the modules.
        total: Sums of the score's ``term``.
        n: Number of elements of each expert.
        lr: Learning rate of each expert at this step. Where it is 0, that at the schedule's base rate (``initial_lr``, else 1):
            nothing moves, but what the experts promise decides, and not a tie.
        descent: ``D = sum m^2 / (sqrt(v) + eps)``: what a step at rate 1 promises to first order.
        steps: 1-based step count of each module, ``[M]``.
    """

    modules: tuple[str, ...]
    total: Tensor
    n: Tensor
    lr: Tensor
    descent: Tensor
    steps: Tensor


class Score(abc.ABC):
    """A routing score: a sum over an expert's elements, and a formula from the sum to the score.

    Subclass it, define ``term`` and ``finish``, and pass an instance: ``MoLF(..., score=MyScore())``. ``term`` must be
    element-wise, because the sum is computed piece by piece (blocks of a tensor, shards of a weight). Before its first step a
    copy is tried on ones, so that an error comes before anything has moved.

    Attributes:
        name: What settings and logs call it.
        compares_modules: Whether a module's score depends on other modules, so that none can move before all have gradients.
    """

    name: str
    compares_modules: bool = False

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

    def partials(self, m: Tensor, v: Tensor, u: Tensor, eps: float) -> Tensor:
        """Return the sums of ``term`` over the rows of stacked slices ``[n, elements]``, ``[n]``."""
        if type(self).partial is Score.partial:
            return self.term(m, v, eps).sum(1)
        return torch.stack([self.partial(*own, eps) for own in zip(m, v, u, strict=True)])

    @property
    def sums_descent(self) -> bool:
        """Whether the sum of ``term`` is the descent, which is computed anyway."""
        return type(self).term is EPD.term and type(self).partial is EPD.partial

    def scores(self, evidence: Evidence) -> Tensor:
        """Return the scores of all experts, ``[M, E]``. Override this for a score that needs more than its own sum."""
        return self.finish(total=evidence.total, n=evidence.n, lr=evidence.lr)


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
        """Return ``sum m * u``, or the sum of a ``term`` that a subclass defines."""
        return torch.dot(m, u) if type(self).term is EPD.term else super().partial(m, v, u, eps)


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
        """Return ``sum u^2``, or the sum of a ``term`` that a subclass defines."""
        return torch.dot(u, u) if type(self).term is PFN.term else super().partial(m, v, u, eps)

    def partials(self, m: Tensor, v: Tensor, u: Tensor, eps: float) -> Tensor:
        """Return ``sum u^2`` of every row, unless a subclass defines another sum."""
        own = (type(self).term, type(self).partial) == (PFN.term, PFN.partial)
        return torch.linalg.vecdot(u, u) if own else super().partials(m, v, u, eps)


class Descent(EPD):
    """Total descent: the loss reduction that one step promises. It prefers the expert whose rate is too high."""

    name = "descent"

    def finish(self, total: Tensor, n: Tensor, lr: Tensor) -> Tensor:
        """Return ``lr * total``."""
        return lr * total


class Coherence(Score):
    """Agreement between batches: the promised descent as a share of what it would be had all past gradients agreed.

    ``sum m^2 / (sqrt(v) + eps) / sum sqrt(v)``, between 0 and 1 after bias correction: a mean of ``m^2 / v``, weighted by
    ``sqrt(v)``. Size, rate, scale and number of elements cancel.
    """

    name = "coherence"

    def term(self, m: Tensor, v: Tensor, eps: float) -> Tensor:
        """Return ``sqrt(v)``."""
        return v.sqrt()

    def finish(self, total: Tensor, n: Tensor, lr: Tensor) -> Tensor:
        """Not used: the score needs the descent."""
        raise NotImplementedError

    def scores(self, evidence: Evidence) -> Tensor:
        """Return ``descent / sum sqrt(v)``, 0 where that sum is: without a gradient, or with one whose square is 0 in float32."""
        return (evidence.descent / evidence.total).where(evidence.total != 0, 0.0)


class Random(EPD):
    """Random routing, the control: a function of seed, module name and step count, so that a resumed run repeats it."""

    name = "random"

    def __init__(self, seed: int = 0):
        self.seed = seed

    def scores(self, evidence: Evidence) -> Tensor:
        """Return random numbers, uniform in [0, 1), on the device of the step counts."""
        steps = evidence.steps.long()
        x = _keys(evidence.modules, evidence.lr.shape[1], self.seed, steps.device) + (steps * _GOLDEN)[:, None]
        # The finaliser of SplitMix64 (Steele, Lea, Flood 2014); int64 wraps around, and its shifts are made logical.
        for shift, factor in ((30, _MIX[0]), (27, _MIX[1])):
            x = (x ^ _shift(x, shift)) * factor
        return _shift(x ^ _shift(x, 31), 11).double() / 2**53


class Shuffled(Random):
    """EPD's scores, at every step dealt to other modules at random: each expert's share stays EPD's, the module has no say."""

    name = "shuffled"
    compares_modules = True

    def scores(self, evidence: Evidence) -> Tensor:
        """Return the rows of EPD's scores in a random order."""
        order = super().scores(evidence)[:, 0].argsort()
        return EPD.scores(self, evidence)[order]


_GOLDEN, _MIX = 0x9E3779B97F4A7C15 - 2**64, (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift int64 numbers to the right, filling with zeros."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


@functools.lru_cache(maxsize=4096)  # layers that move alone, in backward, have an entry each
def _keys(modules: tuple[str, ...], experts: int, seed: int, device: torch.device) -> Tensor:
    """Return a number for each expert of each module, ``[M, E]``."""
    digests = (hashlib.sha256(f"{seed} {module}".encode()).digest()[:8] for module in modules)
    keys = torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests], device=device)
    return keys[:, None] + torch.arange(experts, device=device) * _MIX[0]


SCORES: dict[str, Score] = {
    "epd": EPD(),
    "pfn": PFN(),
    "descent": Descent(),
    "random": Random(),
    "coherence": Coherence(),
    "shuffled": Shuffled(),
}


def scores_of(score: Score, evidence: Evidence) -> Tensor:
    """Return the scores of all experts, ``[M, E]``.

    Raises:
        MolfError: If the score returns something else.
    """
    scores, wanted = score.scores(evidence), list(evidence.lr.shape)
    shape = list(getattr(scores, "shape", ()))
    if shape != wanted:
        raise MolfError(
            f"{type(score).__name__} returned scores {shape} for {wanted[0]} modules with {wanted[1]} experts: finish must "
            f"return [M, E] = {wanted}"
        )
    return scores


def try_score(score: Score, modules: Sequence[str], experts: int, eps: float) -> None:
    """Ask a copy of a user's score once, with ones, and raise what would come in the middle of a step.

    Raises:
        MolfError: If the score returns sums or scores of another shape than it must.
    """
    if type(score) in {type(known) for known in SCORES.values()}:
        return
    tried, ones = copy.copy(score), torch.ones(len(modules), experts, dtype=torch.float64, device="cpu")
    m, v, u = ones.new_ones(3, 2, 2).unbind()
    _check_sums(f"{type(score).__name__}.partial", tried.partial(m[0], v[0], u[0], eps), 1)
    _check_sums(f"{type(score).__name__}.partials", tried.partials(m, v, u, eps), 2)
    total, n, lr, descent = ones.repeat(4, 1, 1).unbind()
    scores_of(tried, Evidence(tuple(modules), total, n, lr, descent, torch.ones_like(ones[:, 0])))


def _check_sums(name: str, found: Any, count: int) -> None:
    if not isinstance(found, Tensor) or found.numel() != count:
        what = f"a tensor {list(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise MolfError(
            f"{name} returned {what}: it must return a tensor, the sum of term over a slice; for partials, over each row"
        )


def get_score(score: str | Score) -> Score:
    """Return the score of that name, or the given ``Score`` itself.

    Raises:
        MolfError: For a name that is not in ``SCORES``.
        TypeError: For anything that is neither a name nor a ``Score``.
    """
    if isinstance(score, Score):
        return score
    given: Any = score
    if not isinstance(given, str):
        kind = f"the class {given.__name__}: pass an instance" if isinstance(given, type) else type(given).__name__
        raise TypeError(f"score must be one of {sorted(SCORES)} or a molf.Score, got {kind}")
    if score not in SCORES:
        near = difflib.get_close_matches(score, SCORES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise MolfError(f"unknown score {score!r}: use one of {sorted(SCORES)} or a molf.Score of your own{hint}")
    return SCORES[score]
