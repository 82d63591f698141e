import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from molf.study.job import make_trainer
from small_runs import small_run

CORPUS = [
    "The capital of France is Paris. The mother tongue of the king is French.",
    "SELECT name FROM singer WHERE age > 30; The capital of Italy is Rome.",
]


def make_tokenizer(*, bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of a few hundred tokens, without a padding token."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def bos_tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(bos=True)


@pytest.fixture
def tiny_model(tiny_tokenizer) -> LlamaForCausalLM:
    """A random causal language model whose answers vary enough to tell inputs apart, and are printable ASCII."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        attention_dropout=0.5,  # so that a model left in training mode is noticed
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    texts = tiny_tokenizer.batch_decode([[token] for token in range(config.vocab_size)])
    odd = [token for token, text in enumerate(texts) if not (text.isascii() and text.isprintable())]
    with torch.no_grad():
        model.lm_head.weight[odd] = 0  # a logit of 0 is never the largest
    return model


@pytest.fixture
def saved_model(tiny_model, tiny_tokenizer, tmp_path) -> str:
    """The folder of the tiny model and its tokenizer, as ``save_pretrained`` leaves them."""
    folder = tmp_path / "tiny"
    tiny_model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def settings(saved_model, tmp_path, monkeypatch):
    """Settings of a run of four steps on eight facts."""
    monkeypatch.delenv("LOG_FILE", raising=False)
    return small_run(saved_model, tmp_path / "run")


@pytest.fixture
def callbacks(monkeypatch):
    """Callbacks that the trainers of all runs get beside their own; empty at first."""
    more = []

    def make(*given, **settings):
        trainer = make_trainer(*given, **settings)
        for callback in more:
            trainer.add_callback(callback)
        return trainer

    monkeypatch.setattr("molf.study.train.make_trainer", make)
    return more
