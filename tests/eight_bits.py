"""Models whose large moments are kept in 8 bits, and an oracle that is told what their codes stand for."""

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


def opened(own, key):
    """Return a moment of a state as the codes say, by the definition."""
    codes, absmax = own[key], own[f"{key}.absmax"]
    values = code_values(key == "exp_avg", codes.device)[codes.long()]
    return values * absmax.repeat_interleave(256, 1)[:, : codes.shape[1]]


def packed(optimizer):
    """Return the parameters whose moments are codes, with their state."""
    return {p: own for p, own in optimizer.state.items() if "exp_avg.absmax" in own}


class Oracle(ReferenceMoLF):
    """The paper in plain loops, which before every step is told the moments that an optimizer's codes stand for."""

    def of(self, p, optimizer):
        """Return the oracle's own tensor of a parameter of the optimizer's model: full-rank experts and ordinary ones."""
        for group, twin in zip(optimizer.param_groups, self.groups, strict=True):
            for i, q in enumerate(group["params"]):
                if q is p:
                    fft = self.experts.get(group.get("module"), [None])[0]
                    return fft.weights["weight"] if fft else self.ordinary[id(twin["params"][i])]
        raise AssertionError("no such parameter")

    def hear(self, optimizer):
        for p, own in packed(optimizer).items():
            weight = self.of(p, optimizer)
            weight.m, weight.v = opened(own, "exp_avg"), opened(own, "exp_avg_sq")


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
