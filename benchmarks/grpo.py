"""MoLF in reinforcement learning: SmolLM2-135M learns sums of two numbers from a verifiable reward (GRPO of TRL).

OMP_NUM_THREADS=1 python benchmarks/grpo.py molf --lr 2e-5            # also: fft, lora, random; minutes on one CPU core
python benchmarks/grpo.py --print                                     # only print what is gathered

The reward is 1 for the right number, else 0. Training, choosing rates (``--choose``) and testing have sums of their own. A run
adds its line to benchmarks/results/evidence/grpo.json; one that is there already is not repeated.
"""

import argparse
import json
import random
import re
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import GRPOConfig, GRPOTrainer

import molf
from molf.files import atomic_write
from molf.study.config.run_config import ModelConfig
from molf.study.run.models import load_model_and_tokenizer

GATHERED = Path(__file__).parent / "results/evidence/grpo.json"
METHODS = ("fft", "lora", "molf", "random")
TRAIN, CHOOSE, TEST = 512, 100, 200
RANK, BATCH, TOKENS = 32, 32, 4


def sums() -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Return rows to train on, to choose rates by and to test, with no sum in two of them."""
    pairs = [(a, b) for a in range(10, 50) for b in range(10, 50)]
    random.Random(0).shuffle(pairs)
    rows = [{"prompt": f"31 + 25 = 56\n{a} + {b} =", "total": a + b} for a, b in pairs[: TRAIN + CHOOSE + TEST]]
    return rows[:TRAIN], rows[TRAIN : TRAIN + CHOOSE], rows[TRAIN + CHOOSE :]


def is_right(completions: list[str], total: list[int], **_: Any) -> list[float]:
    """Reward a completion whose first number is the sum."""
    return [float(first_number(text) == want) for text, want in zip(completions, total, strict=True)]


def first_number(text: str) -> int | None:
    found = re.search(r"\d+", text)
    return None if found is None else int(found[0])


@torch.no_grad()
def accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]) -> float:
    """Return the percentage of right greedy answers."""
    model.eval()
    right = 0
    for start in range(0, len(rows), 50):
        own = rows[start : start + 50]
        prompts = [row["prompt"] for row in own]
        batch = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
        out = model.generate(**batch, max_new_tokens=TOKENS, do_sample=False)
        texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(first_number(text) == row["total"] for text, row in zip(texts, own, strict=True))
    return 100 * right / len(rows)


def run(method: str, lr: float, seed: int, steps: int, choose: bool) -> dict[str, Any]:
    """Train by GRPO and return rewards, accuracies and routing."""
    set_seed(seed)
    model, tokenizer = load_model_and_tokenizer(ModelConfig(model_name_or_path="bundled:smollm2-135m", dtype="float32"))
    train, chosen, test = sums()
    rows = chosen if choose else test
    before = accuracy(model, tokenizer, rows)
    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(
            folder,
            learning_rate=lr,
            max_steps=steps,
            seed=seed,
            per_device_train_batch_size=BATCH,
            num_generations=8,
            max_completion_length=TOKENS,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=5,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
        )
        adapter = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear") if method == "lora" else None
        trainer = GRPOTrainer(
            model, is_right, args, Dataset.from_list(train), processing_class=tokenizer, peft_config=adapter
        )
        if method in ("molf", "random"):
            molf.use_in(trainer, ranks=(RANK,), score="epd" if method == "molf" else "random")
            molf.RoutingLog(folder).attach(trainer)
        trainer.train()
        after = accuracy(trainer.model, tokenizer, rows)
        logs = trainer.state.log_history
        rewards = [row["reward"] for row in logs if "reward" in row]
        shares = [row["molf/fft_share"] for row in logs if "molf/fft_share" in row]
    return {
        **{"method": method, "lr": lr, "seed": seed, "steps": steps, "rows": "choose" if choose else "test"},
        **{"before": before, "after": after, "rewards": rewards, "fft_share": shares},
    }


KEY = ("method", "lr", "seed", "steps", "rows")


def gathered() -> list[dict[str, Any]]:
    runs: list[dict[str, Any]] = json.loads(GATHERED.read_text()) if GATHERED.exists() else []
    return runs


def table(runs: list[dict[str, Any]]) -> str:
    """Return the runs as a Markdown table; rewards are means of the first and the last ten steps."""
    lines = ["| method | rate | seed | sums | right before | after | reward, first ten | last ten | won by FFT |"]
    lines.append("| --- |" + " ---: |" * 8)
    for own in sorted(runs, key=lambda own: [own["rows"], own["method"], own["lr"], own["seed"]]):
        first, last = (mean(part) for part in (own["rewards"][:10], own["rewards"][-10:]))
        won = f"{mean(own['fft_share']):.0%}" if own["fft_share"] else ""
        lines.append(
            f"| {own['method']} | {own['lr']:g} | {own['seed']} | {own['rows']} | {own['before']:.1f} | {own['after']:.1f} | "
            f"{first:.2f} | {last:.2f} | {won} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", nargs="?", choices=METHODS)
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--choose", action="store_true", help="measure on the sums that choose rates")
    parser.add_argument("--print", action="store_true", dest="only_print", help="print what is gathered")
    args = parser.parse_args()
    if not args.only_print:
        if args.method is None:
            parser.error(f"give a method of {', '.join(METHODS)}, or --print")
        wanted = (args.method, args.lr, args.seed, args.steps, "choose" if args.choose else "test")
        if not any(tuple(own[key] for key in KEY) == wanted for own in gathered()):
            own = run(args.method, args.lr, args.seed, args.steps, args.choose)
            with atomic_write(GATHERED) as partial:
                partial.write_text(json.dumps([*gathered(), own], indent=1) + "\n")
    print(table(gathered()))


if __name__ == "__main__":
    main()
