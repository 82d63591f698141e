"""Whether MoLF's Triton kernels take the steps: on request, or by themselves on CUDA once a self-test passes."""

from __future__ import annotations

import copy
import functools
import logging
from collections import defaultdict
from collections.abc import Hashable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from molf.errors import MolfError
from molf.kernels.checks import check_groups, share_betas_and_eps
from molf.layers.build import init_state_
from molf.numerics.bf16 import load
from molf.numerics.context import StepContext
from molf.numerics.distributed import Ranks, is_sharded
from molf.optimizer.step import step_groups
from molf.scores import SCORES, Evidence, Score

__all__ = ["KernelSelector", "StepSignature", "kernels_run_on", "self_test", "signature_of"]

logger = logging.getLogger(__name__)

_OVERRIDE = "fused=True insists on the Triton kernels, fused=False never uses them"
# [out, in]: more than one block of elements; sizes that are read several elements at once, and sizes that are not.
_SHAPES = (16, 272), (67, 19)
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
            share_betas_and_eps(context.groups),
            (type(context.score), context.stochastic, context.optim_bits, len(context.ranks.replica_groups)),
        )
        if self.enabled is None or self._inputs != inputs:
            self.enabled, self._inputs = _select(context), inputs
        return self.enabled


def kernels_run_on(device: torch.device) -> bool:
    """Return whether kernels may be used there unasked: not on a CPU, where Triton would interpret them."""
    return device.type == "cuda"


def _select(context: StepContext) -> bool:
    device = next(p.device for group in context.groups for p in group["params"])
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
    params, settings = routed["params"], (context.score.name, context.stochastic, context.optim_bits)
    dtypes = tuple(p.dtype for p in params)
    return StepSignature(params[0].device, routed["form"], routed["experts"], routed["ranks"], dtypes, *settings)


@functools.cache
def self_test(signature: StepSignature) -> str | None:
    """Compare a few steps of two small layers by either kernels; return the first difference, or None.

    Every expert wins once, then all move, clipped. Runs once per process and signature, draws no global random number.
    """
    try:
        with torch.no_grad():
            return next(_differences(signature), None)
    # Triton, compilers and drivers raise anything. Training can go on without the kernels, and the log says why.
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _differences(signature: StepSignature) -> Iterator[str]:
    generator, count = torch.Generator("cpu").manual_seed(0), len(signature.experts)
    contexts = [_small_model(signature), _small_model(signature)]
    params = [[p for group in context.groups for p in group["params"]] for context in contexts]
    for step in range(count + 1):
        for p, q in zip(*params, strict=True):
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p)
            q.grad = p.grad.clone()
        options: dict[str, Any] = {"top_k": count, "max_grad_norm": 10.0} if step == count else {}
        options["score"] = _favouring(signature.score, step)
        fused = step_groups(contexts[0].groups, replace(contexts[0], fused=True, fused_required=True, **options))
        plain = step_groups(contexts[1].groups, replace(contexts[1], **options).with_noise())
        if bool(fused.taken) is not True or abs(float(fused.norm) / float(plain.norm) - 1) > _TOLERANCE:
            yield f"step {step + 1}: the gradient norm is {float(fused.norm):.4g}, not {float(plain.norm):.4g}"
        assert fused.routing is not None and plain.routing is not None, "both layers have gradients"
        if not torch.equal(fused.routing.chosen.cpu(), plain.routing.chosen.cpu()):
            yield f"step {step + 1}: other winners"
        for p, q in zip(*params, strict=True):
            entries, expected = contexts[0].state[p], contexts[1].state[q]
            # 8-bit codes show in the weights of the next steps.
            pairs = [(key, entries[key], x) for key, x in expected.items() if x.is_floating_point()]
            for name, x, y in [("value", load(p, entries.get("low")), load(q, expected.get("low"))), *pairs]:
                error = float((x.double().cpu() - y.double().cpu()).abs().max()) / (float(y.abs().max()) or 1.0)
                if not error <= _TOLERANCE + _BF16_ULPS * (p.dtype == torch.bfloat16):
                    yield f"step {step + 1}: {name} of a parameter {list(p.shape)} {p.dtype} is off by {error:.2g}"


def _favouring(name: str, expert: int) -> Score:
    """Return a score by which a given expert of the first layer wins, and the next one in the second layer."""
    score = copy.copy(SCORES[name])
    right = score.scores

    def scores(evidence: Evidence) -> Tensor:
        found = right(evidence)
        for i in range(len(found)):
            found[i, (expert + i) % found.shape[1]] *= 1e6
        return found

    score.scores = scores  # type: ignore[method-assign]
    return score


def _small_model(signature: StepSignature) -> StepContext:
    """Return the context of two small layers and an ordinary matrix and vector, always with the same values."""
    generator, groups = torch.Generator("cpu").manual_seed(1), list[dict[str, Any]]()
    adapters = 2 * len(signature.ranks) if signature.form == "branched" else 0
    for i, (n_out, n_in) in enumerate(_SHAPES):
        own: list[tuple[int, ...]] = [(n_out, n_in), (n_out,)][: len(signature.dtypes) - adapters]
        own += [shape for r in signature.ranks for shape in ((r, n_in), (n_out, r))][:adapters]
        tags = {"module": str(i), "form": signature.form, "experts": signature.experts, "ranks": signature.ranks}
        groups.append({"params": own, **tags, "scales": (1.0,) * len(signature.ranks), "lora_seed": i, **_GROUP})
    groups.insert(0, {"params": [_SHAPES[0], _SHAPES[0][:1]], **_GROUP})
    for group in groups:
        dtypes = signature.dtypes if "module" in group else signature.dtypes[:1] * 2
        values = [0.3 * torch.randn(shape, generator=generator, dtype=torch.float32) for shape in group["params"]]
        group["params"] = [
            x.to(signature.device, dtype).requires_grad_() for x, dtype in zip(values, dtypes, strict=True)
        ]
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    settings = {"stochastic": signature.stochastic, "optim_bits": signature.optim_bits}
    context = StepContext(groups, defaultdict(dict), Ranks(), SCORES[signature.score], **settings)  # type: ignore[arg-type]
    init_state_(groups, context)
    return context
