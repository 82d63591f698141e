import re

import pytest

from molf.study.engine.inference import answer
from molf.tasks import Likelihood, NextToken
from oracles import PROMPT, WORDS, count_rows, score_alone


def test_a_choice_is_made_at_one_position_of_one_row(tiny_model, tiny_tokenizer):
    choice = NextToken(PROMPT, ("A", "B", "C", "D"))
    shapes = count_rows(tiny_model)
    (answered,) = answer(tiny_model, tiny_tokenizer, [choice])
    assert shapes == [(1, len(tiny_tokenizer(PROMPT).input_ids), 1)]
    alone = [score_alone(tiny_model, tiny_tokenizer, Likelihood(PROMPT, option)) for option in choice.options]
    assert answered.token_ids == tuple(scores.token_ids[0] for scores in alone)
    assert answered.logprobs == pytest.approx([scores.logprobs[0] for scores in alone], abs=1e-5)
    assert answered.best == max(range(4), key=lambda i: alone[i].logprobs[0])


@pytest.mark.parametrize("batch_tokens", [1, 4096])
def test_choices_keep_their_place_among_other_requests(tiny_model, tiny_tokenizer, batch_tokens):
    prompts = [" ".join(WORDS[:length]) for length in (1, 3, 5, 9, 12)]
    choices = [NextToken(prompt, ("A", "B", "?")) for prompt in prompts]
    requests = [request for choice in choices for request in (choice, Likelihood(choice.prompt, "B"), choice)]
    answers = answer(tiny_model, tiny_tokenizer, requests, batch_tokens=batch_tokens)
    for first, likelihood, again in zip(answers[::3], answers[1::3], answers[2::3], strict=True):
        assert first == again and first.logprobs[1] == likelihood.logprobs[0]
    assert len({scores.best for scores in answers[::3]}) > 1


@pytest.mark.parametrize(
    "prompt, options, reason",
    [
        (PROMPT, ("A", "ABC"), "the option 'ABC' is 3 tokens after the prompt 'The capital of France is'"),
        ("The capital of Fra", ("A", "nc"), "the option 'nc' merges with the end of the prompt"),
        ("x" * 100, ("A", "BC"), f"the prompt '...{'x' * 60}'"),
    ],
)
def test_an_option_of_more_or_less_than_one_token_is_refused(tiny_model, tiny_tokenizer, prompt, options, reason):
    shapes = count_rows(tiny_model)
    with pytest.raises(ValueError, match=re.escape(reason)) as error:
        answer(tiny_model, tiny_tokenizer, [NextToken(prompt, options)])
    assert "every option must be exactly one token there" in str(error.value)
    assert shapes == []
