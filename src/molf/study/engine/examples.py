"""The tokens of training examples, exactly as TRL's ``SFTTrainer`` makes them."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template

from molf.errors import MolfError
from molf.study.engine.batching import Ids, tokenize
from molf.study.engine.bounded import bounded
from molf.study.engine.likelihood import EncodedTarget, encode
from molf.tasks.base import Likelihood

_LONGEST_TEXT = 10_000_000
"""Most characters of a conversation; tokenising them takes thousands of times their memory, outside of any bounds."""


@dataclass(frozen=True)
class ExampleIds:
    """The tokens of a training example and, for each, whether it counts in the loss."""

    ids: Ids
    in_loss: tuple[bool, ...]


def tokenize_examples(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Mapping[str, Any]]) -> list[ExampleIds]:
    """Tokenize examples, all with the same keys, without truncation, and mark the tokens that count in the loss.

    These are: the completion and the end token that training appends; the assistant's messages, as marked by the chat
    template; or a whole text.
    """
    if not examples:
        return []
    if "messages" in examples[0]:
        template = training_template(tokenizer)
        return [_conversation(tokenizer, template, row, number) for number, row in enumerate(examples, start=1)]
    if "text" in examples[0]:
        ids = tokenize(tokenizer, texts := [_with_end(tokenizer, example["text"]) for example in examples])
        return [ExampleIds(ids[text], (True,) * len(ids[text])) for text in texts]
    requests = [Likelihood(example["prompt"], _with_end(tokenizer, example["completion"])) for example in examples]
    encoded = encode(tokenizer, requests)
    return [
        ExampleIds(one.ids, tuple(position >= one.start for position in range(len(one.ids))))
        for one in (encoded[request] for request in requests)
    ]


def _with_end(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    end = tokenizer.eos_token
    if end is None:
        raise MolfError("the tokenizer has no end-of-text token, so training could not teach the model where to stop")
    return text if text.endswith(end) else f"{text}{end}"


def _conversation(
    tokenizer: PreTrainedTokenizerBase, template: str | None, example: Mapping[str, Any], number: int
) -> ExampleIds:
    messages = list(example["messages"])
    shown = repr(messages)
    row = f"the messages {shown if len(shown) <= 500 else f'{shown[:500]}...'} of conversation {number}"
    variables = dict(example.get("chat_template_kwargs") or {})
    if taken := variables.keys() & inspect.signature(tokenizer.apply_chat_template).parameters:
        raise MolfError(f"chat_template_kwargs beside {row}: {', '.join(sorted(taken))} cannot be set there; remove it")
    variables |= {"tools": example.get("tools"), "chat_template": template}
    try:
        with bounded():
            text = tokenizer.apply_chat_template(messages, tokenize=False, **variables)
        if len(text) > _LONGEST_TEXT:
            raise ValueError(f"its text has {len(text):,} characters, more than {_LONGEST_TEXT:,}")
        found = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **variables
        )
    except Exception as error:  # a template is a program; whatever it raises, this row is the reason
        raise MolfError(f"the chat template rejects {row}: {_reason(error)}") from error
    in_loss = tuple(map(bool, found["assistant_masks"]))
    if not any(in_loss):
        raise MolfError(f"the chat template marks no assistant token in {row}")
    return ExampleIds(tuple(found["input_ids"]), in_loss)


def _reason(error: Exception) -> str:
    return "it needs too much memory" if isinstance(error, MemoryError) else str(error) or type(error).__name__


def training_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the chat template for training: None for the tokenizer's own, otherwise TRL's training variant of it."""
    if tokenizer.chat_template is None:
        raise MolfError(
            "the rows are conversations, but the tokenizer has no chat template; pass one with --chat_template_path "
            "FILE.jinja that puts {% generation %} and {% endgeneration %} around the assistant's messages"
        )
    try:
        with bounded():  # TRL tries the template on conversations of its own
            template: str | None = get_training_chat_template(tokenizer)
    except ValueError as error:
        raise MolfError(
            "the tokenizer's chat template does not mark the assistant's messages, and TRL has no variant of it that does; "
            "pass a copy with {% generation %} and {% endgeneration %} around them as --chat_template_path FILE.jinja"
        ) from error
    except Exception as error:
        raise MolfError(f"the tokenizer's chat template fails: {_reason(error)}") from error
    return template


def runs_in_loss(example: ExampleIds) -> list[EncodedTarget]:
    """Return each run of tokens that count in the loss as a target after everything before it.

    The very first token is left out, as in training: nothing predicts it.
    """
    targets = []
    for wanted, run in groupby(range(1, len(example.ids)), key=lambda position: example.in_loss[position]):
        positions = list(run)
        if wanted:
            targets.append(EncodedTarget(example.ids[: positions[-1] + 1], positions[0]))
    if not targets:
        raise MolfError(f"nothing predicts a token of the example with the tokens {example.ids}")
    return targets
