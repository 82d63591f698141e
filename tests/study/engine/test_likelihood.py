import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from molf.study.engine.inference import answer
from molf.study.engine.likelihood import encode, longest_inputs
from molf.tasks import Generate, Likelihood, NextToken
from oracles import PROMPT, WORDS, assert_same, continue_alone, count_rows, make_requests, score_alone


@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
@pytest.mark.parametrize("bos", [False, True])
def test_likelihoods_equal_the_oracle(tiny_model, tiny_tokenizer, bos_tokenizer, batch_tokens, bos):
    tokenizer = bos_tokenizer if bos else tiny_tokenizer
    requests = make_requests(60)
    expected = [score_alone(tiny_model, tokenizer, request) for request in requests]
    assert_same(answer(tiny_model, tokenizer, requests, batch_tokens=batch_tokens), expected)


def test_a_model_with_learned_positions_and_one_without_logits_to_keep(tiny_tokenizer):
    class AllLogits(GPT2LMHeadModel):
        def forward(self, input_ids, attention_mask, position_ids):
            return super().forward(input_ids, attention_mask=attention_mask, position_ids=position_ids)

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=2, n_positions=256, initializer_range=0.3)
    model = GPT2LMHeadModel(config)
    requests = make_requests(40, seed=1)
    expected = [score_alone(model, tiny_tokenizer, request) for request in requests]
    assert_same(answer(model, tiny_tokenizer, requests), expected)
    plain = AllLogits(config)
    plain.load_state_dict(model.state_dict())
    assert_same(answer(plain, tiny_tokenizer, requests), expected)


def test_a_peft_model_answers_with_its_adapter_and_few_logits(tiny_model, tiny_tokenizer):
    requests = make_requests(8)
    before = answer(tiny_model, tiny_tokenizer, requests)
    model = get_peft_model(tiny_model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    shapes = count_rows(model.get_base_model())
    found = answer(model, tiny_tokenizer, requests)
    assert all(kept < length for _, length, kept in shapes)
    assert_same(found, [score_alone(model, tiny_tokenizer, request) for request in requests])
    assert found != before
    generate = Generate(PROMPT, 6)
    assert answer(model, tiny_tokenizer, [generate]) == [continue_alone(model, tiny_tokenizer, generate)]


def test_one_token_targets_of_one_prompt_cost_one_row_and_one_position(tiny_model, tiny_tokenizer):
    shapes = count_rows(tiny_model)
    answers = answer(tiny_model, tiny_tokenizer, [Likelihood(PROMPT, target) for target in ("A", "B", "C")])
    assert all(len(scores.token_ids) == 1 for scores in answers)
    assert shapes == [(1, len(tiny_tokenizer(PROMPT).input_ids), 1)]


def test_an_input_that_begins_another_one_is_read_off_it(tiny_model, tiny_tokenizer):
    requests = [Likelihood(PROMPT, "A"), Likelihood(PROMPT, "AB"), Likelihood(PROMPT + "A", "BC")]
    shapes = count_rows(tiny_model)
    answers = answer(tiny_model, tiny_tokenizer, requests)
    assert shapes == [(1, len(tiny_tokenizer(PROMPT).input_ids) + 2, 3)]
    assert_same(answers, [score_alone(tiny_model, tiny_tokenizer, request) for request in requests])


def test_longest_inputs_of_a_family():
    family = [(1,), (1, 2), (1, 2, 3), (1, 3), (2,), (1, 2)]
    longest = longest_inputs(family)
    assert longest == {(1,): (1, 2, 3), (1, 2): (1, 2, 3), (1, 2, 3): (1, 2, 3), (1, 3): (1, 3), (2,): (2,)}


def test_the_likeliest_token_is_greedy_and_ties_are_too(tiny_model, tiny_tokenizer):
    first = continue_alone(tiny_model, tiny_tokenizer, Generate(PROMPT, 1))
    wins, loses = answer(tiny_model, tiny_tokenizer, [Likelihood(PROMPT, first), Likelihood(PROMPT, "?")])
    assert (wins.greedy, loses.greedy) == ((True,), (False,))
    torch.nn.init.zeros_(tiny_model.lm_head.weight)
    assert answer(tiny_model, tiny_tokenizer, [Likelihood(PROMPT, "?")])[0].greedy == (True,)


def test_tokens_are_those_that_training_sees(tiny_model, tiny_tokenizer, bos_tokenizer, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    merged = ("The capital of Fra", "nce")  # tokens Fr-a alone, but Fr-anc-e together
    examples = [(PROMPT, " Paris"), (PROMPT, " Rome and"), ("SELECT", " age > 30"), merged]
    for tokenizer in (tiny_tokenizer, bos_tokenizer):
        args = SFTConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False)
        data = Dataset.from_list([{"prompt": prompt, "completion": target} for prompt, target in examples])
        trainer = SFTTrainer(tiny_model, args, train_dataset=data, processing_class=tokenizer)
        encoded = list(encode(tokenizer, [Likelihood(*example) for example in examples]).values())
        for row, target in zip(trainer.train_dataset, encoded, strict=True):
            trained = [token for token in row["labels"] if token != -100]
            assert row["input_ids"] == [*target.ids, tokenizer.eos_token_id]
            assert trained == [*target.token_ids, tokenizer.eos_token_id]
        assert tokenizer.decode(encoded[-1].token_ids) == "ance"


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
