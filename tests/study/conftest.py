import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from molf.study.run.job import make_trainer
from small import tiny_llama
from small_runs import carry_out, small_run
from tiny_checkpoints import SIZES, TOKENS, byte_tokenizer

CORPUS = [
    "The capital of France is Paris. The mother tongue of the king is French.",
    "SELECT name FROM singer WHERE age > 30; The capital of Italy is Rome.",
]


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(CORPUS, 320)


@pytest.fixture(scope="session")
def bos_tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(CORPUS, 320, bos=True)


def varied_model(tokenizer, layers: int = 2) -> LlamaForCausalLM:
    model = tiny_llama(
        seed=0,
        vocab_size=320,
        num_hidden_layers=layers,
        **SIZES,
        **TOKENS,
        num_key_value_heads=2,
        initializer_range=0.3,
        attention_dropout=0.5,  # so that a model left in training mode is noticed
    )
    texts = tokenizer.batch_decode([[token] for token in range(model.config.vocab_size)])
    odd = [token for token, text in enumerate(texts) if not (text.isascii() and text.isprintable())]
    with torch.no_grad():
        model.lm_head.weight[odd] = 0  # a logit of 0 is never the largest
    return model


@pytest.fixture
def tiny_model(tiny_tokenizer) -> LlamaForCausalLM:
    """A random causal language model whose answers vary enough to tell inputs apart, and are printable ASCII."""
    return varied_model(tiny_tokenizer)


@pytest.fixture(scope="session")
def shared_model(tiny_tokenizer, tmp_path_factory) -> str:
    """The folder of such a model of one layer and its tokenizer, as ``save_pretrained`` leaves them; for tests that only read it.

    Runs take a third less time than with two layers.
    """
    folder = tmp_path_factory.mktemp("model") / "tiny"
    varied_model(tiny_tokenizer, layers=1).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def saved_model(shared_model, tmp_path) -> str:
    """A copy of the tiny model's folder."""
    return shutil.copytree(shared_model, str(tmp_path / "tiny"))


@pytest.fixture(scope="session")
def finished(shared_model, tmp_path_factory):
    """Finished runs of ``settings`` with some changes, evaluated before too, with a checkpoint after every second step.

    A run is carried out when a test first asks for it; tests that change its folder take a ``copy``.
    """
    runs = {}

    def run(**changes):
        key = json.dumps(changes, sort_keys=True)
        if key not in runs:
            folder = tmp_path_factory.mktemp("finished") / "run"
            saved = small_run(shared_model, folder) | {"save_strategy": "steps", "save_steps": 2, "eval_before": True}
            with pytest.MonkeyPatch.context() as patch:
                patch.delenv("LOG_FILE", raising=False)
                runs[key] = SimpleNamespace(result=carry_out(saved, **changes), folder=folder)
        return runs[key]

    def copy(folder, **changes):
        shutil.copytree(run(**changes).folder, folder)
        return folder

    run.copy = copy
    return run


@pytest.fixture
def settings(shared_model, tmp_path, monkeypatch):
    """Settings of a run of four steps on eight facts."""
    monkeypatch.delenv("LOG_FILE", raising=False)
    return small_run(shared_model, tmp_path / "run")


@pytest.fixture
def callbacks(monkeypatch):
    """Callbacks that the trainers of all runs get beside their own; empty at first."""
    more = []

    def make(*given, **settings):
        trainer = make_trainer(*given, **settings)
        for callback in more:
            trainer.add_callback(callback)
        return trainer

    monkeypatch.setattr("molf.study.run.train.make_trainer", make)
    return more
