"""Tiny tokenizers, and checkpoints of tiny random models with them, as ``save_pretrained`` leaves both."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from small import tiny_llama

SENTENCE = "The mother tongue of the king is French."
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "max_position_embeddings": 256}
TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": False}


def byte_tokenizer(texts, vocab_size, *, bos=False, **special):
    """A byte-level BPE tokenizer that has learned from texts.

    Args:
        texts: What to learn from.
        vocab_size: How many tokens to learn at the most, ``<s>``, ``</s>`` and all bytes among them.
        bos: Whether every text begins with ``<s>``.
        special: More special tokens.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", **special)


def save_tiny_checkpoint(folder, **config):
    """Save a tiny random Llama with a byte-level tokenizer."""
    tiny_llama(**{"vocab_size": 300, **SIZES, **TOKENS, **config}).save_pretrained(folder)
    byte_tokenizer([SENTENCE], 300, pad_token="</s>").save_pretrained(folder)
