"""Answers a task's requests with a language model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from molf.setup.discovery import output_embeddings
from molf.study.engine.batching import Ids
from molf.study.engine.examples import runs_in_loss, tokenize_examples
from molf.study.engine.generation import generate_texts, prompt_ids
from molf.study.engine.likelihood import EncodedTarget, check_option, encode, score_targets
from molf.tasks.base import Answer, ExampleTokens, Generate, Likelihood, NextToken, OptionScores, Request, TargetScores

TextGenerator: TypeAlias = Callable[[Sequence[Generate]], Mapping[Request, str]]
"""Returns the greedy continuation of each of several distinct requests."""


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    *,
    batch_tokens: int = 4096,
    progress: bool = False,
    generate: TextGenerator | None = None,
) -> list[Answer]:
    """Answer requests, in order, with the model in evaluation mode.

    Prompt and target are tokenized together, as TRL's ``SFTTrainer`` does: the target's tokens are those of
    ``prompt + target`` after the longest prefix shared with the tokens of ``prompt`` alone. If the two texts merge at
    their border, the merged token belongs to the target.

    Args:
        model: A causal language model, or a PEFT model around one. Its training flags are restored.
        tokenizer: Its tokenizer; not changed.
        requests: The requests. Equal ones are answered once.
        batch_tokens: Maximum number of tokens in a batch, including padding and room for generated tokens. A longer
            request forms a batch of its own. Memory grows with it; answers change only by rounding.
        progress: Show progress bars.
        generate: Answers the ``Generate`` requests instead of the model, for example a ``VllmGenerator``.

    Returns:
        ``TargetScores`` for a ``Likelihood`` or ``ExampleTokens``, ``OptionScores`` for a ``NextToken``, the new text for
        a ``Generate``.

    Raises:
        MolfError: A target has no tokens, an option is not exactly one token, no token precedes a target, or the model's
            logits contain NaN.
    """
    distinct = list(dict.fromkeys(requests))
    generations = [request for request in distinct if isinstance(request, Generate)]
    targets = _targets(tokenizer, distinct)
    answers: dict[Request, Answer] = {}
    with evaluation_mode(model), torch.inference_mode():
        scores = score_targets(
            model, chain.from_iterable(targets.values()), batch_tokens=batch_tokens, progress=progress
        )
        answers.update((request, _join(request, [scores[one] for one in own])) for request, own in targets.items())
        if generate is None:
            answers.update(generate_texts(model, tokenizer, generations, batch_tokens=batch_tokens, progress=progress))
    if generate is not None and generations:
        answers.update(generate(generations))
    return [answers[request] for request in requests]


def positions_needed(
    tokenizer: PreTrainedTokenizerBase, requests: Sequence[Request]
) -> Iterator[tuple[Request, Ids, int]]:
    """Yield the tokens that each request puts before the model, and how many positions these and new ones take.

    Raises:
        MolfError: A request cannot be tokenised, as in ``answer``.
    """
    targets = _targets(tokenizer, requests)
    generations = [request for request in requests if isinstance(request, Generate)]
    prompts = prompt_ids(tokenizer, generations)
    scored = ((request, one.ids, len(one.input)) for request, own in targets.items() for one in own)
    return chain(scored, ((g, ids := prompts[g.prompt], len(ids) + g.max_new_tokens) for g in generations))


def _targets(tokenizer: PreTrainedTokenizerBase, requests: Sequence[Request]) -> dict[Request, list[EncodedTarget]]:
    """Return the targets to score for every request that does not generate."""
    likelihoods: dict[Request, list[Likelihood]] = {one: [one] for one in requests if isinstance(one, Likelihood)}
    choices = [request for request in requests if isinstance(request, NextToken)]
    likelihoods |= {choice: [Likelihood(choice.prompt, option) for option in choice.options] for choice in choices}
    encoded = encode(tokenizer, list(chain.from_iterable(likelihoods.values())))
    for option in chain.from_iterable(likelihoods[choice] for choice in choices):
        check_option(option, encoded[option])
    targets = {request: [encoded[one] for one in own] for request, own in likelihoods.items()}
    examples = [request for request in requests if isinstance(request, ExampleTokens)]
    tokenized = tokenize_examples(tokenizer, [request.example for request in examples])
    return targets | dict(zip(examples, map(runs_in_loss, tokenized), strict=True))


def _join(request: Request, scores: Sequence[TargetScores]) -> Answer:
    """Combine the scores of a request's targets into its answer."""
    logprobs = tuple(chain.from_iterable(score.logprobs for score in scores))
    token_ids = tuple(chain.from_iterable(score.token_ids for score in scores))
    if isinstance(request, NextToken):
        return OptionScores(logprobs, token_ids)
    return TargetScores(logprobs, token_ids, tuple(chain.from_iterable(score.greedy for score in scores)))


def _contiguous(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.contiguous() for x in args)


@contextmanager
def evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Put the model in evaluation mode; on exit, restore every module's own training flag.

    A mixture's router logits are left out meanwhile: the loss that transformers computes of them fails with a cache. The output
    layer gets contiguous states: for the last positions of all rows, which are strided, torch multiplies each row by a copy of
    a weight that is frozen (in bfloat16 on a CPU, gigabytes).
    """
    training = [module for module in model.modules() if module.training]
    config = model.config.get_text_config()
    router_logits = getattr(config, "output_router_logits", None)
    heads = [head.register_forward_pre_hook(_contiguous) for head in output_embeddings(model)]
    model.eval()
    try:
        if router_logits:
            config.output_router_logits = False
        yield
    finally:
        for hook in heads:
            hook.remove()
        if router_logits:
            config.output_router_logits = router_logits
        for module in training:
            module.training = True
