"""Kinds of steps, made of small optimizers."""

import torch
from torch import nn

from fused import DEVICE
from molf import MoLF, add_lora_experts
from molf.kernels.kinds import kind_of
from small import mlp, tiny_llama


def kind(dtype=torch.float32, make=mlp, bf16_update="split", optim_bits=32, score="epd", **options):
    model = make(dtype).to(DEVICE)
    optimizer = MoLF(model, bf16_update=bf16_update, score=score, **{"ranks": (2,), **options})
    return kind_of(optimizer.param_groups, score, bf16_update == "split", optim_bits)


def even(dtype=torch.float32):
    """Layers without odd sizes, of which the trial has one pair of layers fewer."""
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16)).to(dtype)


def branched(dtype=torch.float32):
    """Adapters of two ranks beside a base that trains."""
    return add_lora_experts(tiny_llama(dtype), ranks=(2, 4), freeze_base=False)
