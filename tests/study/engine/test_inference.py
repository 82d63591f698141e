import logging
import random
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from molf.study.engine.batching import batches
from molf.study.engine.inference import answer
from molf.study.engine.likelihood import encode, longest_inputs
from molf.tasks import Generate, Likelihood, NextToken, TargetScores

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

# PEFT and TRL still use names that transformers has announced to drop.
libraries_disagree = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


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


# --- likelihoods ---


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


@libraries_disagree
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


def test_batches_keep_to_their_bound(tiny_model, tiny_tokenizer):
    shapes = count_rows(tiny_model)
    answer(tiny_model, tiny_tokenizer, make_requests(60), batch_tokens=64)
    assert all(rows == 1 or rows * length <= 64 for rows, length, _ in shapes)
    assert any(rows > 1 for rows, _, _ in shapes)


def test_longest_inputs_of_a_family():
    family = [(1,), (1, 2), (1, 2, 3), (1, 3), (2,), (1, 2)]
    longest = longest_inputs(family)
    assert longest == {(1,): (1, 2, 3), (1, 2): (1, 2, 3), (1, 2, 3): (1, 2, 3), (1, 3): (1, 3), (2,): (2,)}


def test_batches_of_rows_longer_than_the_bound_are_single():
    rows = [(0,) * length for length in (9, 4, 2, 2, 2, 1)]
    assert [[len(row) for row in batch] for batch in batches(rows, len, 6)] == [[9], [4], [2, 2, 2], [1]]


# --- tokens ---


@libraries_disagree
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


def test_targets_that_cannot_be_scored(tiny_model, tiny_tokenizer, bos_tokenizer):
    with pytest.raises(ValueError, match="the target '' adds no token to the prompt 'The'"):
        answer(tiny_model, tiny_tokenizer, [Likelihood("The", "")])
    with pytest.raises(ValueError, match="no token comes before the target 'The' of the prompt ''"):
        answer(tiny_model, tiny_tokenizer, [Likelihood("", "The")])
    with pytest.raises(ValueError, match="nothing to continue: the prompt is empty"):
        answer(tiny_model, tiny_tokenizer, [Generate("", 3)])
    answers = answer(tiny_model, bos_tokenizer, [Likelihood("", "The"), Generate("", 3)])
    assert isinstance(answers[0], TargetScores) and isinstance(answers[1], str)


def test_a_broken_model_is_an_error(tiny_model, tiny_tokenizer):
    torch.nn.init.constant_(tiny_model.model.norm.weight, float("nan"))
    with pytest.raises(FloatingPointError, match="NaN"):
        answer(tiny_model, tiny_tokenizer, [Likelihood(PROMPT, " Paris")])


# --- choices of the next token ---


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


def test_the_likeliest_token_is_greedy_and_ties_are_too(tiny_model, tiny_tokenizer):
    first = continue_alone(tiny_model, tiny_tokenizer, Generate(PROMPT, 1))
    wins, loses = answer(tiny_model, tiny_tokenizer, [Likelihood(PROMPT, first), Likelihood(PROMPT, "?")])
    assert (wins.greedy, loses.greedy) == ((True,), (False,))
    torch.nn.init.zeros_(tiny_model.lm_head.weight)
    assert answer(tiny_model, tiny_tokenizer, [Likelihood(PROMPT, "?")])[0].greedy == (True,)


# --- generation ---


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


# --- both ---


def test_mixed_requests_keep_their_order_in_any_order(tiny_model, tiny_tokenizer):
    requests = [*make_requests(20), Generate(PROMPT, 4), Generate("SELECT", 4), Generate(PROMPT, 4)]
    random.Random(3).shuffle(requests)
    answers = answer(tiny_model, tiny_tokenizer, requests)
    backwards = answer(tiny_model, tiny_tokenizer, requests[::-1])[::-1]
    for request, one, other in zip(requests, answers, backwards, strict=True):
        if isinstance(request, Generate):
            assert one == other == continue_alone(tiny_model, tiny_tokenizer, request)
        else:
            assert_same([one, other], [score_alone(tiny_model, tiny_tokenizer, request)] * 2)


def test_nothing_asked_nothing_answered(tiny_model, tiny_tokenizer):
    assert answer(tiny_model, tiny_tokenizer, []) == []


def test_a_bound_of_nothing_is_refused(tiny_model, tiny_tokenizer):
    with pytest.raises(ValueError, match="batch_tokens=0 must be at least 1"):
        answer(tiny_model, tiny_tokenizer, [], batch_tokens=0)


def test_model_and_tokenizer_are_left_as_they_were(tiny_model, tiny_tokenizer):
    tiny_model.train()
    tiny_model.model.layers[0].eval()
    before = [module.training for module in tiny_model.modules()]
    side, pad = tiny_tokenizer.padding_side, tiny_tokenizer.pad_token
    answer(tiny_model, tiny_tokenizer, [Likelihood(PROMPT, " Rome"), Generate(PROMPT, 2)])
    assert [module.training for module in tiny_model.modules()] == before
    assert (tiny_tokenizer.padding_side, tiny_tokenizer.pad_token) == (side, pad)
    with pytest.raises(ValueError):
        answer(tiny_model, tiny_tokenizer, [Likelihood(PROMPT, "")])
    assert [module.training for module in tiny_model.modules()] == before


def test_training_goes_on_after_an_evaluation(tiny_model, tiny_tokenizer):
    answer(tiny_model, tiny_tokenizer, [Likelihood(PROMPT, " Rome"), Generate(PROMPT, 2)])
    ids = torch.tensor([tiny_tokenizer(PROMPT).input_ids])
    tiny_model.train()(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in tiny_model.parameters())


def test_progress_is_shown_only_on_request(tiny_model, tiny_tokenizer, capsys):
    answer(tiny_model, tiny_tokenizer, [Likelihood(PROMPT, " Rome")])
    assert capsys.readouterr().err == ""
    answer(tiny_model, tiny_tokenizer, [Likelihood(PROMPT, " Rome")], progress=True)
    assert "Likelihoods" in capsys.readouterr().err
