"""A mixture of experts twice: with its matrices stacked in parameters, and as linear layers. Needs torch alone."""

import zlib

import torch
from torch import nn

from molf import MoLF
from molf.scores import EPD

N, WIDTH, HIDDEN = 5, 6, 9


class Stacks(nn.Module):
    """N experts of two matrices each; expert i takes the rows ``i`` modulo N of a batch, the last one none."""

    def __init__(self, transposed=False, n=N):
        super().__init__()
        self.is_transposed, self.n = transposed, n
        up, down = torch.randn(n, HIDDEN, WIDTH) / 3, torch.randn(n, WIDTH, HIDDEN) / 3
        self.up_proj, self.down_proj = (nn.Parameter((x.mT if transposed else x).contiguous()) for x in (up, down))
        self.up_proj_bias = nn.Parameter(torch.randn(n, HIDDEN) / 3)

    def weights(self, i):
        up, down = self.up_proj[i], self.down_proj[i]
        return (up.T, self.up_proj_bias[i], down.T) if self.is_transposed else (up, self.up_proj_bias[i], down)

    def forward(self, x):
        y = x.clone()
        for i in range(self.n - 1):
            up, bias, down = self.weights(i)
            y[..., i :: self.n, :] = nn.functional.linear(
                nn.functional.linear(x[..., i :: self.n, :], up, bias).tanh(), down
            )
        return y


class Unstacked(nn.Module):
    """The same experts as linear layers."""

    def __init__(self, stacks):
        super().__init__()
        self.n = stacks.n
        self.up_proj = nn.ModuleList(nn.Linear(WIDTH, HIDDEN) for _ in range(self.n))
        self.down_proj = nn.ModuleList(nn.Linear(HIDDEN, WIDTH, bias=False) for _ in range(self.n))
        for i in range(self.n):
            up, bias, down = stacks.weights(i)
            for p, value in (
                (self.up_proj[i].weight, up),
                (self.up_proj[i].bias, bias),
                (self.down_proj[i].weight, down),
            ):
                p.data = value.detach().clone().contiguous()

    def forward(self, x):
        y = x.clone()
        for i in range(self.n - 1):
            y[..., i :: self.n, :] = self.down_proj[i](self.up_proj[i](x[..., i :: self.n, :]).tanh())
        return y + 0 * (
            self.up_proj[-1](x[:1]).sum() + self.down_proj[-1].weight.sum()
        )  # gradients of zero, as in a stack


class Shuffled(EPD):
    """Random routing that a mixture and its twin share."""

    name = "shuffled"

    def scores(self, evidence):
        """Return a number by the twin's name and the step for every expert."""
        step = int(evidence.steps.max())
        keys = [zlib.crc32(f"{twin_name(name)} {step}".encode()) for name in evidence.modules]
        return torch.tensor([[(key >> (8 * e)) % 251 for e in range(evidence.lr.shape[1])] for key in keys]).double()


def mixture():
    """A mixture in the place of an ``mlp``: ids in, three numbers out."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Embedding(11, WIDTH), Stacks(), nn.Linear(WIDTH, 3)).double()


def pair_of(dtype=torch.float64, transposed=False, **options):
    """Return a mixture and its twin with their optimizers; the twin's LoRA experts start as the mixture's do."""
    torch.manual_seed(5)
    stacks = nn.Sequential(nn.Linear(4, WIDTH), Stacks(transposed)).to(dtype)
    twin = nn.Sequential(nn.Linear(4, WIDTH), Unstacked(stacks[1])).to(dtype)
    twin[0].load_state_dict(stacks[0].state_dict())
    options = {"ranks": (2, 3), "lr": 1e-2, "lora_lr": 2e-2, **options}
    optimizer, other = MoLF(stacks, **options), MoLF(twin, **options)
    for name in optimizer.experts:
        for expert in [key for key in optimizer.experts[name] if key != "fft"]:
            there = other.experts[twin_name(name)][expert]
            there.assign(A=optimizer.experts[name][expert].A)
            optimizer.experts[name][expert].assign(B=optimizer.experts[name][expert].B)  # both have been assigned to
    return stacks, optimizer, twin, other


def twin_name(name):
    """Return the name of a matrix in the twin: ``1.up_proj[3]`` is ``1.up_proj.3`` there."""
    return name.replace("[", ".").replace("]", "")


def backward(model, t, rows=slice(None)):
    """Leave the gradients of step t."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(t)
    x = torch.randn(15, 4, dtype=torch.float64, generator=generator).to(model[0].weight.dtype)
    model(x)[rows].square().mean().backward()


def state_of(model, optimizer):
    """Return the effective weights, biases, experts and decisions of a mixture or its twin, by the twin's names."""
    found = {}
    for name, experts in optimizer.experts.items():
        for expert in experts:
            for leaf in ("weight", "bias") if expert == "fft" else ("A", "B"):
                value = getattr(experts[expert], leaf)
                if value is not None:
                    found[f"{twin_name(name)} {expert} {leaf}"] = value.clone()
    return found
