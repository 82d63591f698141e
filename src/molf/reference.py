"""The paper in plain loops: slow on purpose, the oracle for every fast path.

Every expert's tensors exist (``W`` too), every formula stands where it is used, and nothing but the grouping of parameters is
shared with the fast path.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from molf.setup.param_groups import param_groups

__all__ = ["ReferenceMoLF"]


@dataclass
class Weight:
    """One trainable tensor of an expert with its moments, and whether it is decayed."""

    value: Tensor
    decay: float
    grad: Tensor | None = None
    m: Tensor = field(init=False)
    v: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.m, self.v = torch.zeros_like(self.value), torch.zeros_like(self.value)


@dataclass
class Expert:
    """An expert: its tensors and the ratio of its learning rate to the group's."""

    name: str
    weights: dict[str, Weight]
    lr_ratio: float = 1.0
    scale: float = 1.0


class ReferenceMoLF:
    """MoLF on a plain model, one expert, one tensor, one formula at a time.

    Takes the arguments of ``molf.MoLF`` that concern routing and AdamW; float32 and float64 weights only. ``winners``
    holds the last step's decision, ``{module: [expert, ...]}`` with the best score first, and ``scores`` the scores.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        top_k: int = 1,
        score: str = "epd",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        **grouping: Any,
    ):
        self.groups = param_groups(model, **grouping)
        self.top_k, self.score, self.betas, self.eps, self.t = top_k, score, betas, eps, 0
        self.experts = {g["module"]: _experts(g) for g in self.groups if "module" in g}
        self.ordinary = {
            id(p): Weight(p.data, g["weight_decay"]) for g in self.groups if "module" not in g for p in g["params"]
        }
        self.winners: dict[str, list[str]] = {}
        self.scores: dict[str, dict[str, float]] = {}

    @torch.no_grad()
    def step(self) -> None:
        """Take one step from the gradients on the model's parameters."""
        self.t += 1
        for group in self.groups:
            if "module" in group:
                self._step_layer(group)
            else:
                for p in group["params"]:
                    weight = self.ordinary[id(p)]
                    self._observe(weight, p.grad)
                    self._adamw(weight, group["lr"])

    def _step_layer(self, group: dict[str, Any]) -> None:
        name, experts = group["module"], self.experts[group["module"]]
        weight, *bias = group["params"]
        G = weight.grad
        for expert in experts:
            if expert.name == "fft":
                self._observe(expert.weights["weight"], G)
                if bias:
                    self._observe(expert.weights["bias"], bias[0].grad)
            else:
                A, B = expert.weights["A"], expert.weights["B"]
                dA, dB = expert.scale * B.value.T @ G, expert.scale * G @ A.value.T
                self._observe(A, dA)
                self._observe(B, dB)
        self.scores[name] = {e.name: self._score(e, group["lr"] * e.lr_ratio) for e in experts}
        best = sorted(experts, key=lambda e: -self.scores[name][e.name])[: self.top_k]  # sorted() keeps ties in order
        self.winners[name] = [e.name for e in best]
        for expert in best:
            for tensor in expert.weights.values():
                self._adamw(tensor, group["lr"] * expert.lr_ratio)
        weight.copy_(_effective(experts))

    def _observe(self, w: Weight, g: Tensor) -> None:
        b1, b2 = self.betas
        w.m = w.m + (1 - b1) * (g - w.m)
        w.v = b2 * w.v + (1 - b2) * g * g

    def _score(self, expert: Expert, lr: float) -> float:
        tensors = expert.weights.values()
        n = sum(w.value.numel() for w in tensors)
        if self.score in ("epd", "descent"):
            return lr / (n if self.score == "epd" else 1) * self._descent(expert)
        return math.sqrt(sum(float(((w.m / (w.v.sqrt() + self.eps)) ** 2).sum()) for w in tensors) / n)

    def _descent(self, expert: Expert) -> float:
        return sum(float((w.m**2 / (w.v.sqrt() + self.eps)).sum()) for w in expert.weights.values())

    def _adamw(self, w: Weight, lr: float) -> None:
        b1, b2 = self.betas
        m_hat, v_hat = w.m / (1 - b1**self.t), w.v / (1 - b2**self.t)
        w.value.copy_((1 - lr * w.decay) * w.value - lr * m_hat / (v_hat.sqrt() + self.eps))


def _experts(group: dict[str, Any]) -> list[Expert]:
    weight, *bias = (p.data for p in group["params"])
    fft = {"weight": Weight(weight.clone(), group["weight_decay"])}
    if bias:
        fft["bias"] = Weight(bias[0], 0.0)
    experts = [Expert("fft", fft)]
    generator = torch.Generator().manual_seed(group["lora_seed"])
    for r, scale in zip(group["ranks"], group["scales"], strict=True):
        bound = 1 / math.sqrt(weight.shape[1])  # Kaiming-uniform with a = sqrt(5)
        A = torch.empty(r, weight.shape[1]).uniform_(-bound, bound, generator=generator).to(weight)
        B = torch.zeros(weight.shape[0], r).to(weight)
        pair = {"A": Weight(A, group["lora_weight_decay"]), "B": Weight(B, group["lora_weight_decay"])}
        experts.append(Expert(f"lora_r{r}", pair, group["lora_lr_ratio"], scale))
    return experts


def _effective(experts: list[Expert]) -> Tensor:
    total = experts[0].weights["weight"].value.clone()
    for e in experts[1:]:
        total += e.scale * e.weights["B"].value @ e.weights["A"].value
    return total
