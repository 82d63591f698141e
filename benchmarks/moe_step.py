"""The step of a mixture of experts: MoLF against plain AdamW on the same stacked matrices, for growing numbers of experts.

    python benchmarks/moe_step.py [--experts 8 32 128] [--layers 2] [--width 256] [--inner 128] [--rank 8] [--rounds 5] [--json]

Gradients stay as they are between steps. "same size" keeps the number of parameters and makes the experts smaller; "same
experts" keeps their size, so that parameters grow with their number. AdamW is PyTorch's fused one. For each, the ratio to AdamW
in the same round, the same for MoLF on these matrices as separate linear layers, and MoLF's nanoseconds a parameter.
"""

import argparse
import json

import torch
from torch import nn

from molf import MoLF
from timing import machine, ratio, take_turns


class Experts(nn.Module):
    """The matrices of n gated experts, as transformers stacks them: ``[n, out, in]``."""

    is_transposed = False

    def __init__(self, n, width, inner, device):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(n, 2 * inner, width, device=device) / 16)
        self.down_proj = nn.Parameter(torch.randn(n, width, inner, device=device) / 16)


def mixture(layers, n, width, inner, device):
    model = nn.ModuleList(Experts(n, width, inner, device) for _ in range(layers))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return model


def unstacked(layers, n, width, inner, device):
    """Return the same matrices as linear layers."""
    shapes = [(2 * inner, width), (width, inner)] * (layers * n)
    model = nn.ModuleList(nn.Linear(n_in, n_out, bias=False, device=device) for n_out, n_in in shapes)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return model


def compare(args, n, inner, device):
    """Return the ratio with its range, that of separate linear layers, and nanoseconds a parameter."""
    shape = (args.layers, n, args.width, inner, device)
    adamw = torch.optim.AdamW(mixture(*shape).parameters(), fused=True)
    molf, linear = (MoLF(model, ranks=(args.rank,), score="random") for model in (mixture(*shape), unstacked(*shape)))
    seconds = take_turns({"adamw": adamw.step, "molf": molf.step, "linear": linear.step}, args.rounds, warmup=2)
    elements = args.layers * n * 3 * args.width * inner
    return *(ratio(seconds[name], seconds["adamw"]) for name in ("molf", "linear")), min(
        seconds["molf"]
    ) / elements * 1e9


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--inner", type=int, default=128, help="width of an expert where there are fewest of them")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="make the last line a JSON object")
    args = parser.parse_args()

    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{args.layers} layers of width {args.width}, r = {args.rank}; {machine()}, {args.rounds} rounds")
    report = {}
    for n in args.experts:
        for case, inner in (("same experts", args.inner), ("same size", args.inner * min(args.experts) // n)):
            (middle, least, most), (linear, *_), cost = compare(args, n, max(1, inner), device)
            report[f"{case}, {n}"] = [middle, linear, cost]
            stacks = f"x{middle:.2f} ({least:.2f} to {most:.2f}), x{linear:.2f} as linear layers"
            print(f"  {case:13} {n:4} experts of {inner:4}: {stacks}, {cost:.1f} ns a parameter")
    if args.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
