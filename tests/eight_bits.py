"""Models with 8-bit moments, and an oracle that reads the values of their codes."""

import copy

import torch

from molf import MoLF, add_lora_experts
from molf.numerics.quantization import code_values
from molf.reference import ReferenceMoLF
from small import wide

RATES = {"lr": 2e-3, "lora_lr": 4e-3}


def built(dtype=torch.float32, seed=3, **options):
    model = wide(dtype, seed)
    torch.manual_seed(seed)
    return model, MoLF(model, **{"ranks": (2, 3), "optim_bits": 8, **RATES, **options})


def dequantized(own, key):
    """Return the moment that the codes of a state stand for, by the definition."""
    codes, absmax = own[key], own[f"{key}.absmax"]
    values = code_values(key == "exp_avg", codes.device)[codes.long()]
    return values * absmax.repeat_interleave(256, 1)[:, : codes.shape[1]]


def quantized(optimizer):
    """Return the parameters whose moments are codes, with their state."""
    return {p: own for p, own in optimizer.state.items() if "exp_avg.absmax" in own}


class Oracle(ReferenceMoLF):
    """The paper in plain loops, which before every step reads the moments that an optimizer's codes stand for."""

    def of(self, p, optimizer):
        """Return the oracle's own tensor of a parameter of the optimizer's model: full-rank experts and ordinary ones."""
        for group, twin in zip(optimizer.param_groups, self.groups, strict=True):
            for i, q in enumerate(group["params"]):
                if q is p:
                    fft = self.experts.get(group.get("module"), [None])[0]
                    return fft.weights["weight"] if fft else self.ordinary[id(twin["params"][i])]
        raise AssertionError("no such parameter")

    def read_moments(self, optimizer):
        for p, own in quantized(optimizer).items():
            weight = self.of(p, optimizer)
            weight.m, weight.v = dequantized(own, "exp_avg"), dequantized(own, "exp_avg_sq")


def merged_pair(**options):
    model, optimizer = built(**options)
    twin = wide()
    torch.manual_seed(3)
    return model, optimizer, twin, Oracle(twin, ranks=(2, 3), **RATES, **options)


def branched_pair(**options):
    twin = wide()
    adapted = add_lora_experts(copy.deepcopy(twin), ranks=(2, 3), freeze_base=False, exclude_modules=())
    optimizer = MoLF(adapted, optim_bits=8, **RATES, **options)
    oracle = Oracle(twin, ranks=(2, 3), **RATES, **options)
    for name, experts in oracle.experts.items():
        for expert in experts[1:]:
            expert.weights["A"].value.copy_(optimizer.experts[name][expert.name].A)
    return adapted, optimizer, twin, oracle
