import copy

import pytest
import torch

from molf.errors import MolfError
from molf.study.engine.retention import compare, make_probe, read
from molf.tasks.base import ExampleTokens, Generate, Likelihood
from small import tiny_llama
from tiny_checkpoints import SENTENCE, SIZES, TOKENS, byte_tokenizer

TEXTS = ["The king is French.", "The mother tongue of the king", "x" * 500, "a"]
REQUESTS = [
    [
        Likelihood("The mother tongue", " of"),
        Likelihood("The mother tongue", " is"),
        ExampleTokens({"text": "not a prompt"}),
    ],
    [Generate("Is", 3)],
]


@pytest.fixture(scope="module")
def model():
    return tiny_llama(vocab_size=300, **SIZES, **TOKENS).eval()


@pytest.fixture(scope="module")
def probe():
    return make_probe(byte_tokenizer([SENTENCE], 300), TEXTS, REQUESTS)


def test_texts_are_cut_and_prompts_are_different_ones(probe):
    assert len(probe.texts) == 3 and max(map(len, probe.texts)) == 64  # one token has no loss
    assert len(probe.prompts) == 2


def test_every_row_is_asked_before_one_is_asked_twice():
    tokenizer = byte_tokenizer([SENTENCE], 300)
    prompts = lambda rows: make_probe(tokenizer, TEXTS, rows).prompts  # noqa: E731
    many = [[Generate(f"{row} {turn}", 1) for turn in range(9)] for row in range(99)]
    assert prompts(many) == [tuple(tokenizer(f"{row} 0").input_ids) for row in range(16)]
    assert prompts(many[:10])[10:] == [tuple(tokenizer(f"{row} 1").input_ids) for row in range(6)]


@pytest.mark.parametrize("batch_tokens", [1, 70, 4096])
def test_losses_and_distances_are_those_of_the_formula(model, probe, batch_tokens):
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned.lm_head.weight += 0.1 * torch.randn(300, 32, generator=torch.Generator().manual_seed(1))
    found = compare(*(read(m, probe, batch_tokens=batch_tokens) for m in (model, tuned)), "here")
    losses, distances = {m: [] for m in (model, tuned)}, []
    with torch.no_grad():
        for ids in probe.texts:
            x = torch.tensor([ids])
            for m, own in losses.items():
                own.append(float(m(x, labels=x).loss))
        for ids in probe.prompts:
            p, q = (m(torch.tensor([ids])).logits[0, -8:].log_softmax(-1) for m in (model, tuned))
            distances.append(float((p.exp() * (p - q)).sum(-1).mean()))
    before, after = (sum(own) / len(own) for own in losses.values())
    assert found.loss_before.value == pytest.approx(before, abs=1e-4)
    assert found.loss_after.value == pytest.approx(after, abs=1e-4)
    assert found.loss_rise.value == pytest.approx(after - before, abs=1e-4)
    assert found.loss_rise.low <= found.loss_rise.value <= found.loss_rise.high and found.loss_rise.n == 3
    assert found.kl.value == pytest.approx(sum(distances) / 2, abs=1e-3) and found.kl.value > 1e-3


def test_an_unchanged_model_has_forgotten_nothing(model, probe):
    model.train()
    found = compare(read(model, probe, batch_tokens=99), read(model, probe, batch_tokens=99), "here")
    assert found.loss_rise.value == 0 and found.kl.value == 0
    assert all(module.training for module in model.modules())
    model.eval()


def test_without_prompts_there_is_no_distance(model):
    probe = make_probe(byte_tokenizer([SENTENCE], 300), TEXTS, [])
    found = compare(read(model, probe, batch_tokens=99), read(model, probe, batch_tokens=99), "here")
    assert found.kl is None and set(found.metrics()) == {"loss_before", "loss_after", "loss_rise"}


def test_texts_without_a_loss_are_an_error_and_not_left_out():
    with pytest.raises(MolfError, match="none of the 2 texts has two tokens.*retention_path"):
        make_probe(byte_tokenizer([SENTENCE], 300), ["a", "b"], [])


def test_an_enormous_text_is_cut_before_it_is_tokenized():
    seen = []

    def tokenizer(texts):
        seen.extend(texts)
        return {"input_ids": [list(range(len(text))) for text in texts]}

    probe = make_probe(tokenizer, ["word " * 1_000_000], [])
    assert len(probe.texts[0]) == 64 and len(seen[0]) == 4096


def test_a_diverged_model_is_an_error(model, probe):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.lm_head.weight.fill_(torch.nan)
    with pytest.raises(MolfError, match="NaN"):
        read(broken, probe, batch_tokens=99)
