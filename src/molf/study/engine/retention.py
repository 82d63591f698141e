"""What a model forgets: its loss on text that it was not trained on, and how far its answers move from the base model's.

    rise of the loss        mean over texts of  loss(tuned) - loss(base), in nats per token
    KL(base || tuned)       mean over prompts of  sum_token p_base (log p_base - log p_tuned), in nats per token

The second is taken on the task's own prompts and predicts forgetting of prior tasks (Shenfeld, Pari, Agrawal 2025,
https://arxiv.org/abs/2509.04259).
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from molf.errors import MolfError
from molf.study.engine.batching import Ids, batches, tokenize
from molf.study.engine.inference import evaluation_mode
from molf.study.engine.likelihood import EncodedTarget, last_logits, score_targets
from molf.study.engine.prefix import Prefix
from molf.tasks.base import ExampleTokens, Request
from molf.tasks.metrics import mean
from molf.tasks.retention import Retention

__all__ = ["Probe", "Reading", "compare", "make_probe", "read"]

_TEXT_TOKENS = 64  # of each text at the most: enough to see forgetting, little to pay
_TEXT_CHARACTERS = 64 * _TEXT_TOKENS  # more than these tokens have: a text of megabytes takes minutes to tokenize
_PROMPTS, _POSITIONS = 16, 8  # prompts, and last positions of each whose distributions are compared


@dataclass(frozen=True)
class Probe:
    """What a model is asked before and after training: texts, and prompts of the task, in tokens."""

    texts: list[Ids]
    prompts: list[Ids]


@dataclass(frozen=True)
class Reading:
    """What a model said.

    Attributes:
        losses: Mean loss a token of every text, in nats.
        logprobs: Log-probabilities after every prompt, ``[positions, V]`` float16 on the host.
        seconds: How long it took.
    """

    losses: list[float]
    logprobs: list[Tensor]
    seconds: float


def make_probe(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    requests: Iterable[Sequence[Request]],
    positions: int | None = None,
) -> Probe:
    """Choose what to ask.

    Args:
        tokenizer: The model's.
        texts: Texts that the run does not train on; the beginning of each is read.
        requests: The task's requests of every row. The first prompt of each row is taken, then the second, as far as needed.
        positions: How many tokens the model can read; None without a limit.

    Raises:
        MolfError: No text has two tokens, so none has a loss.
    """
    encoded = tokenize(tokenizer, [text[:_TEXT_CHARACTERS] for text in texts])
    asked = [[r.prompt for r in own if not isinstance(r, ExampleTokens)] for own in islice(requests, _PROMPTS)]
    turns = (prompt for turn in zip_longest(*asked) for prompt in turn if prompt is not None)
    prompts = tokenize(tokenizer, list(dict.fromkeys(turns))[:_PROMPTS])
    cut = [ids[: min(_TEXT_TOKENS, positions or _TEXT_TOKENS)] for ids in encoded.values()]
    if not any(len(ids) > 1 for ids in cut):
        raise MolfError(
            f"retention: none of the {len(texts)} texts has two tokens, so none has a loss; give longer ones in retention_path, "
            "or set retention: 'off'"
        )
    return Probe([ids for ids in cut if len(ids) > 1], [ids for ids in prompts.values() if ids])


def read(model: PreTrainedModel, probe: Probe, *, batch_tokens: int) -> Reading:
    """Ask a model.

    Raises:
        MolfError: The model's logits contain NaN.
    """
    start = time.perf_counter()
    with evaluation_mode(model), torch.inference_mode():
        targets = [EncodedTarget(ids, 1) for ids in probe.texts]
        scores = score_targets(model, targets, batch_tokens=batch_tokens, progress=False)
        losses = [-scores[target].mean_logprob for target in targets]
        found: dict[Ids, Tensor] = {}
        for batch in batches(sorted(probe.prompts, key=len, reverse=True), len, batch_tokens):
            logits = last_logits(model, batch, Prefix(), _POSITIONS)
            for row, ids in zip(logits, batch, strict=True):
                found[ids] = row[-len(ids) :].float().log_softmax(-1).half().cpu()
    return Reading(losses, [found[ids] for ids in probe.prompts], time.perf_counter() - start)


def compare(before: Reading, after: Reading, origin: str) -> Retention:
    """Compare what a model said before training with what it says after."""
    rises = [late - early for early, late in zip(before.losses, after.losses, strict=True)]
    distances = [_kl(base, tuned) for base, tuned in zip(before.logprobs, after.logprobs, strict=True)]
    return Retention(
        loss_before=mean(before.losses),
        loss_after=mean(after.losses),
        loss_rise=mean(rises),
        kl=mean(distances) if distances else None,
        origin=origin,
        seconds=before.seconds + after.seconds,
    )


def _kl(base: Tensor, tuned: Tensor) -> float:
    """Return the mean over positions of KL(base || tuned); rounding to 16 bits can make one of nearly zero negative."""
    base, tuned = base.float(), tuned.float()
    return max(0.0, float((base.exp() * (base - tuned)).nan_to_num(nan=0.0).sum(-1).mean()))
