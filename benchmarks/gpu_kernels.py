"""Part (a) of the GPU programme: the fused step against the oracle over shapes, dtypes, odd sizes, empty and frozen cases."""

import contextlib
import copy
import functools
import itertools

import torch
from torch import nn

from emulated_tf32 import EmulatedTF32
from gpu_report import device
from molf import MoLF
from molf.numerics.bf16 import load
from molf.reference import ReferenceMoLF

# Ranks, and [out, in] of the layers of one model: single rows and columns, odd sizes, sizes around blocks, and large ones.
MODELS = {
    "single": ((1,), [(1, 1), (1, 37), (53, 1)]),
    "odd": ((2, 5), [(7, 13), (17, 129)]),
    "around blocks": ((2, 16), [(64, 64), (63, 65), (128, 256), (129, 257)]),
    "large": ((16, 128), [(1000, 513), (576, 1536)]),
    "aligned": ((8, 16), [(64, 48), (48, 128)]),  # as all of large models is: read several elements at once
}
# With a small eps, the first step of an element of B whose gradient is all but 0 would be the sign of a rounding error.
RATES = {"lr": 1e-2, "lora_lr": 2e-2, "eps": 0.5}
# With TF32 products a step's moments are good to about 1e-3; Adam turns that into that share of the way.
TOLERANCE = {"cuda": 5e-3, "cpu": 1e-4}
# In shares of a weight: stochastic rounding goes to one of the two neighbours in bf16, which has 8 bits, at each step.
BF16 = 2.0**-7
STEPS = 3
QUICK = ("a frozen layer", "single, bfloat16, epd, K = 1")


class Layers(nn.Module):
    """Linear layers side by side, an ordinary matrix that 8-bit moments fit, a vector, and a parameter without elements."""

    def __init__(self, shapes, bias):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(columns, rows, bias=bias) for rows, columns in shapes)
        self.table, self.scale = nn.Parameter(torch.randn(16, 272)), nn.Parameter(torch.ones(9))
        self.nothing = nn.Parameter(torch.empty(0))


def model_of(name, bias, dtype, frozen=False):
    torch.manual_seed(0)
    model = Layers(MODELS[name][1], bias).to(device(), dtype)
    if frozen:
        model.layers[-1].requires_grad_(False)
    return model


def give_gradients(models, t, missing):
    """Give all models the same gradients; without ``missing``, all parameters have some."""
    generator = torch.Generator().manual_seed(t)
    for parameters in zip(*(model.parameters() for model in models), strict=True):
        grad = (torch.randn(parameters[0].shape, generator=generator) * 10 ** (t - 2)).to(parameters[0].dtype)
        for p in parameters:
            p.grad = grad.to(p.device, p.dtype, copy=True) if p.requires_grad else None  # a step may scale it in place
    if missing and t == 1:
        for model in models:
            model.layers[0].weight.grad = None


def weights(model, optimizer=None):
    """Return all weights on the host in float64, bf16 ones with their low parts."""
    low = {p: own.get("low") for p, own in optimizer.state.items()} if optimizer is not None else {}
    return [load(p.detach(), low.get(p)).double().cpu() for p in model.parameters() if p.numel()]


def furthest(some, others, start):
    """Return the greatest difference of any weight, as a share of how far the weights of its tensor moved."""
    least = 1e-2 * RATES["lr"]  # what hardly moved has to hardly move
    moved = (max(float((q - before).abs().max()), least) for q, before in zip(others, start, strict=True))
    return max(float((p - q).abs().max()) / far for p, q, far in zip(some, others, moved, strict=True))


def against_oracle(name, dtype, bias, options, frozen=False, fused=True):
    """Return how far a step, by default the fused one, is from the plain loops in float64, in shares of the way."""
    model = model_of(name, bias, dtype, frozen)
    exclude = (f"layers.{len(model.layers) - 1}",) if frozen else ()
    plain, start = copy.deepcopy(model).to("cpu", torch.float64), weights(model)
    settings = {"ranks": MODELS[name][0], "exclude_modules": exclude, **RATES}
    torch.manual_seed(1)
    optimizer = MoLF(model, fused=fused, **settings, **options)
    torch.manual_seed(1)
    oracle = ReferenceMoLF(plain, **settings, **options)
    for t in range(STEPS):
        give_gradients((model, plain), t, missing=False)
        optimizer.step()
        oracle.step()
        _same_winners(optimizer, oracle)
    return furthest(weights(model, optimizer), weights(plain), start)


def _same_winners(optimizer, oracle):
    for module, winners in optimizer.routing.winners().items():
        first, second = sorted(oracle.scores[module].values(), reverse=True)[:2]
        if first - second > 1e-2 * abs(first) and winners[0] != oracle.winners[module][0]:
            raise RuntimeError(f"{module}: the kernels chose {winners}, the oracle {oracle.winners[module]}")


def against_plain(name, dtype, bias, options):
    """Return how far the fused step is from the step by PyTorch's kernels, which is tested against the oracle."""
    model = model_of(name, bias, dtype)
    other, start = copy.deepcopy(model), weights(model)
    made = []
    for one, fused in ((model, True), (other, False)):
        torch.manual_seed(1)
        made.append(MoLF(one, ranks=MODELS[name][0], exclude_modules=(), fused=fused, **RATES, **options))
    for t in range(STEPS):
        give_gradients((model, other), t, missing=True)
        for optimizer in made:
            optimizer.step()
    return furthest(weights(model, made[0]), weights(other, made[1]), start)


def stochastic(name, **options):
    """Return how much further than one rounding a step a weight is from that of exact steps, in steps."""
    ends = []
    for how in ("stochastic", "split"):
        model = model_of(name, True, torch.bfloat16)
        torch.manual_seed(1)
        optimizer = MoLF(
            model, ranks=MODELS[name][0], exclude_modules=(), fused=True, bf16_update=how, **RATES, **options
        )
        give_gradients((model,), 0, missing=False)
        optimizer.step()
        ends.append(weights(model, optimizer))
    beyond = ((p - q).abs() - BF16 * q.abs() for p, q in zip(*ends, strict=True))
    return max(0.0, max(float(x.max()) for x in beyond)) / RATES["lora_lr"]


def measure(report, quick=False):
    """Compare all cases, or two small ones in a quick run; on a CPU with the error of TF32 and a GPU's tolerance."""
    found = cases()
    emulated = contextlib.nullcontext() if device().type == "cuda" else EmulatedTF32()
    for case in QUICK if quick else found:
        difference = found[case]

        def work(case=case, difference=difference):
            report.add("kernels", case, difference(), "of the way", TOLERANCE["cuda"])

        with emulated:
            report.attempt("kernels", case, work)


def cases():
    """Return what is compared, by name."""
    found = {
        "a frozen layer": lambda: against_oracle("odd", torch.float32, False, {}, frozen=True),
        "a layer without a gradient": lambda: against_plain("odd", torch.float32, True, {}),
        "clipped": lambda: against_plain("around blocks", torch.float32, True, {"max_grad_norm": 0.1}),
        "8-bit states": lambda: against_plain("around blocks", torch.float32, True, {"optim_bits": 8}),
        "8-bit states, bf16": lambda: against_plain("around blocks", torch.bfloat16, True, {"optim_bits": 8}),
        "stochastic rounding": lambda: stochastic("aligned"),
        "stochastic rounding, odd": lambda: stochastic("odd"),
        "stochastic rounding, 8-bit states": lambda: stochastic("aligned", optim_bits=8),
        "PyTorch's kernels": lambda: against_oracle("aligned", torch.float32, True, {}, fused=False),
    }
    for dtype in (torch.float32, torch.bfloat16):  # the oracle has no coherence
        case = f"aligned, {str(dtype).removeprefix('torch.')}, coherence"
        found[case] = functools.partial(against_plain, "aligned", dtype, True, {"score": "coherence"})
    for dtype, score in itertools.product((torch.float32, torch.bfloat16), ("epd", "pfn", "coherence")):
        options = {"optim_bits": 8, "score": score}
        case = f"8-bit states, aligned, {str(dtype).removeprefix('torch.')}, {score}"
        found[case] = functools.partial(against_plain, "aligned", dtype, True, options)
    for dtype, name, (score, top_k), bias in itertools.product(
        (torch.float32, torch.bfloat16), MODELS, (("epd", 1), ("pfn", 2)), (False, True)
    ):
        case = f"{name}, {str(dtype).removeprefix('torch.')}, {score}, K = {top_k}{', biases' * bias}"
        found[case] = functools.partial(against_oracle, name, dtype, bias, {"score": score, "top_k": top_k})
    return found
