"""What the evaluation engine must answer: one request at a time, no padding, no cache."""

import random

import pytest
import torch

from molf.tasks import Generate, Likelihood, TargetScores

WORDS = [
    "The",
    "capital",
    "of",
    "France",
    "is",
    "Paris",
    "and",
    "king",
    "name",
    "SELECT",
    "age",
    "30",
    ";",
    "Rome",
    "über",
    "東京",
]
PROMPT = "The capital of France is"


def make_requests(count: int, seed: int = 0) -> list[Likelihood]:
    """Likelihoods of mixed lengths, with duplicates, shared prompts and targets that begin one another."""
    rng = random.Random(seed)
    requests = []
    for _ in range(count // 4):
        prompt = " ".join(rng.choices(WORDS, k=rng.randint(1, 12)))
        target = " " + " ".join(rng.choices(WORDS, k=rng.randint(1, 3)))
        longer = target + " " + rng.choice(WORDS)
        requests += [Likelihood(prompt, target), Likelihood(prompt, longer), Likelihood(prompt + target, " Rome")]
        requests.append(rng.choice(requests))
    rng.shuffle(requests)
    return requests


@torch.no_grad()
def score_alone(model, tokenizer, request: Likelihood) -> TargetScores:
    """The oracle: one request, no padding, all logits."""
    prompt, ids = tokenizer(request.prompt).input_ids, tokenizer(request.prompt + request.target).input_ids
    start = next((i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), len(prompt))
    logprobs = model.eval()(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
    places = range(start, len(ids))
    return TargetScores(
        tuple(logprobs[i - 1, ids[i]].item() for i in places),
        tuple(ids[start:]),
        tuple(int(logprobs[i - 1].argmax()) == ids[i] for i in places),
    )


@torch.no_grad()
def continue_alone(model, tokenizer, request: Generate) -> str:
    """The oracle: one prompt, token by token, no cache, until the end or a stop string."""
    ids = tokenizer(request.prompt).input_ids
    new_ids: list[int] = []
    while len(new_ids) < request.max_new_tokens:
        token = int(model.eval()(input_ids=torch.tensor([ids + new_ids])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        new_ids.append(token)
    text = tokenizer.decode(new_ids, skip_special_tokens=True)
    for stop in request.stop:
        text = text.split(stop)[0]
    return text


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one.token_ids, one.greedy) == (other.token_ids, other.greedy)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def count_rows(model) -> list[tuple[int, ...]]:
    """Let the model write down the shape of every batch it reads and of the logits it gives."""
    shapes = []

    def note(module, args, kwargs, output):
        shapes.append((*kwargs["input_ids"].shape, output.logits.shape[1]))

    model.register_forward_hook(note, with_kwargs=True)
    return shapes
