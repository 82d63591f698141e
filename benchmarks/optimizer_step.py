"""Time of the optimizer step alone: MoLF with FFT winning everywhere and with LoRA winning everywhere, against fused AdamW.

    python benchmarks/optimizer_step.py [--shape smollm2-135m] [--rank 128] [--optim_bits 8] [--rounds 9] [--json]

Gradients stay as they are between steps; the contenders take turns on models of the same shape.
"""

import argparse
import json

import torch

from models import SHAPES, random_model
from molf import MoLF
from molf.scores import EPD
from timing import machine, ratio, take_turns


class Always(EPD):
    """EPD at its full cost, with a fixed outcome."""

    def __init__(self, winner):
        self.winner = winner

    def finish(self, total, n, lr):
        return torch.arange(total.shape[1]).eq(self.winner).double() + 0 * super().finish(total, n, lr)


def with_gradients(shape):
    model = random_model(shape)
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 1e-3
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="smollm2-135m", choices=SHAPES)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--optim_bits", type=int, default=32, help="of MoLF's moments")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="make the last line a JSON object")
    args = parser.parse_args()

    model, options = with_gradients(args.shape), {"ranks": (args.rank,), "lr": 1e-5, "optim_bits": args.optim_bits}
    optimizers = {
        "adamw_fused": torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True),
        "fft_wins": MoLF(with_gradients(args.shape), score=Always(0), **options),
        "lora_wins": MoLF(with_gradients(args.shape), score=Always(1), **options),
    }
    seconds = take_turns({name: optimizer.step for name, optimizer in optimizers.items()}, args.rounds, warmup=2)
    routed = optimizers["fft_wins"].experts
    lora = sum(pair.A.numel() + pair.B.numel() for m in routed for pair in [routed[m][f"lora_r{args.rank}"]])
    print(
        f"{args.shape}, r = {args.rank}: {model.num_parameters() / 1e6:.0f}M parameters, {lora / 1e6:.0f}M in LoRA pairs"
    )
    print(f"{machine()}, {args.rounds} rounds, optimizer step against torch.optim.AdamW(fused=True):")
    ratios = {name: ratio(seconds[name], seconds["adamw_fused"]) for name in ("fft_wins", "lora_wins")}
    for name, (middle, least, most) in ratios.items():
        print(f"  {name:10} x{middle:.2f}  ({least:.2f} to {most:.2f})")
    if args.json:
        print(json.dumps({name: middle for name, (middle, _, _) in ratios.items()}))


if __name__ == "__main__":
    main()
