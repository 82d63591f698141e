"""A trial of the kernels on the device that is to use them: do they take the step there that PyTorch's kernels take?

A few small layers go a few steps by both, each step from equal states. Every expert wins in its turn, whatever the rounding of
scores, then all of them do: so all that a run of this kind launches is launched and compared.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from molf.kernels.kinds import Held, Kind, LayerKind
from molf.kernels.step import FusedStep, Settings
from molf.layers.build import init_states
from molf.layers.forms import FORMS
from molf.numerics.bf16 import Noise, load
from molf.numerics.distributed import Ranks
from molf.optimizer.torch_step import PlainStep
from molf.routing import Outcome
from molf.scores import Score, get_score

__all__ = ["trial"]

# [out, in] of layers: more than one block of elements, of a row in 8 bits and of a tile; and a small one.
_EVEN, _ODD = ((16, 272), (80, 16)), ((17, 263), (67, 19))
# Decay and eps are large, so that nothing of a step is lost in what is allowed, nor an element moved by a rounding error.
_RATES = {"lr": 0.1, "weight_decay": 1.0, "lora_weight_decay": 0.5, "lora_lr_ratio": 2.0}
_ADAM = {"betas": (0.9, 0.999), "eps": 0.5}
# In shares of a tensor's largest value: products are taken in TF32, 11 significant bits, and Adam divides what comes of it.
_ALLOWED = 1e-2
_ALLOWED_CODES = 2e-2  # share of 8-bit codes that may differ, by one, where the last bit of a moment does
_ULPS = 2 * 2.0**-8  # of a bf16 number: two rounded at random, each up or down


class _Turns(Score):
    """A score of which that of one expert of each layer counts a million times."""

    def __init__(self, score: Score, turn: int):
        self.name, self._score, self._turn = score.name, score, turn

    def term(self, m: Tensor, v: Tensor, eps: float) -> Tensor:
        return self._score.term(m, v, eps)

    def partial(self, m: Tensor, v: Tensor, u: Tensor, eps: float) -> Tensor:
        return self._score.partial(m, v, u, eps)

    def finish(self, total: Tensor, n: Tensor, lr: Tensor) -> Tensor:
        layers, experts = total.shape
        turn = [[1e6 if (i + self._turn - e) % experts == 0 else 1.0 for e in range(experts)] for i in range(layers)]
        return self._score.finish(total, n, lr) * torch.tensor(turn, dtype=total.dtype, device=total.device)


class _Step(NamedTuple):
    """One step of a trial.

    Attributes:
        settings: Score, top-k and clipping.
        scale: A loss scale, or None.
        missing: Whether a layer and an ordinary parameter have no gradient.
    """

    settings: Settings
    scale: Tensor | None = None
    missing: bool = False


class _Side:
    """Small layers with their state, which steps are taken of; equal for equal kinds.

    Args:
        kind: The kind of step.
        shapes: ``[out, in]`` of the layers.
    """

    def __init__(self, kind: Kind, shapes: Sequence[tuple[int, int]]):
        generator = torch.Generator("cpu").manual_seed(0)

        def made(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
            values = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
            return (0.3 * values).to(kind.device, dtype)

        held = [Held(ndim, dtype) for ndim, dtype in kind.ordinary]
        self.groups: list[dict[str, Any]] = [
            {"params": [made(_shape(shapes[0], x), x.dtype) for x in held for _ in range(2)], **_RATES, **_ADAM}
        ]
        for i, (shape, layer) in enumerate(itertools.product(shapes, kind.layers)):
            params = [made(own, x.dtype) for own, x in zip(_shapes(shape, layer), layer.params, strict=True)]
            tags = {"module": str(i), "form": layer.form, "experts": layer.experts, "ranks": layer.ranks}
            scales = (1.0,) * len(layer.ranks)
            self.groups.append({"params": params, **tags, "scales": scales, "lora_seed": i, **_RATES, **_ADAM})
        self.params: list[Tensor] = [p for group in self.groups for p in group["params"]]
        self.state: dict[Any, dict[str, Any]] = defaultdict(dict)
        for p in self.params:
            p.grad = torch.zeros_like(p)
        init_states(self.groups, self.state, kind.keep_low, kind.optim_bits)

    def work(self, noise: Noise | None) -> tuple[list[Any], list[dict[str, Any]]]:
        """Return the layers that have gradients, and the groups of other parameters."""
        layers = [FORMS[group["form"]](group, self.state, noise) for group in self.groups[1:]]
        return [layer for layer in layers if layer.active], self.groups[:1]


def trial(kind: Kind) -> str | None:
    """Take a few steps of a kind by PyTorch's kernels and by these, and return how these fail, or None.

    No random number of the user's is drawn, and whatever happens stays on the small layers.

    Args:
        kind: The kind of step.
    """
    with torch.no_grad(), torch.autocast(kind.device.type, enabled=False):
        for shapes in (_EVEN, _ODD) if kind.odd else (_EVEN,):
            if (failure := _compared(kind, shapes)) is not None:
                return failure
    return None


def _compared(kind: Kind, shapes: Sequence[tuple[int, int]]) -> str | None:
    plain, fused, kernels = _Side(kind, shapes), _Side(kind, shapes), FusedStep(kind.device)
    for t, step in enumerate(_steps(kind)):
        _give_gradients(plain, fused, t, step.missing)
        score, top_k, max_norm = step.settings
        noise = None if kind.keep_low else Noise(t, {p: i for i, p in enumerate(plain.params)})
        expected = PlainStep(score, top_k, max_norm).take(
            *plain.work(noise), plain.state, step.scale, None, Ranks(), noise
        )
        found = kernels.take(*fused.work(None), fused.state, step.settings, step.scale, None, Ranks(), t)
        if (failure := _difference(fused, plain, found, expected)) is not None:
            return f"{failure}, at step {t + 1} of a trial"
        for p, q in zip(fused.params, plain.params, strict=True):
            p.copy_(q)
            for key, value in plain.state[q].items():
                fused.state[p][key].copy_(value)
    return None


def _steps(kind: Kind) -> Iterator[_Step]:
    """Yield steps that every expert wins in its turn, one that all win, clipped and scaled, and one that is left out."""
    score, experts = get_score(kind.score), len(kind.layers[0].experts)
    for turn in range(experts):
        yield _Step(Settings(_Turns(score, turn), 1, None))
    scale = torch.full((), 2.0, device=kind.device)
    yield _Step(Settings(_Turns(score, 0), experts, 10.0), scale, missing=True)
    yield _Step(Settings(_Turns(score, 0), 1, None), torch.zeros((), device=kind.device))


def _shapes(shape: tuple[int, int], layer: LayerKind) -> list[tuple[int, ...]]:
    """Return the shapes of a layer's parameters."""
    pairs = [own for r in layer.ranks for own in ((r, shape[1]), (shape[0], r))] if layer.form == "branched" else []
    base = layer.params[: len(layer.params) - len(pairs)]
    return [*(_shape(shape, x) for x in base), *pairs]


def _shape(shape: tuple[int, int], held: Held) -> tuple[int, ...]:
    return {0: (), 1: shape[:1], 2: shape}[held.ndim]


def _give_gradients(plain: _Side, fused: _Side, t: int, missing: bool) -> None:
    """Give both sides the gradients of a step."""
    generator = torch.Generator("cpu").manual_seed(t)
    without = {id(p) for p in (plain.groups[0]["params"][-1:] + plain.groups[-1]["params"] if missing else [])}
    for p, q in zip(plain.params, fused.params, strict=True):
        grad = torch.randn(p.shape, generator=generator, dtype=torch.float32, device="cpu").to(p)
        p.grad, q.grad = (None, None) if id(p) in without else (grad, grad.clone())


def _difference(fused: _Side, plain: _Side, found: Outcome, expected: Outcome) -> str | None:
    """Say what comes first of all that is further from what it should be than is allowed."""
    for name, by, allowed in _differences(fused, plain, found, expected):
        if not by <= allowed:
            return f"{name}: off by {by:.2g}, where {allowed:.2g} is allowed"
    return None


def _differences(fused: _Side, plain: _Side, found: Outcome, expected: Outcome) -> Iterator[tuple[str, float, float]]:
    """Yield what is compared, how far it is apart, and how far it may be; what follows from something else after that."""
    yield "whether a step is taken", float(bool(found.taken) != expected.taken), _ALLOWED
    if expected.taken:
        yield "the norm of all gradients", _apart(found.norm, expected.norm), _ALLOWED
    if expected.routing is not None:
        assert found.routing is not None, "the same layers have gradients"
        others = found.routing.chosen.cpu() != expected.routing.chosen.cpu()
        yield "the share of other winners", float(others.double().mean()), _ALLOWED
        yield "a score", _apart(found.routing.scores.cpu() / expected.routing.scores.cpu(), others + 1.0), _ALLOWED
    for p, q in zip(fused.params, plain.params, strict=True):
        mine, theirs = fused.state[p], plain.state[q]
        what = f"of a parameter {list(p.shape)} {p.dtype}"
        for key, value in theirs.items():
            if value.dtype == torch.uint8:
                yield f"codes {key} {what}", float((mine[key] != value).double().mean()), _ALLOWED_CODES
            elif key != "low":
                yield f"{key} {what}", _apart(mine[key], value), _ALLOWED
        rounded = p.dtype == torch.bfloat16 and "low" not in theirs
        values = load(p, mine.get("low")), load(q, theirs.get("low"))
        yield f"the value {what}", _apart(*values), _ALLOWED + _ULPS * rounded


def _apart(found: Tensor, expected: Tensor) -> float:
    """Return the greatest difference in shares of the largest value that is expected, as it is if only zeros are."""
    found, expected = (x.detach().to("cpu", torch.float64) for x in (found, expected))
    return float((found - expected).abs().max()) / (float(expected.abs().max()) or 1.0)
