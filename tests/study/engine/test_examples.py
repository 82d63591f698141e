import copy
import math
import resource

import pytest
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from molf.study.engine import bounded
from molf.study.engine.evaluate import evaluate
from molf.study.engine.examples import ExampleIds, runs_in_loss, tokenize_examples
from molf.study.engine.inference import answer
from molf.tasks import ExampleTokens, Generate, TargetScores
from molf.tasks.custom import Custom

TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '</s>' }}{% endgeneration %}{% else %}{{ m.content }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def chat(*contents):
    roles = ("user", "assistant") * len(contents)
    return {"messages": [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]}


EXAMPLES = {
    "pairs": [{"prompt": "The capital of Italy is", "completion": " Rome"}, {"prompt": "age >", "completion": " 30;"}],
    "conversations": [chat("Which capital?", "Paris"), chat("Who?", "the king", "His tongue?", "French")],
    "texts": [{"text": "The king is French."}, {"text": "SELECT name FROM singer;"}, {"text": "age"}],
}


@pytest.fixture
def tokenizer(tiny_tokenizer):
    """The tiny tokenizer with a chat template, for one test to change."""
    own = copy.deepcopy(tiny_tokenizer)
    own.chat_template, own.pad_token = TEMPLATE, "</s>"
    return own


@pytest.fixture
def make_trainer(tiny_model, tmp_path):
    """The stock trainer on examples, as a run makes it."""

    def make(tokenizer, examples, **settings):
        rows = Dataset.from_list(examples)
        settings |= {"per_device_eval_batch_size": len(examples), "assistant_only_loss": "messages" in examples[0]}
        quiet = {"report_to": "none", "bf16": False, "use_cpu": True, "dataloader_pin_memory": False}
        args = SFTConfig(str(tmp_path / "trainer"), **quiet, **settings)
        return SFTTrainer(tiny_model, args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)

    return make


@pytest.mark.parametrize("form", EXAMPLES)
def test_tokens_and_loss_are_those_of_the_trainer(tokenizer, make_trainer, form):
    found = tokenize_examples(tokenizer, EXAMPLES[form])
    trainer = make_trainer(tokenizer, EXAMPLES[form])
    for ours, row in zip(found, trainer.train_dataset, strict=True):
        assert list(ours.ids) == row["input_ids"]
        labels = [token if wanted else -100 for token, wanted in zip(ours.ids, ours.in_loss, strict=True)]
        assert labels == row["labels"]
    metrics = evaluate(trainer.model, tokenizer, Custom(), EXAMPLES[form]).metrics
    theirs = trainer.evaluate()
    assert metrics["loss"].value == pytest.approx(theirs["eval_loss"], abs=1e-5)
    assert metrics["perplexity"].value == pytest.approx(math.exp(theirs["eval_loss"]), rel=1e-4)
    assert metrics["token_accuracy"].value == pytest.approx(100 * theirs["eval_mean_token_accuracy"], abs=1e-4)


def test_texts_begin_with_the_token_that_the_tokenizer_begins_with(bos_tokenizer, make_trainer):
    own = copy.deepcopy(bos_tokenizer)
    own.pad_token = "</s>"
    trainer = make_trainer(own, EXAMPLES["texts"])
    metrics = evaluate(trainer.model, own, Custom(), EXAMPLES["texts"]).metrics
    assert metrics["loss"].value == pytest.approx(trainer.evaluate()["eval_loss"], abs=1e-5)


@pytest.mark.parametrize("form", EXAMPLES)
@pytest.mark.parametrize("batch_tokens", [1, 4096])
def test_scores_are_those_of_one_row_at_a_time(tokenizer, tiny_model, form, batch_tokens):
    found = answer(tiny_model, tokenizer, [ExampleTokens(e) for e in EXAMPLES[form]], batch_tokens=batch_tokens)
    tiny_model.eval()
    for scores, example in zip(found, tokenize_examples(tokenizer, EXAMPLES[form]), strict=True):
        logits = tiny_model(torch.tensor([example.ids])).logits[0].detach().log_softmax(-1)
        wanted = [position for position in range(1, len(example.ids)) if example.in_loss[position]]
        assert isinstance(scores, TargetScores)
        assert scores.token_ids == tuple(example.ids[position] for position in wanted)
        expected = torch.tensor([logits[position - 1, example.ids[position]] for position in wanted])
        torch.testing.assert_close(torch.tensor(scores.logprobs), expected, rtol=0, atol=1e-5)
        assert list(scores.greedy) == [int(logits[p - 1].argmax()) == example.ids[p] for p in wanted]


def test_exact_match_is_what_greedy_decoding_gives(tokenizer, tiny_model):
    prompts = ["The capital of Italy is", "SELECT name", "Who is the king?"]
    texts = answer(tiny_model, tokenizer, [Generate(prompt, 5) for prompt in prompts])
    # What a tokenizer gives back otherwise than it was generated could not match.
    length = lambda text: len(tokenizer(text)["input_ids"])  # noqa: E731
    pairs = [(p, t) for p, t in zip(prompts, texts, strict=True) if t and length(p + t) > length(p)]
    rows = [{"prompt": prompt, "completion": text} for prompt, text in pairs]
    scores = answer(tiny_model, tokenizer, [ExampleTokens(row) for row in rows])
    assert scores and all(all(score.greedy[:-1]) for score in scores)


def test_only_what_something_predicts_is_scored():
    assert [(r.ids, r.start) for r in runs_in_loss(ExampleIds((5, 6, 7, 8, 9), (True, True, False, True, True)))] == [
        ((5, 6), 1),
        ((5, 6, 7, 8, 9), 3),
    ]
    with pytest.raises(ValueError, match="nothing predicts a token of the example"):
        runs_in_loss(ExampleIds((5, 6), (True, False)))


def test_unfit_chat_templates_are_told(tokenizer):
    conversation = [chat("Who?", "the king")]
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template; pass one with --chat_template_path FILE.jinja"):
        tokenize_examples(tokenizer, conversation)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="does not mark the assistant.s messages.*--chat_template_path FILE.jinja"):
        tokenize_examples(tokenizer, conversation)
    refusing = "{{ raise_exception('no systems here') }}{% generation %}{% endgeneration %}"
    tokenizer.chat_template = refusing
    with pytest.raises(ValueError, match="rejects the messages .*the king.*: no systems here"):
        tokenize_examples(tokenizer, conversation)
    tokenizer.chat_template = "x{% generation %}{% endgeneration %}"
    with pytest.raises(ValueError, match="marks no assistant token in the messages .*the king"):
        tokenize_examples(tokenizer, conversation)


def test_a_template_gets_the_tools_and_the_variables_of_its_row(tokenizer):
    said = "{% generation %}{{ messages[-1].content }}{% endgeneration %}"
    tokenizer.chat_template = "{{ tools[0].name if tools }}{{ mood }}" + said
    given = {"tools": [{"name": "king"}], "chat_template_kwargs": {"mood": "Rome"}}
    found = tokenize_examples(tokenizer, [chat("Who?", "x") | given, chat("Who?", "x")])
    assert [tokenizer.decode(one.ids) for one in found] == ["kingRomex", "x"]
    taken = chat("Who?", "x") | {"chat_template_kwargs": {"tokenize": False}}
    with pytest.raises(ValueError, match="conversation 2: tokenize cannot be set there"):
        tokenize_examples(tokenizer, [chat("Who?", "x"), taken])
    tokenizer.chat_template = "{{ 1 // (messages | length - 2) }}" + said
    with pytest.raises(ValueError, match="rejects the messages .*Who.* of conversation 1: .*zero"):
        tokenize_examples(tokenizer, [chat("Who?", "x")])


@pytest.mark.parametrize(
    "program, reason",
    [
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "it takes more than 0.1 sec",
        ),
        ("{{ messages[0].content * 9999999999 }}", "it needs too much memory"),
        ("{{ 'x' * 10 ** 10 }}", "it needs too much memory"),
        ("{{ messages[0].content * 9999999 }}", "its text has .* characters, more than 10,000,000"),
    ],
)
def test_a_template_cannot_hang_or_fill_the_memory(tokenizer, monkeypatch, program, reason):
    monkeypatch.setattr(bounded, "SECONDS", 0.1)
    limits = [resource.getrlimit(number) for number in (resource.RLIMIT_AS, resource.RLIMIT_CPU)]
    # Only where it is not one of the conversations that TRL tries it on, and then on all.
    only = "{% if messages[0].content == 'Who?' %}" + program + "{% endif %}"
    for own in (only, program):
        tokenizer.chat_template = own + "{% generation %}{{ messages[-1].content }}{% endgeneration %}"
        with pytest.raises(ValueError, match=f"template (fails|rejects .* of conversation 1): {reason}"):
            tokenize_examples(tokenizer, [chat("Who?", "the king")])
    assert limits == [resource.getrlimit(number) for number in (resource.RLIMIT_AS, resource.RLIMIT_CPU)]
    tokenizer.chat_template = "{% generation %}{{ messages[-1].content }}{% endgeneration %}"
    assert len(tokenize_examples(tokenizer, [chat("Who?", "the king")])) == 1


def test_a_known_template_without_marks_is_replaced_by_its_variant_for_training(tokenizer):
    from trl.chat_template_utils import qwen3_instruct_2507_chat_template as known

    tokenizer.chat_template = known
    (found,) = tokenize_examples(tokenizer, [chat("Who?", "the king")])
    said = [token for token, wanted in zip(found.ids, found.in_loss, strict=True) if wanted]
    assert tokenizer.decode(said).startswith("the king<|im_end|>")


def test_an_end_token_is_needed(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has no end-of-text token"):
        tokenize_examples(tokenizer, EXAMPLES["texts"])
