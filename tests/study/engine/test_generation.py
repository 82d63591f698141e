import logging

import pytest
import torch
from transformers import GenerationConfig

from molf.study.engine.inference import answer
from molf.tasks import Generate
from oracles import PROMPT, WORDS, continue_alone, count_rows


@pytest.mark.parametrize("batch_tokens", [1, 60, 4096])
def test_generations_equal_the_oracle(tiny_model, tiny_tokenizer, batch_tokens):
    prompts = [" ".join(WORDS[:length]) for length in (1, 3, 5, 9, 12)]
    requests = [Generate(prompt, count) for prompt in prompts for count in (4, 12)]
    expected = [continue_alone(tiny_model, tiny_tokenizer, request) for request in requests]
    assert answer(tiny_model, tiny_tokenizer, requests, batch_tokens=batch_tokens) == expected
    assert len(set(expected)) > 5


def test_generation_ends_at_the_end_token_of_tokenizer_or_checkpoint(tiny_model, tiny_tokenizer):
    request = Generate(PROMPT, 8)
    free = continue_alone(tiny_model, tiny_tokenizer, request)
    ids = tiny_tokenizer(PROMPT).input_ids
    third = int(tiny_model(torch.tensor([ids + tiny_tokenizer(free).input_ids[:2]])).logits[0, -1].argmax())
    expected = tiny_tokenizer.decode(tiny_tokenizer(free).input_ids[:2])
    tiny_model.generation_config = GenerationConfig(eos_token_id=[third, 5])
    assert answer(tiny_model, tiny_tokenizer, [request]) == [expected] != [free]


def test_generation_is_cut_before_the_first_stop_string(tiny_model, tiny_tokenizer):
    free = continue_alone(tiny_model, tiny_tokenizer, Generate(PROMPT, 10))
    request = Generate(PROMPT, 10, stop=(free[5], free[3:5]))
    assert answer(tiny_model, tiny_tokenizer, [request]) == [free[: min(free.index(s) for s in request.stop)]]
    lengths = count_rows(tiny_model)
    answer(tiny_model, tiny_tokenizer, [request])
    assert len(lengths) < 10  # it did not go on after the stop string


def test_settings_of_the_checkpoint_do_not_matter_and_stay(tiny_model, tiny_tokenizer, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    requests = [Generate(PROMPT, 6), Generate("SELECT", 6)]
    expected = [continue_alone(tiny_model, tiny_tokenizer, request) for request in requests]
    config = GenerationConfig(do_sample=True, temperature=0.6, repetition_penalty=9.0, max_length=7, min_new_tokens=20)
    tiny_model.generation_config = config
    assert answer(tiny_model, tiny_tokenizer, requests) == expected
    assert tiny_model.generation_config is config
    assert caplog.messages == []


def test_rows_that_have_ended_leave_the_batch(tiny_model, tiny_tokenizer):
    free = {prompt: continue_alone(tiny_model, tiny_tokenizer, Generate(prompt, 60)) for prompt in WORDS[:12]}
    # A stop string that some rows meet early, some late and some never.
    stop = min(set("".join(free.values())), key=lambda c: abs(sum(c in text[:30] for text in free.values()) - 6))
    requests = [Generate(prompt, 60, (stop,)) for prompt in free]
    shapes = count_rows(tiny_model)
    answers = answer(tiny_model, tiny_tokenizer, requests)
    assert answers == [text.split(stop)[0] for text in free.values()]
    assert len({len(text) for text in answers}) > 3
    rows = [shape[0] for shape in shapes]
    assert rows[0] == 12 and rows == sorted(rows, reverse=True) and rows[-1] < 12


def test_a_stop_string_may_come_in_pieces_of_two_rounds(tiny_model, tiny_tokenizer):
    free = continue_alone(tiny_model, tiny_tokenizer, Generate(PROMPT, 40))
    for end in range(3, len(free), 5):
        stop = free[end - 3 : end]
        (text,) = answer(tiny_model, tiny_tokenizer, [Generate(PROMPT, 40, (stop,))])
        assert text == free[: free.index(stop)]


def test_a_stop_string_may_be_a_special_token(tiny_model, tiny_tokenizer):
    ids = tiny_tokenizer(PROMPT).input_ids
    with torch.no_grad():
        for _ in range(3):
            ids.append(int(tiny_model.eval()(torch.tensor([ids])).logits[0, -1].argmax()))
        tiny_model.lm_head.weight[0] = tiny_model.lm_head.weight[ids[-1]] * 1.01  # <s>, which is no end token here
    shapes = count_rows(tiny_model)
    (text,) = answer(tiny_model, tiny_tokenizer, [Generate(PROMPT, 40, ("<s>",))])
    assert "<s>" not in text and len(shapes) < 16
