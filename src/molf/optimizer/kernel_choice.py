"""Whether MoLF's Triton kernels take the steps: on request, or by themselves on CUDA once a self-test passes."""

from __future__ import annotations

import functools
import logging
from collections import defaultdict
from collections.abc import Hashable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from molf.errors import MolfError
from molf.kernels.checks import check_groups
from molf.layers.build import init_state_
from molf.numerics.bf16 import load
from molf.numerics.context import StepContext
from molf.numerics.distributed import Ranks, is_sharded
from molf.optimizer.step import step_groups
from molf.scores import SCORES, Score

__all__ = ["KernelSelector", "StepSignature", "kernels_run_on", "self_test", "signature_of"]

logger = logging.getLogger(__name__)

_OVERRIDE = "fused=True insists on the Triton kernels, fused=False never uses them"
# [out, in]: more than one block of elements and more than one tile; sizes that are aligned and sizes that are not.
_SHAPES = {True: ((16, 272), (80, 16)), False: ((17, 263), (67, 19))}
# Decay, lr and eps are large, so that every part of a step shows and rounding where gradients are near zero does not.
_GROUP = {
    "lr": 0.1,
    "weight_decay": 1.0,
    "lora_weight_decay": 0.5,
    "lora_lr_ratio": 2.0,
    "betas": (0.9, 0.999),
    "eps": 0.5,
}
# Relative to a tensor's largest value: products may be taken in TF32, which has 11 significant bits. bf16 adds two ulps.
_TOLERANCE, _BF16_ULPS = 1e-2, 2 * 2.0**-8


class StepSignature(NamedTuple):
    """What determines which kernel variants a step compiles."""

    device: torch.device
    form: str
    experts: tuple[str, ...]
    ranks: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    score: str
    stochastic: bool
    optim_bits: int
    aligned: bool


class KernelSelector:
    """Decides at the first step, and again when parameters or settings have changed.

    Attributes:
        enabled: Whether the Triton kernels take the steps; None before the first step.
    """

    def __init__(self) -> None:
        self.enabled: bool | None = None
        self._inputs: Hashable = None

    def select(self, context: StepContext, fused: bool | None) -> bool:
        """Return whether the Triton kernels take the next step. All ranks call this and get the same answer.

        Args:
            context: Of the step.
            fused: The user's option; None decides here.
        """
        if fused is not None:
            self.enabled = fused
            return fused
        inputs = (
            [(p.device, p.dtype, is_sharded(p)) for group in context.groups for p in group["params"]],
            [(group["betas"], group["eps"]) for group in context.groups],
            (type(context.score), context.stochastic, context.optim_bits, len(context.ranks.replica_groups)),
        )
        if self.enabled is None or self._inputs != inputs:
            self.enabled, self._inputs = _select(context), inputs
        return self.enabled


def kernels_run_on(device: torch.device) -> bool:
    """Return whether kernels may be used there unasked: not on a CPU, where Triton would interpret them."""
    return device.type == "cuda"


def _select(context: StepContext) -> bool:
    device = context.groups[0]["params"][0].device
    unmet = _unmet_condition(context, device)
    failure = None if unmet is not None else self_test(signature_of(context))
    if failure is not None:
        logger.warning(
            "Triton kernels failed their self-test on %s; using PyTorch kernels: %s (%s)", device, failure, _OVERRIDE
        )
    usable = unmet is None and failure is None
    everywhere = context.ranks.all_true(usable, device)
    if everywhere and context.ranks.is_leader:
        logger.info("Using Triton kernels on %s; %s", device, _OVERRIDE)
    elif usable and context.ranks.is_leader:
        logger.warning("Triton kernels cannot be used on all ranks; using PyTorch kernels on all (%s)", _OVERRIDE)
    elif unmet is not None:
        logger.debug("Using PyTorch kernels: %s", unmet)
    return everywhere


def _unmet_condition(context: StepContext, device: torch.device) -> str | None:
    if not kernels_run_on(device):
        return f"the parameters are on {device}"
    try:
        check_groups(context.groups, context.score)
    except MolfError as error:
        return str(error)
    return None


def signature_of(context: StepContext) -> StepSignature:
    """Return the signature of an optimizer's steps."""
    routed = next(group for group in context.groups if "module" in group)
    params = [p for group in context.groups for p in group["params"]]
    sizes = [n for p in params for n in (p.numel(), p.shape[-1] if p.ndim else 1)] + list(routed["ranks"])
    return StepSignature(
        device=params[0].device,
        form=routed["form"],
        experts=routed["experts"],
        ranks=routed["ranks"],
        dtypes=tuple(p.dtype for p in routed["params"]),
        score=context.score.name,
        stochastic=context.stochastic,
        optim_bits=context.optim_bits,
        aligned=all(n % 16 == 0 for n in sizes),
    )


@functools.cache
def self_test(signature: StepSignature) -> str | None:
    """Compare a few steps of two small layers by either kernels; return the first difference, or None.

    Every expert wins once, then all move, clipped. Runs once per process and signature, draws no global random number.
    """
    try:
        with torch.no_grad(), torch.autocast(signature.device.type, enabled=False):
            return next(_differences(signature), None)
    # Triton, compilers and drivers raise anything. Training can go on without the kernels, and the log says why.
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _differences(signature: StepSignature) -> Iterator[str]:
    generator = torch.Generator("cpu").manual_seed(0)
    contexts = [_small_model(signature), _small_model(signature)]
    params = [[p for group in context.groups for p in group["params"]] for context in contexts]
    count = len(signature.experts)
    for step in range(count + 1):
        for p, q in zip(*params, strict=True):
            p.grad = torch.randn(p.shape, generator=generator).to(p)
            q.grad = p.grad.clone()
        last = step == count
        options: dict[str, Any] = {"top_k": count if last else 1, "max_grad_norm": 10.0 if last else None}
        score = _Favour(SCORES[signature.score], step)
        fused = step_groups(contexts[0].groups, replace(contexts[0], fused=True, score=score, **options))
        plain = step_groups(contexts[1].groups, replace(contexts[1], score=score, **options).with_noise())
        if bool(fused.taken) is not True or abs(float(fused.norm) / float(plain.norm) - 1) > _TOLERANCE:
            yield f"step {step + 1}: the gradient norm is {float(fused.norm):.4g}, not {float(plain.norm):.4g}"
        assert fused.routing is not None and plain.routing is not None, "both layers have gradients"
        if not torch.equal(fused.routing.chosen.cpu(), plain.routing.chosen.cpu()):
            yield f"step {step + 1}: other winners"
        for p, q in zip(*params, strict=True):
            for name, found, expected in _tensors(p, q, contexts[0].state[p], contexts[1].state[q]):
                error = float((found - expected).abs().max()) / (float(expected.abs().max()) or 1.0)
                if not error <= _TOLERANCE + _BF16_ULPS * (p.dtype == torch.bfloat16):
                    yield f"step {step + 1}: {name} of a parameter {list(p.shape)} {p.dtype} is off by {error:.2g}"


def _tensors(
    p: Tensor, q: Tensor, entries: dict[str, Any], expected: dict[str, Any]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield name, found and expected value of what a step changes; 8-bit codes show in the weights of the next steps."""
    yield "the value", load(p, entries.get("low")).double(), load(q, expected.get("low")).double()
    for key, value in expected.items():
        if value.is_floating_point():
            yield key, entries[key].to(value.device).double(), value.double()


class _Favour(Score):
    """A score that lets a given expert of the first layer win, and the next one in the second layer."""

    def __init__(self, score: Score, expert: int):
        self.name, self._score, self._expert = score.name, score, expert

    def term(self, m: Tensor, v: Tensor, eps: float) -> Tensor:
        return self._score.term(m, v, eps)

    def finish(self, total: Tensor, n: Tensor, lr: Tensor) -> Tensor:
        scores = self._score.finish(total, n, lr)
        for i in range(len(scores)):
            scores[i, (self._expert + i) % scores.shape[1]] *= 1e6
        return scores


def _small_model(signature: StepSignature) -> StepContext:
    """Return the context of two small layers and an ordinary matrix and vector, always with the same values."""
    generator = torch.Generator("cpu").manual_seed(1)

    def parameter(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return (0.3 * torch.randn(shape, generator=generator)).to(signature.device, dtype)

    routed, shapes = [], _SHAPES[signature.aligned]
    adapters = 2 * len(signature.ranks) if signature.form == "branched" else 0
    for i, (n_out, n_in) in enumerate(shapes):
        own: list[tuple[int, ...]] = [(n_out, n_in), (n_out,)][: len(signature.dtypes) - adapters]
        own += [shape for r in signature.ranks for shape in ((r, n_in), (n_out, r))][:adapters]
        tags = {"module": str(i), "form": signature.form, "experts": signature.experts, "ranks": signature.ranks}
        params = [parameter(shape, dtype) for shape, dtype in zip(own, signature.dtypes, strict=True)]
        routed.append({"params": params, **tags, "scales": (1.0,) * len(signature.ranks), "lora_seed": i, **_GROUP})
    dtype = signature.dtypes[0]
    groups: list[dict[str, Any]] = [
        {"params": [parameter(shapes[0], dtype), parameter(shapes[0][:1], dtype)], **_GROUP},
        *routed,
    ]
    state: dict[Any, dict[str, Any]] = defaultdict(dict)
    for p in (p for group in groups for p in group["params"]):
        p.grad = torch.zeros_like(p)
    context = StepContext(
        groups,
        state,
        Ranks(),
        SCORES[signature.score],
        stochastic=signature.stochastic,
        optim_bits=signature.optim_bits,
    )
    init_state_(groups, context)
    return context
