"""Small models and training loops that several tests of the core share. Light to import, for processes that need torch alone."""

import copy

import torch
from torch import nn

from molf import MoLF
from molf.scores import EPD, Score


def mlp(dtype=torch.float64, seed=3):
    """Embedding, three linear layers (the middle one without bias), a norm; odd sizes."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Embedding(11, 7),
        nn.Linear(7, 13),
        nn.Tanh(),
        nn.LayerNorm(13),
        nn.Linear(13, 5, bias=False),
        nn.Linear(5, 3),
    ).to(dtype)


def wide(dtype=torch.float32, seed=3):
    """An ``mlp`` with matrices of many sizes: rows longer and shorter than 256 elements, and a last one that is small."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Embedding(16, 300),
        nn.Linear(300, 41),
        nn.Tanh(),
        nn.LayerNorm(41),
        nn.Linear(41, 257, bias=False),
        nn.Linear(257, 3),
    ).to(dtype)


def tiny_llama(dtype=torch.float32, seed=3, **config):
    """A random Llama of two layers with tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, "tie_word_embeddings": True, **config})).to(dtype)


def loss_of(model, t):
    """The loss of an ``mlp`` on the batch of step ``t``."""
    generator = torch.Generator().manual_seed(100 + t)
    ids = torch.randint(0, 11, (4, 6), generator=generator)
    target = torch.randn(4, 6, 3, generator=generator).to(next(model.parameters()))
    return (model(ids.to(target.device)) - target).square().mean()


def train(model, optimizer, steps, scheduler=None):
    """Take the steps ``steps`` (a range or a number) and return the winners of each."""
    winners = []
    for t in range(steps) if isinstance(steps, int) else steps:
        optimizer.zero_grad()
        loss_of(model, t).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        winners.append(optimizer.routing.winners() if getattr(optimizer, "routing", None) else None)
    return winners


def snapshot(model, optimizer):
    """Copy every tensor and count that a step may change."""
    weights = {f"model.{name}": p.detach().clone() for name, p in model.named_parameters()}
    state = copy.deepcopy(optimizer.state_dict()["state"])
    return weights | {f"state.{key}.{name}": value for key, own in state.items() for name, value in own.items()}


def differing(before, after):
    """Names whose tensors are not bit for bit the same (or not of the same dtype)."""
    assert before.keys() == after.keys()
    return {k for k, v in before.items() if v.dtype != after[k].dtype or not torch.equal(v, after[k])}


def assert_same_bits(model, optimizer, twin, other):
    """Compare every tensor and count of two models and their optimizers."""
    apart = differing(snapshot(model, optimizer), snapshot(twin, other))
    assert not apart, f"not the same bits: {sorted(apart)}"


def routed_mlp(dtype=torch.float64, **options):
    """An ``mlp`` and its optimizer, with LoRA experts of two ranks that always start alike."""
    model = mlp(dtype)
    torch.manual_seed(1)
    return model, MoLF(model, **{"ranks": (2, 3), "lr": 1e-2, "lora_lr": 2e-2, **options})


def zero_gradients(model):
    for p in model.parameters():
        p.grad = torch.zeros_like(p)


class ExplicitLinear(nn.Module):
    """A layer in which every expert is a real parameter: ``x (W + sum_i s_i B_i A_i)^T + b``."""

    def __init__(self, weight, bias, pairs):
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.bias = None if bias is None else nn.Parameter(bias.clone())
        self.A = nn.ParameterList(pair.A.clone() for pair in pairs)
        self.B = nn.ParameterList(pair.B.clone() for pair in pairs)
        self.scales = [pair.scale for pair in pairs]

    def forward(self, x):
        weight = self.weight
        for A, B, scale in zip(self.A, self.B, self.scales, strict=True):
            weight = weight + scale * (B @ A)
        return nn.functional.linear(x, weight, self.bias)


def explicit_twin(model, optimizer):
    """Copy an ``mlp`` with all experts of its optimizer as explicit parameters."""
    twin = copy.deepcopy(model)
    for name, experts in optimizer.experts.items():
        fft, *pairs = experts.values()
        twin[int(name)] = ExplicitLinear(fft.weight, fft.bias, pairs)
    return twin


def explicit_adamw(twin, lr, lora_lr, weight_decay=0.1, lora_weight_decay=0.01, **options):
    """torch's AdamW on an explicit twin with the rates of each expert."""
    named = list(twin.named_parameters())
    lora = [p for name, p in named if ".A." in name or ".B." in name]
    rest = [p for _, p in named if all(p is not q for q in lora)]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "lr": lr, "weight_decay": 0.0},
        {"params": lora, "lr": lora_lr, "weight_decay": lora_weight_decay},
    ]
    return torch.optim.AdamW(groups, **options)


def assert_equals_twin(model, optimizer, twin, atol):
    """Compare all experts and ordinary parameters with those of an explicit twin."""
    for name, experts in optimizer.experts.items():
        explicit = twin[int(name)]
        fft, *pairs = experts.values()
        torch.testing.assert_close(fft.weight, explicit.weight.detach(), rtol=0, atol=atol)
        if fft.bias is not None:
            torch.testing.assert_close(fft.bias, explicit.bias.detach(), rtol=0, atol=atol)
        for i, pair in enumerate(pairs):
            torch.testing.assert_close(pair.A, explicit.A[i].detach(), rtol=0, atol=atol)
            torch.testing.assert_close(pair.B, explicit.B[i].detach(), rtol=0, atol=atol)
    plain = dict(twin.named_parameters())
    for name, p in model.named_parameters():
        if name.split(".")[0] not in optimizer.experts:
            torch.testing.assert_close(p, plain[name], rtol=0, atol=atol)


class AllAlike(EPD):
    """A score by which all experts of a layer are tied."""

    name = "all_alike"

    def finish(self, total, n, lr):
        return torch.ones_like(total)


class Prefer(Score):
    """A score that lets the expert of one column win every layer."""

    name = "prefer"

    def __init__(self, column):
        self.column = column

    def term(self, m, v, eps):
        return m * 0

    def finish(self, total, n, lr):
        total[:, self.column] += 1
        return total
