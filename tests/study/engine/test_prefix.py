import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel

from molf.study.engine import prefix
from molf.study.engine.inference import answer
from molf.study.engine.prefix import has_full_cache, read_prefix
from molf.tasks import Generate, Likelihood, NextToken
from oracles import WORDS, assert_same, continue_alone, count_rows, score_alone

EXAMPLES = "Question: SELECT name FROM singer? Answer: B\nQuestion: The king of France? Answer: D\n"
QUESTIONS = [f"{EXAMPLES}Question: {' '.join(WORDS[:length])}? Answer:" for length in (1, 3, 5, 9, 12)]


def gpt2(**sizes):
    config = GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=2, n_positions=512, initializer_range=0.3, **sizes)
    return GPT2LMHeadModel(config)


def gemma3():
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    return Gemma3ForCausalLM(
        Gemma3TextConfig(**sizes, num_attention_heads=4, num_key_value_heads=1, sliding_window=8, initializer_range=0.3)
    )


@pytest.mark.parametrize("batch_tokens", [1, 600, 4096])
@pytest.mark.parametrize("make", [None, gpt2, gemma3], ids=["llama", "gpt2", "gemma3"])
def test_answers_after_a_shared_beginning_equal_the_oracle(tiny_model, tiny_tokenizer, make, batch_tokens):
    model = tiny_model if make is None else make()
    likelihoods = [Likelihood(question, target) for question in QUESTIONS for target in (" Rome and", " Paris")]
    choices = [NextToken(question, ("A", "B", "C")) for question in QUESTIONS]
    answers = answer(model, tiny_tokenizer, [*likelihoods, *choices], batch_tokens=batch_tokens)
    assert_same(answers[:10], [score_alone(model, tiny_tokenizer, request) for request in likelihoods])
    for scores, question in zip(answers[10:], QUESTIONS, strict=True):
        alone = score_alone(model, tiny_tokenizer, Likelihood(question, "C"))
        assert scores.logprobs[2] == pytest.approx(alone.logprobs[0], abs=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 4096])
def test_generations_after_a_shared_beginning_equal_the_oracle(tiny_model, tiny_tokenizer, batch_tokens):
    requests = [Generate(question, 24) for question in QUESTIONS]
    expected = [continue_alone(tiny_model, tiny_tokenizer, request) for request in requests]
    assert answer(tiny_model, tiny_tokenizer, requests, batch_tokens=batch_tokens) == expected
    assert len(set(expected)) == len(expected)


def test_a_shared_beginning_is_read_once(tiny_model, tiny_tokenizer):
    rows = [tiny_tokenizer(question).input_ids for question in QUESTIONS]
    shared = next(i for i, column in enumerate(zip(*rows, strict=False)) if len(set(column)) > 1)
    shapes = count_rows(tiny_model)
    answer(tiny_model, tiny_tokenizer, [NextToken(question, ("A", "B")) for question in QUESTIONS])
    assert shapes[0][:2] == (1, shared)
    assert sum(shape[0] for shape in shapes[1:]) == 5
    assert max(shape[1] for shape in shapes[1:]) == max(map(len, rows)) - shared


def test_no_prefix_where_there_is_nothing_to_gain(tiny_model):
    long = tuple(range(40))
    assert read_prefix(tiny_model, [], most=0).ids == ()
    assert read_prefix(tiny_model, [long, long], most=39).ids == (), "one distinct row"
    assert read_prefix(tiny_model, [(*long[:9], 1), long], most=9).ids == (), "too short to pay"
    assert read_prefix(tiny_model, [(*long, 1), (*long, 2)], most=prefix.MIN_TOKENS - 1).ids == ()


@torch.no_grad()
def test_a_batch_gets_its_own_copy(tiny_model):
    found = read_prefix(tiny_model, [(*range(40), 1), (*range(40), 2)], most=40)
    assert found.ids == tuple(range(40))
    cache = found.of_batch(3)
    tiny_model(torch.tensor([[1], [2], [3]]), **{prefix.CACHE: cache})
    assert cache.layers[0].keys.shape[::2] == (3, 41)
    assert found.cache.layers[0].keys.shape[::2] == (1, 40)


def test_only_a_cache_of_all_tokens_can_be_shared(tiny_model):
    assert has_full_cache(tiny_model) and has_full_cache(gpt2())
    assert not has_full_cache(gemma3())
