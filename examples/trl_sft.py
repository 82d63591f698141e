"""MoLF in TRL's SFTTrainer, or any Hugging Face trainer: one call, no subclass.

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
        args=SFTConfig(output_dir, max_steps=steps, learning_rate=1e-4, logging_steps=1, bf16=False, report_to="none"),
        callbacks=[molf.RoutingLog(output_dir)],  # writes every decision down
    )
    molf.use_in(trainer, ranks=(rank,)).train()
    trainer.save_model(output_dir)  # an ordinary checkpoint: the LoRA parts are merged at all times
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
