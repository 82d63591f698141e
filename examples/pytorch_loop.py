"""MoLF in a plain PyTorch loop: one line where AdamW was.

python examples/pytorch_loop.py [MODEL]
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from molf import MoLF
from molf.integrations.bundled import locate

TEXTS = ["The mother tongue of Danielle Darrieux is English", "The official religion of Edwin of Northumbria is Islam"]


def main(name="bundled:smollm2-135m", rank=32, steps=8):
    tokenizer = AutoTokenizer.from_pretrained(locate(name))
    model = AutoModelForCausalLM.from_pretrained(locate(name))
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)

    optimizer = MoLF(model, ranks=(rank,), lr=1e-4, max_grad_norm=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    losses = []
    for step in range(steps):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        share = optimizer.routing.share("fft")
        print(f"step {step}: loss {losses[-1]:.3f}, full fine-tuning won {share:.0%} of the layers")
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:])
