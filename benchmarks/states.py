"""Moments in 8 bits against float32: losses of the same runs, bytes of the state, and what rounding does to real moments.

    python benchmarks/states.py [--model bundled:smollm2-135m] [--steps 12] [--seeds 3] [--json]

Trains on 24 records of Fact, eight a step, with every seed (order of the records, start of the LoRA experts) once with 32 bits
and once with 8, and prints the loss over all 24 as training goes on. The difference between the two is to be read beside that
between seeds. Then the moments of the last run with 32 bits are rounded, in blocks along the rows and in flat blocks that go on
over the ends of rows. About five minutes on one CPU core.
"""

import argparse
import json
import statistics

import torch

from molf import MoLF
from molf.numerics.quantization import BLOCK, block_count, dequantize, is_quantizable, nearest_code, quantize_
from molf.study.config.run_config import ModelConfig
from molf.study.run.models import load_model_and_tokenizer
from molf.tasks.fact import Fact

RECORDS, BATCH, CHECKS = 24, 8, 3


def examples(tokenizer):
    """Tokenise the records; the loss is on the answers alone."""
    task = Fact()
    pairs = [task.example(row) for row in task.load(sample=True, limit=RECORDS).train]
    prompts = [tokenizer(pair["prompt"]).input_ids for pair in pairs]
    wholes = [tokenizer(pair["prompt"] + pair["completion"]).input_ids for pair in pairs]
    return [(whole, [-100] * len(prompt) + whole[len(prompt) :]) for prompt, whole in zip(prompts, wholes, strict=True)]


def loss_of(model, rows):
    length = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [-100] * (length - len(labels)) for _, labels in rows])
    return model(input_ids=ids, attention_mask=(torch.arange(length) < lengths(rows)).long(), labels=labels).loss


def lengths(rows):
    return torch.tensor([[len(ids)] for ids, _ in rows])


def train(args, bits, seed):
    """Return losses over all records by step, and the optimizer."""
    model, tokenizer = load_model_and_tokenizer(ModelConfig(args.model))
    rows, losses = examples(tokenizer), {}
    torch.manual_seed(seed)
    optimizer = MoLF(model, ranks=(args.rank,), lr=1e-4, lora_lr=1e-4, max_grad_norm=1.0, optim_bits=bits)
    order = [int(i) for _ in range(args.steps) for i in torch.randperm(RECORDS)]
    checks = {round(args.steps * i / CHECKS) for i in range(CHECKS + 1)}
    for step in range(args.steps + 1):
        if step in checks:
            with torch.no_grad():
                losses[step] = loss_of(model, rows).item()
        if step < args.steps:
            optimizer.zero_grad()
            loss_of(model, [rows[i] for i in order[BATCH * step : BATCH * (step + 1)]]).backward()
            optimizer.step()
    return losses, optimizer


def bytes_of(optimizer):
    return sum(x.numel() * x.element_size() for own in optimizer.state.values() for x in own.values())


def error(x, signed):
    """Return the size of the rounding error of a matrix, squared."""
    codes, absmax = torch.zeros(x.shape, dtype=torch.uint8), torch.zeros(len(x), block_count(x.shape[1]))
    quantize_(x.clone(), codes, absmax, signed)
    return (dequantize(codes, absmax, signed) - x).double().square().sum().item()


def rounding(optimizer):
    """Return relative rounding errors of all large matrices' moments, and how many second moments nearest would make 0."""
    matrices = [own for p, own in optimizer.state.items() if is_quantizable(p) and p.numel() % BLOCK == 0]
    report = {}
    for key, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        moments = [own[key] for own in matrices]
        size = sum(x.double().square().sum().item() for x in moments)
        report[f"{key}, blocks along rows"] = (sum(error(x, signed) for x in moments) / size) ** 0.5
        flat = [x.view(-1, BLOCK) for x in moments]
        report[f"{key}, flat blocks"] = (sum(error(x, signed) for x in flat) / size) ** 0.5
    least = nearest_code(False, torch.device("cpu"))[1][0]
    lost = sum(((x > 0) & (x <= least * x.amax(1, keepdim=True))).sum().item() for x in flat)
    report["second moments above 0 that the nearest code would make 0"] = lost / sum((x > 0).sum().item() for x in flat)
    return report


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled:smollm2-135m")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3, help="two or more")
    parser.add_argument("--json", action="store_true", help="make the last line a JSON object")
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error(f"--seeds {args.seeds}: the difference between seeds needs two or more")

    losses, sizes = {8: [], 32: []}, {}
    for seed in range(args.seeds):
        for bits in (8, 32):
            curve, optimizer = train(args, bits, seed)
            print(f"seed {seed}, {bits:2} bits: " + ", ".join(f"{loss:.4f}" for loss in curve.values()), flush=True)
            losses[bits].append(curve)
            sizes[bits] = bytes_of(optimizer)
    report = rounding(optimizer)

    print(f"{args.model}, r = {args.rank}, {args.seeds} seeds: mean loss over {RECORDS} records")
    print("  step   32 bits    8 bits   8 against 32 bits (mean, largest)   between seeds (standard deviation)")
    for step in losses[32][0]:
        exact, packed = ([curve[step] for curve in losses[bits]] for bits in (32, 8))
        apart = [abs(a - b) for a, b in zip(exact, packed, strict=True)]
        means = f"{statistics.mean(exact):9.4f} {statistics.mean(packed):9.4f}"
        print(f"  {step:4} {means}   {statistics.mean(apart):.4f}, {max(apart):.4f} {statistics.stdev(exact):35.4f}")
    print(
        f"state: {sizes[32] / 2**20:,.1f} MiB with 32 bits, {sizes[8] / 2**20:,.1f} with 8: x{sizes[8] / sizes[32]:.3f}"
    )
    for name, value in report.items():
        print(f"  {name}: {value:.2e}")
    if args.json:
        print(json.dumps({"losses": losses, "bytes": sizes, "rounding": report}))


if __name__ == "__main__":
    main()
