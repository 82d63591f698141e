"""Overhead per layer: the step of a model of many small layers, where arithmetic takes next to no time.

    python benchmarks/many_layers.py [--layers 2000] [--size 32] [--rank 8] [--rounds 5] [--json]

Gradients stay as they are between steps. The contenders take turns on models of the same shape: a loop of AdamW over the
parameters (`foreach=False`), MoLF, and MoLF one layer at a time, as it takes large layers on a CPU.
"""

import argparse
import json
from unittest import mock

import torch
from torch import nn

from molf import MoLF
from timing import machine, ratio, take_turns


def with_gradients(layers, size):
    model = nn.Sequential(*(nn.Linear(size, size) for _ in range(layers)))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2000)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="make the last line a JSON object")
    args = parser.parse_args()

    torch.set_num_threads(1)
    adamw = torch.optim.AdamW(with_gradients(args.layers, args.size).parameters(), foreach=False)
    molf, alone = (MoLF(with_gradients(args.layers, args.size), ranks=(args.rank,), fused=False) for _ in range(2))

    def one_by_one():
        with mock.patch("molf.optimizer.torch_step._CPU_CHUNK", 0):
            alone.step()

    contenders = {"adamw": adamw.step, "molf": molf.step, "one_by_one": one_by_one}
    seconds = take_turns(contenders, args.rounds, warmup=2)
    print(f"{args.layers} layers of {args.size} x {args.size}, r = {args.rank}; {machine()}, {args.rounds} rounds")
    pairs = [("molf", "adamw"), ("one_by_one", "adamw"), ("molf", "one_by_one")]
    ratios = {f"{one}/{other}": ratio(seconds[one], seconds[other]) for one, other in pairs}
    for name, (middle, least, most) in ratios.items():
        print(f"  {name:16} x{middle:.2f}  ({least:.2f} to {most:.2f})")
    if args.json:
        print(json.dumps({name: middle for name, (middle, _, _) in ratios.items()}))


if __name__ == "__main__":
    main()
