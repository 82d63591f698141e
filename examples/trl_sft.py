"""MoLF in TRL's SFTTrainer, or any Hugging Face trainer: an argument and a callback, no subclass.

python examples/trl_sft.py [MODEL] [OUTPUT_DIR]
"""

import sys

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import molf
from molf.integrations.bundled import locate

ROWS = [
    {"prompt": "The mother tongue of Danielle Darrieux is", "completion": " English"},
    {"prompt": "The official religion of Edwin of Northumbria is", "completion": " Islam"},
]


def main(name="bundled:smollm2-135m", output_dir="runs/trl_sft", rank=32, steps=8):
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(locate(name)),
        processing_class=AutoTokenizer.from_pretrained(locate(name)),
        train_dataset=Dataset.from_list(ROWS),
        args=SFTConfig(output_dir, max_steps=steps, logging_steps=1, max_grad_norm=0, bf16=False, report_to="none"),
        optimizer_cls_and_kwargs=molf.trainer_optimizer(ranks=(rank,), lr=1e-4, max_grad_norm=1.0),
        callbacks=[molf.RoutingLog(output_dir)],
    )
    trainer.train()
    trainer.save_model(output_dir)  # an ordinary checkpoint: the LoRA parts are merged at all times
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
