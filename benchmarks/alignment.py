"""How well is a first LoRA step aligned with the gradient, against a full-rank one, on a real model and real rows?

OMP_NUM_THREADS=1 python benchmarks/alignment.py      # SmolLM2-135M and packaged facts; seconds

The rule of matched rates (``molf.setup.param_groups.alignment``) assumes normal gradients. Each line has the mean over layers
of a kind, the smallest and the largest, and what the rule says.
"""

import argparse
import math
from statistics import mean

import torch
from torch import Tensor, nn

from molf.setup.param_groups import alignment
from molf.study.config.run_config import ModelConfig
from molf.study.run.models import load_model_and_tokenizer
from molf.tasks import TASKS

RANKS = (8, 32, 128)


def alignments(gradient: Tensor, ranks: tuple[int, ...] = RANKS) -> dict[int, float]:
    """Return the cosine of LoRA's first step and a gradient ``[out, in]``, as a share of that of a full-rank step, by rank."""
    whole, n_in = cosine(gradient.sign(), gradient), gradient.shape[1]
    found = {}
    for rank in ranks:
        A = torch.empty(rank, n_in, dtype=gradient.dtype).uniform_(-1, 1) / math.sqrt(n_in)
        found[rank] = cosine((gradient @ A.T).sign() @ A, gradient) / whole
    return found


def cosine(step: Tensor, gradient: Tensor) -> float:
    return ((step * gradient).sum() / step.norm() / gradient.norm()).item()


def gradients(model: nn.Module, tokenizer: object, rows: list[str]) -> dict[str, Tensor]:
    """Return the gradients of all linear layers but the head for one batch of texts."""
    batch = tokenizer(rows, return_tensors="pt", padding=True)
    model(**batch, labels=batch.input_ids.masked_fill(batch.attention_mask == 0, -100)).loss.backward()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    return {name: layer.weight.grad for name, layer in layers.items() if name != "lm_head"}


def table(found: dict[str, Tensor]) -> str:
    """Return the measured and the predicted alignment by kind of projection and rank."""
    kinds: dict[tuple[str, int, int], list[float]] = {}
    for name, gradient in found.items():
        for rank, value in alignments(gradient).items():
            kinds.setdefault((name.rpartition(".")[2], gradient.shape[1], rank), []).append(value)
    lines = ["| projection | in | r | mean | smallest | largest | rule |", "| --- |" + " ---: |" * 6]
    for (kind, n_in, rank), values in kinds.items():
        measured = f"{mean(values):.2f} | {min(values):.2f} | {max(values):.2f}"
        lines.append(f"| {kind} | {n_in} | {rank} | {measured} | {alignment(rank, n_in):.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled:smollm2-135m")
    parser.add_argument("--rows", type=int, default=16)
    args = parser.parse_args()
    torch.manual_seed(0)
    model, tokenizer = load_model_and_tokenizer(ModelConfig(model_name_or_path=args.model, dtype="float32"), False)
    task = TASKS["fact"]
    rows = [task.example(row) for row in task.load(None, sample=True, limit=args.rows, seed=0).train]
    print(table(gradients(model, tokenizer, [row["prompt"] + row["completion"] for row in rows])))


if __name__ == "__main__":
    main()
