"""MoLF in GRPO: a tiny model that knows nothing learns sums from a verifiable reward: python examples/grpo_arithmetic.py."""

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import GRPOConfig, GRPOTrainer

import molf

ROWS = [{"prompt": f"{a}+{b}=", "total": a + b} for a in range(5) for b in range(5)]


def is_right(completions, total, **_):
    return [float(text.strip() == str(want)) for text, want in zip(completions, total, strict=True)]


def tiny():
    words = Tokenizer(models.WordLevel({token: i for i, token in enumerate(["<pad>", "<eos>", *"0123456789+="])}))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=14, **sizes, bos_token_id=1, eos_token_id=1, pad_token_id=0))
    return model, PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def main(output_dir="runs/grpo", steps=150, batch=64):
    set_seed(0)
    model, tokenizer = tiny()
    settings = dict(learning_rate=3e-3, max_completion_length=1, logging_steps=1, bf16=False, report_to="none")
    args = GRPOConfig(output_dir, max_steps=steps, per_device_train_batch_size=batch, **settings)
    trainer = GRPOTrainer(model, is_right, args, Dataset.from_list(ROWS), processing_class=tokenizer)
    molf.use_in(trainer, ranks=(8,)).train()
    return [row["reward"] for row in trainer.state.log_history if "reward" in row]


if __name__ == "__main__":
    rewards = main()
    print(f"right in the first ten steps: {sum(rewards[:10]) / 10:.0%}, in the last ten: {sum(rewards[-10:]) / 10:.0%}")
