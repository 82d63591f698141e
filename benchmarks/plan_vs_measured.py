"""How well `molf plan` foresees memory: its estimate against the peak of real training steps.

    python benchmarks/plan_vs_measured.py --shape smollm2-135m --method fft --batch 8 --length 256

A process trains for two steps with the same trainer as `molf train`. On a CPU, what it held once the libraries were loaded and
before there was a model is taken off its peak.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

METHODS = ("fft", "molf", "molf_e", "lora", "dora", "adalora")


def settings(args, method, folder):
    return {
        "model_name_or_path": "random",
        "method": method,
        "ranks": [args.rank] if method == "molf" else [args.rank // 4, args.rank],
        "lora_rank": args.rank,
        "per_device_train_batch_size": args.batch,
        "gradient_accumulation_steps": args.accumulation,
        "gradient_checkpointing": args.checkpointing,
        "optimizer_in_backward": args.release,
        "max_grad_norm": 0 if args.release else 1,
        "max_length": args.length,
        "max_steps": 2,
        "disable_tqdm": True,
        "output_dir": str(folder),
    }


def measure(args, method):
    """Train for two steps and return the bytes at the peak beyond what was there before the model."""
    import torch

    from models import random_model
    from molf.study.config.run_config import RunConfig
    from molf.study.results.environment import peak_memory_bytes
    from molf.study.run.job import Job, job_recipe, make_trainer
    from molf.tasks import Split

    torch.ones(512, 512).requires_grad_().square().sum().backward()  # starts the threads of the backward pass
    before = 0 if torch.cuda.is_available() else resident_bytes()
    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig.from_dict(settings(args, method, folder))
        model = random_model(args.shape)
        rows = [{"number": number} for number in range(2 * args.batch * args.accumulation)]
        job = Job(config, model, tokenizer(), LongTask(args.length), Split(rows, rows, "random tokens"))
        make_trainer(job, job_recipe(job)).train()
    return peak_memory_bytes() - before


def resident_bytes():
    status = Path("/proc/self/statm").read_text().split()
    return int(status[1]) * os.sysconf("SC_PAGE_SIZE")


class LongTask:
    """Examples that fill the whole length, all of it in the loss but the first token."""

    name = "long"

    def __init__(self, length):
        self.length = length

    def example(self, row):
        return {"prompt": "a", "completion": " a" * self.length}

    def requests(self, row):
        return []


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="</s>")


def foresee(args, method):
    """Return the estimated peak in bytes."""
    import torch

    from models import SHAPES
    from molf.study.config.run_config import RunConfig
    from molf.study.sizing.blueprint import Blueprint
    from molf.study.sizing.memory import estimate

    blueprint = Blueprint(RunConfig.from_dict(settings(args, method, "unused")), SHAPES[args.shape])
    return estimate(blueprint, torch.cuda.is_available()).memory.peak


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="smollm2-135m")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--release", action="store_true", help="optimizer_in_backward, for molf and molf_e only")
    parser.add_argument("--json", action="store_true", help="end with a line of JSON")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)  # the inner process
    args = parser.parse_args()
    if args.measure:
        print(measure(args, args.method[0]))
        return
    ratios = {}
    print(f"{args.shape}, {args.batch} x {args.length} tokens, rank {args.rank}; MiB")
    for method in args.method:
        command = [sys.executable, *sys.argv, "--measure", "--method", method]
        # Blocks of their own for tensors: a heap that cannot shrink would be measured as memory in use.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**16)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            sys.exit(done.stderr)
        measured, foreseen = int(done.stdout.split()[-1]), foresee(args, method)
        ratios[method] = foreseen / measured
        sizes = f"estimate {foreseen / 2**20:8.0f}   measured {measured / 2**20:8.0f}"
        print(f"{method:8} {sizes}   ratio {ratios[method]:.2f}", flush=True)
    if args.json:
        print(json.dumps(ratios))


if __name__ == "__main__":
    main()
