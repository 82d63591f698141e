"""Answers a task's requests with a language model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from molf.study.engine.examples import joined, runs_in_loss, tokenize_examples
from molf.study.engine.generation import generate_texts
from molf.study.engine.likelihood import encode, score_targets
from molf.study.engine.next_token import check_options, read_options, targets_of
from molf.tasks.base import Answer, ExampleTokens, Generate, Likelihood, NextToken, Request

TextGenerator: TypeAlias = Callable[[Sequence[Generate]], Mapping[Request, str]]
"""Continues the prompts of distinct requests."""


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    *,
    batch_tokens: int = 4096,
    progress: bool = False,
    generate: TextGenerator | None = None,
) -> list[Answer]:
    """Answer every request, in their order, with the model in evaluation mode.

    Prompt and target are tokenized together, as TRL's ``SFTTrainer`` does in training: the target's tokens are those
    of ``prompt + target`` after the longest beginning it shares with the tokens of ``prompt`` alone. So where the two
    texts merge at their border, the merged token belongs to the target.

    Args:
        model: A causal language model, or a PEFT model around one. Its training flags are restored.
        tokenizer: Its tokenizer; not changed.
        requests: What to ask.
        batch_tokens: The most tokens a batch may have, padding and room for generated tokens included. A longer
            request is a batch of its own. Memory grows with it; answers change by no more than rounding.
        progress: Show progress bars.
        generate: Answers the ``Generate`` requests in place of the model, such as a ``VllmGenerator``.

    Returns:
        ``TargetScores`` for a ``Likelihood`` or ``ExampleTokens``, ``OptionScores`` for a ``NextToken``, the new text for
        a ``Generate``.

    Raises:
        ValueError: If a target has no tokens, an option is not exactly one token, or no token comes before what is
            asked for.
        FloatingPointError: If the model gives NaN.
    """
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens={batch_tokens} must be at least 1")
    distinct = dict.fromkeys(requests)
    likelihoods = [request for request in distinct if isinstance(request, Likelihood)]
    choices = [request for request in distinct if isinstance(request, NextToken)]
    generations = [request for request in distinct if isinstance(request, Generate)]
    encoded = encode(tokenizer, [*likelihoods, *(target for choice in choices for target in targets_of(choice))])
    for choice in choices:
        check_options(choice, encoded)
    examples = [request for request in distinct if isinstance(request, ExampleTokens)]
    tokenized = tokenize_examples(tokenizer, [request.example for request in examples])
    runs = {request: runs_in_loss(example) for request, example in zip(examples, tokenized, strict=True)}
    flat = {(request, number): run for request, own in runs.items() for number, run in enumerate(own)}
    answers: dict[Request, Answer] = {}
    with _evaluating(model), torch.inference_mode():
        scores = score_targets(model, encoded, batch_tokens=batch_tokens, progress=progress)
        answers.update(scores.items())
        answers.update((choice, read_options(choice, scores)) for choice in choices)
        if flat:
            found = score_targets(model, flat, batch_tokens=batch_tokens, progress=progress)
            answers.update(
                (request, joined([found[request, n] for n in range(len(own))])) for request, own in runs.items()
            )
        if generate is None:
            answers.update(generate_texts(model, tokenizer, generations, batch_tokens=batch_tokens, progress=progress))
    if generate is not None and generations:
        answers.update(generate(generations))
    return [answers[request] for request in requests]


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Put the model in evaluation mode; afterwards every module has its own training flag again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
