"""The tokens of training examples, exactly as TRL's ``SFTTrainer`` makes them, and their scores put together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template

from molf.study.engine.batching import Ids, tokenize
from molf.study.engine.likelihood import EncodedTarget, encode
from molf.tasks.base import Likelihood, TargetScores


@dataclass(frozen=True)
class ExampleIds:
    """The tokens of a training example, and for each whether it is in the loss."""

    ids: Ids
    in_loss: tuple[bool, ...]


def tokenize_examples(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Mapping[str, Any]]) -> list[ExampleIds]:
    """Return the tokens of examples of one form before any truncation, and which of them are in the loss.

    In the loss are, of prompt and completion, the completion and the end token that training appends; of a conversation,
    what its assistant says, by the marks of the chat template; of a text, everything.

    Args:
        tokenizer: The tokenizer. Where its chat template marks nothing, TRL's variant for training is used.
        examples: Each ``{"prompt", "completion"}``, each ``{"messages"}`` or each ``{"text"}``.

    Raises:
        ValueError: If nothing of one is in the loss, or the chat template is not fit for it.
    """
    if not examples:
        return []
    if "messages" in examples[0]:
        template = training_template(tokenizer)
        return [_conversation(tokenizer, template, example["messages"]) for example in examples]
    if "text" in examples[0]:
        ids = tokenize(tokenizer, texts := [_ended(tokenizer, example["text"]) for example in examples])
        return [ExampleIds(ids[text], (True,) * len(ids[text])) for text in texts]
    requests = [Likelihood(example["prompt"], _ended(tokenizer, example["completion"])) for example in examples]
    encoded = encode(tokenizer, list(dict.fromkeys(requests)))
    return [_completion(encoded[request]) for request in requests]


def _ended(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    end = tokenizer.eos_token
    if end is None:
        raise ValueError("the tokenizer has no end-of-text token, so that nothing could teach the model where to stop")
    return text if text.endswith(end) else f"{text}{end}"


def _completion(target: EncodedTarget) -> ExampleIds:
    return ExampleIds(target.ids, tuple(position >= target.start for position in range(len(target.ids))))


def _conversation(
    tokenizer: PreTrainedTokenizerBase, template: str | None, messages: Sequence[Mapping[str, str]]
) -> ExampleIds:
    try:
        found = tokenizer.apply_chat_template(
            list(messages), chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
    except TemplateError as error:
        raise ValueError(f"the chat template refuses the messages {list(messages)!r}: {error}") from error
    in_loss = tuple(map(bool, found["assistant_masks"]))
    if not any(in_loss):
        raise ValueError(f"the chat template marks no token of the assistant's in the messages {list(messages)!r}")
    return ExampleIds(tuple(found["input_ids"]), in_loss)


def training_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the chat template to train by: None for the tokenizer's own, else TRL's variant of it.

    Raises:
        ValueError: If the tokenizer has none, or one that does not mark what the assistant says and TRL has no variant of.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            "the rows are conversations, and the tokenizer has no chat template; give one with --chat_template_path "
            "FILE.jinja, with {% generation %} and {% endgeneration %} around what the assistant says"
        )
    try:
        template: str | None = get_training_chat_template(tokenizer)
    except ValueError as error:
        raise ValueError(
            "the tokenizer's chat template does not mark what the assistant says, and TRL knows no variant of it that does; "
            "give a copy with {% generation %} and {% endgeneration %} around it as --chat_template_path FILE.jinja"
        ) from error
    return template


def runs_in_loss(example: ExampleIds) -> list[EncodedTarget]:
    """Return the runs of tokens that are in the loss, each as a target after all that comes before it.

    A first token that nothing comes before is left out, as in training: nothing predicts it.

    Raises:
        ValueError: If there is no other token.
    """
    targets = []
    for wanted, run in groupby(range(1, len(example.ids)), key=lambda position: example.in_loss[position]):
        positions = list(run)
        if wanted:
            targets.append(EncodedTarget(example.ids[: positions[-1] + 1], positions[0], merges=False))
    if not targets:
        raise ValueError(f"nothing predicts a token of the example with the tokens {example.ids}")
    return targets


def joined(scores: Sequence[TargetScores]) -> TargetScores:
    """Return the scores of an example from those of its runs."""
    return TargetScores(
        tuple(chain.from_iterable(score.logprobs for score in scores)),
        tuple(chain.from_iterable(score.token_ids for score in scores)),
        tuple(chain.from_iterable(score.greedy for score in scores)),
    )
