"""Models with a plain and a fused optimizer, and how close the two have to come."""

import copy
import importlib.util

import torch
from torch import nn

from molf import MoLF

if importlib.util.find_spec("triton"):
    import faster_interpreter  # noqa: F401

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The plain step multiplies in float32; on tensor cores the kernels multiply in TF32.
TF32_TOLERANCE, TF32_CLOSE = {"rtol": 2e-3, "atol": 1e-4}, {"rtol": 5e-3, "atol": 0.0}
TOLERANCE = {"rtol": 2e-6, "atol": 2e-6} if DEVICE == "cpu" else TF32_TOLERANCE
CLOSE = {"rtol": 1e-4, "atol": 0.0} if DEVICE == "cpu" else TF32_CLOSE
"""Scores and norms."""


def quantizable(dtype=torch.float32):
    """A model for the interpreter: an ordinary and a routed matrix large enough for 8-bit moments, and a small one."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Embedding(16, 300), nn.Linear(300, 16), nn.Linear(16, 3)).to(dtype)


def twins(model, **options):
    """Return a model with a plain optimizer and a copy with a fused one, each as a pair."""
    made = []
    for m, fused in ((model.to(DEVICE), False), (copy.deepcopy(model).to(DEVICE), True)):
        torch.manual_seed(0)
        made.append((m, MoLF(m, fused=fused, **{"ranks": (2, 4), "lr": 1e-2, "lora_lr": 2e-2, **options})))
    return made


def assert_same_decision(plain, fused):
    assert fused.routing.winners() == plain.routing.winners()
    torch.testing.assert_close(fused.routing.scores.cpu(), plain.routing.scores.cpu(), **CLOSE)
    torch.testing.assert_close(fused.grad_norm.cpu().double(), plain.grad_norm.cpu().double(), **CLOSE)


def assert_alike(plain, fused, states=True):
    """Compare weights and, on request, states of two pairs; codes and low parts are compared by what they stand for."""
    (model, optimizer), (twin, other) = plain, fused
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q, p, **TOLERANCE, msg=lambda m, name=name: f"{name}: {m}")
        for key, value in optimizer.state.get(p, {}).items() if states else ():
            if value.is_floating_point():
                torch.testing.assert_close(other.state[q][key].cpu(), value.cpu(), **TOLERANCE)
