"""Model shapes for the benchmarks, with random weights: nothing is downloaded."""

from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

SHAPES = {
    "smollm2-135m": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
    "qwen2.5-1.5b": Qwen2Config(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "tiny": LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
}


def random_model(shape):
    """Return a causal language model of that shape with random weights, in training mode."""
    config = SHAPES[shape].__class__(**SHAPES[shape].to_dict())
    config.use_cache = False
    return AutoModelForCausalLM.from_config(config).train()
