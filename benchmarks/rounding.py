"""How many bfloat16 weights does a step of AdamW move at all?

OMP_NUM_THREADS=1 python benchmarks/rounding.py      # SmolLM2-135M; seconds

An early step of AdamW moves each weight by about the learning rate. bfloat16 has 8 significant bits, so a step of less than half
of a weight's last bit leaves it where it was. Prints the share of the weights of linear layers that move, by learning rate.
"""

import argparse

import torch
from torch import Tensor, nn

from molf.study.config.run_config import ModelConfig
from molf.study.run.models import load_model_and_tokenizer

RATES = (2.5e-5, 5e-5, 1e-4, 2e-4, 4e-4, 8e-4)


def moved(weight: Tensor, rate: float, generator: torch.Generator) -> int:
    """Return how many elements of a bfloat16 weight a step of ``rate``, with random signs, changes."""
    sign = torch.randint(0, 2, weight.shape, generator=generator) * 2 - 1
    return int(((weight.float() + rate * sign).bfloat16() != weight).sum())


def table(weights: list[Tensor], seed: int = 0) -> str:
    """Return the shares as a Markdown table."""
    generator, total = torch.Generator().manual_seed(seed), sum(weight.numel() for weight in weights)
    shares = [sum(moved(weight, rate, generator) for weight in weights) / total for rate in RATES]
    return "\n".join(
        [
            f"| learning rate | {' | '.join(f'{rate:g}' for rate in RATES)} |",
            "| --- |" + " ---: |" * len(RATES),
            f"| weights that move | {' | '.join(f'{share:.0%}' for share in shares)} |",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default="bundled:smollm2-135m")
    args = parser.parse_args()
    model, _ = load_model_and_tokenizer(ModelConfig(model_name_or_path=args.model_name_or_path, dtype="bfloat16"))
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    print(table([layer.weight.data for name, layer in layers.items() if name != "lm_head"]))


if __name__ == "__main__":
    main()
