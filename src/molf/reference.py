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

from molf.errors import MolfError
from molf.setup.param_groups import param_groups

__all__ = ["ReferenceMoLF"]

_SCORES = ("epd", "pfn", "descent", "coherence")


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


@dataclass
class Layer:
    """A routed layer, or the matrix ``row`` of a stack, and where its weight ``[out, in]`` and its bias are."""

    name: str
    group: dict[str, Any]
    row: int | None = None

    def values(self) -> list[Tensor]:
        """Return views of the weight and of the bias, if there is one."""
        return self._own([p.data for p in self.group["params"]])

    def gradients(self) -> list[Tensor]:
        """Return views of their gradients."""
        return self._own([p.grad for p in self.group["params"]])

    def _own(self, tensors: list[Any]) -> list[Tensor]:
        if self.row is None:
            return tensors
        weight, *bias = (x[self.row] for x in tensors)
        return [weight.T if self.group["transposed"] else weight, *bias]


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
        if score not in _SCORES:
            raise MolfError(f"score={score!r}: the reference knows {', '.join(_SCORES)}")
        self.groups = param_groups(model, **grouping)
        self.top_k, self.score, self.betas, self.eps, self.t = top_k, score, betas, eps, 0
        self.layers = [layer for g in self.groups if "module" in g for layer in _layers(g)]
        self.experts = {layer.name: _experts(layer) for layer in self.layers}
        self.ordinary = {
            id(p): Weight(p.data, g["weight_decay"]) for g in self.groups if "module" not in g for p in g["params"]
        }
        self.winners: dict[str, list[str]] = {}
        self.scores: dict[str, dict[str, float]] = {}

    @torch.no_grad()
    def step(self) -> None:
        """Take one step from the gradients on the model's parameters."""
        self.t += 1
        for layer in self.layers:
            self._step_layer(layer)
        for group in self.groups:
            if "module" not in group:
                for p in group["params"]:
                    weight = self.ordinary[id(p)]
                    self._observe(weight, p.grad)
                    self._adamw(weight, group["lr"])

    def _step_layer(self, layer: Layer) -> None:
        name, experts, group = layer.name, self.experts[layer.name], layer.group
        G, *bias = layer.gradients()
        for expert in experts:
            if expert.name == "fft":
                self._observe(expert.weights["weight"], G)
                if bias:
                    self._observe(expert.weights["bias"], bias[0])
            else:
                A, B = expert.weights["A"], expert.weights["B"]
                dA, dB = expert.scale * B.value.T @ G, expert.scale * G @ A.value.T
                self._observe(A, dA)
                self._observe(B, dB)
        lr = group["lr"] or group.get("initial_lr") or 1.0  # at a rate of 0 all would promise 0, and nothing moves
        self.scores[name] = {e.name: self._score(e, lr * e.lr_ratio) for e in experts}
        best = sorted(experts, key=lambda e: -self.scores[name][e.name])[: self.top_k]  # sorted() keeps ties in order
        self.winners[name] = [e.name for e in best]
        for expert in best:
            for tensor in expert.weights.values():
                self._adamw(tensor, group["lr"] * expert.lr_ratio)
        layer.values()[0].copy_(_effective(experts))

    def _observe(self, w: Weight, g: Tensor) -> None:
        b1, b2 = self.betas
        w.m = w.m + (1 - b1) * (g - w.m)
        w.v = b2 * w.v + (1 - b2) * g * g

    def _score(self, expert: Expert, lr: float) -> float:
        tensors = expert.weights.values()
        n = sum(w.value.numel() for w in tensors)
        match self.score:
            case "epd":
                return lr / n * self._descent(expert)
            case "descent":
                return lr * self._descent(expert)
            case "coherence":
                spread = sum(float(w.v.sqrt().sum()) for w in tensors)
                return self._descent(expert) / spread if spread else 0.0
            case _:
                return math.sqrt(sum(float(((w.m / (w.v.sqrt() + self.eps)) ** 2).sum()) for w in tensors) / n)

    def _descent(self, expert: Expert) -> float:
        return sum(float((w.m**2 / (w.v.sqrt() + self.eps)).sum()) for w in expert.weights.values())

    def _adamw(self, w: Weight, lr: float) -> None:
        b1, b2 = self.betas
        m_hat, v_hat = w.m / (1 - b1**self.t), w.v / (1 - b2**self.t)
        w.value.copy_((1 - lr * w.decay) * w.value - lr * m_hat / (v_hat.sqrt() + self.eps))


def _layers(group: dict[str, Any]) -> list[Layer]:
    if group["form"] == "merged":
        return [Layer(group["module"], group)]
    return [Layer(f"{group['module']}[{i}]", group, i) for i in range(len(group["params"][0]))]


def _experts(layer: Layer) -> list[Expert]:
    group, (weight, *bias) = layer.group, layer.values()
    fft = {"weight": Weight(weight.clone(), group["weight_decay"])}
    if bias:
        fft["bias"] = Weight(bias[0], 0.0)
    experts = [Expert("fft", fft)]
    generator = torch.Generator().manual_seed(group["lora_seed"])
    for r, scale in zip(group["ranks"], group["scales"], strict=True):
        bound = 1 / math.sqrt(weight.shape[1])  # Kaiming-uniform with a = sqrt(5)
        shape = (r, weight.shape[1]) if layer.row is None else (len(group["params"][0]), r, weight.shape[1])
        A = torch.empty(shape).uniform_(-bound, bound, generator=generator).to(weight)
        A = A if layer.row is None else A[layer.row]
        B = torch.zeros(weight.shape[0], r).to(weight)
        pair = {"A": Weight(A, group["lora_weight_decay"]), "B": Weight(B, group["lora_weight_decay"])}
        experts.append(Expert(f"lora_r{r}", pair, group["lora_lr_ratio"], scale))
    return experts


def _effective(experts: list[Expert]) -> Tensor:
    total = experts[0].weights["weight"].value.clone()
    for e in experts[1:]:
        total += e.scale * e.weights["B"].value @ e.weights["A"].value
    return total
