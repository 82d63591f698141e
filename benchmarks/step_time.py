"""Time of a whole training step: full fine-tuning, LoRA, merged MoLF and a branched MoLF, taking turns in one process.

    python benchmarks/step_time.py [--tokens 1024] [--rank 128] [--rounds 5] [--only fft,molf] [--json]

Contenders, all on random weights of one shape, float32 on a CPU and bf16 autocast on a GPU:
  fft            every weight trains, torch.optim.AdamW(fused=True)
  lora           PEFT LoRA of that rank on a frozen base, AdamW(fused=True)
  molf           molf.MoLF, merged form
  molf_branched  molf.MoLF, branched form, the published way: PEFT LoRA branches with dropout 0.05, and every part trained
  molf_e         MoLF-Efficient: experts of rank r/4 and r on a frozen base (with --only)
  lora_sum       one PEFT LoRA of rank r/4 + r on a frozen base, AdamW(fused=True), to compare it with (with --only)
A step is as many micro-batches of at most 1,024 tokens (sequences of 128) as `--tokens` asks for, and one optimizer step.
"""

import argparse
import json
import statistics

import torch
from peft import LoraConfig, get_peft_model

from models import SHAPES, random_model
from molf import MoLF, add_lora_experts
from timing import machine, ratio, take_turns

SEQUENCE, MICRO = 128, 1024
CONTENDERS = ("fft", "lora", "molf", "molf_branched", "molf_e", "lora_sum")


def lora_model(shape, rank):
    config = LoraConfig(r=rank, lora_alpha=32, use_rslora=True, target_modules="all-linear")
    return get_peft_model(random_model(shape), config)


def contender(model, optimizer, tokens):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    vocabulary = model.config.vocab_size
    sequences = [min(MICRO, tokens - done) // SEQUENCE for done in range(0, tokens, MICRO)]
    batches = [torch.randint(vocabulary, (n, SEQUENCE), device=device) for n in sequences]

    def step():
        for ids in batches:
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                loss = model(input_ids=ids, labels=ids).loss / len(batches)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def adamw(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)


def contenders(shape, rank, tokens, only):
    models = {
        "fft": lambda: random_model(shape),
        "lora": lambda: lora_model(shape, rank),
        "molf": lambda: random_model(shape),
        "molf_branched": lambda: add_lora_experts(random_model(shape), (rank,), lora_dropout=0.05, freeze_base=False),
        "molf_e": lambda: add_lora_experts(random_model(shape), ranks=(rank // 4, rank)),
        "lora_sum": lambda: lora_model(shape, rank // 4 + rank),
    }
    built = {name: models[name]() for name in only}
    molf = {"molf": {"ranks": (rank,)}, "molf_branched": {}, "molf_e": {}}
    optimizers = {n: MoLF(m, lr=1e-5, **molf[n]) if n in molf else adamw(m) for n, m in built.items()}
    return {name: contender(model, optimizers[name], tokens) for name, model in built.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="smollm2-135m", choices=SHAPES)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens per optimizer step, a multiple of 128")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="fft,lora,molf,molf_branched", help="contenders, separated by commas")
    parser.add_argument("--json", action="store_true", help="make the last line a JSON object")
    args = parser.parse_args()
    if args.tokens < SEQUENCE or args.tokens % SEQUENCE:
        parser.error(f"--tokens {args.tokens}: must be a positive multiple of {SEQUENCE}")
    only = args.only.split(",")
    if unknown := set(only) - set(CONTENDERS):
        parser.error(f"--only: unknown {sorted(unknown)}; there are {', '.join(CONTENDERS)}")

    seconds = take_turns(contenders(args.shape, args.rank, args.tokens, only), args.rounds)
    print(f"{args.shape}, r = {args.rank}, {args.tokens} tokens a step; {machine()}; {args.rounds} rounds")
    speed = {name: args.tokens / statistics.median(times) for name, times in seconds.items()}
    ratios = {}
    for name in only:
        line = f"  {name:14} {speed[name]:8.1f} tokens/s"
        if "fft" in seconds:
            ratios[f"{name}/fft"], least, most = ratio(seconds["fft"], seconds[name])
            line += f"   x{ratios[f'{name}/fft']:.3f} of full fine-tuning ({least:.3f} to {most:.3f})"
        print(line)
    if {"molf", "molf_branched"} <= set(only):
        ratios["molf/molf_branched"], least, most = ratio(seconds["molf_branched"], seconds["molf"])
        print(
            f"  merged MoLF trains x{ratios['molf/molf_branched']:.2f} as fast as branched ({least:.2f} to {most:.2f})"
        )
    if {"molf_e", "lora_sum"} <= set(only):
        ratios["molf_e/lora_sum"], least, most = ratio(seconds["molf_e"], seconds["lora_sum"])
        print(
            f"  a MoLF-Efficient step takes x{ratios['molf_e/lora_sum']:.3f} of one LoRA's ({least:.3f} to {most:.3f})"
        )
    if args.json:
        print(json.dumps({"tokens_per_s": speed, "ratios": ratios, "tokens": args.tokens, "rank": args.rank}))


if __name__ == "__main__":
    main()
