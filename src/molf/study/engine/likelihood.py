"""Log-probabilities of targets after prompts, batched.

Legend: R rows of a batch, K last positions whose logits are computed, V vocabulary. A target's *input* is what the
model must read to score it: the tokens of prompt and target without the last one.
"""

import inspect
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from molf.errors import MolfError
from molf.study.engine.batching import Ids, base_model, batches, tokenize
from molf.study.engine.prefix import CACHE, Prefix, read_prefix
from molf.tasks.base import Likelihood, TargetScores

_TOKENS_PER_SOFTMAX = 256  # bounds the float32 copy of the logits, [256, V]


@dataclass(frozen=True)
class EncodedTarget:
    """The tokens of prompt and target together.

    Attributes:
        ids: All tokens.
        start: Index of the target's first token.
        merges: Whether the target's first token also contains the end of the prompt.
    """

    ids: Ids
    start: int
    merges: bool = False

    @property
    def input(self) -> Ids:
        """What the model must read to score the target."""
        return self.ids[:-1]

    @property
    def token_ids(self) -> Ids:
        """The target's tokens."""
        return self.ids[self.start :]


def encode(tokenizer: PreTrainedTokenizerBase, requests: Sequence[Likelihood]) -> dict[Likelihood, EncodedTarget]:
    """Tokenize likelihoods as TRL's ``SFTTrainer`` tokenizes prompt and completion."""
    ids = tokenize(tokenizer, [text for r in requests for text in (r.prompt, r.prompt + r.target)])
    return {r: _encoded(r, ids[r.prompt], ids[r.prompt + r.target]) for r in requests}


def _encoded(request: Likelihood, prompt: Ids, both: Ids) -> EncodedTarget:
    start = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, both, strict=False)))
    if start == len(both):
        raise MolfError(f"the target {request.target!r} adds no token to the prompt {request.prompt!r}")
    if start == 0:
        raise MolfError(
            f"no token comes before the target {request.target!r} of the prompt {request.prompt!r}, so nothing predicts "
            "it; use a longer prompt or a tokenizer that adds a BOS token"
        )
    return EncodedTarget(both, start, merges=start < len(prompt))


def check_option(option: Likelihood, encoded: EncodedTarget) -> None:
    """Make sure that an option of a ``NextToken`` is one token, so that one position decides between all options."""
    if encoded.merges:
        reason = "merges with the end of the prompt into one token"
    elif len(encoded.token_ids) > 1:
        reason = f"is {len(encoded.token_ids)} tokens"
    else:
        return
    prompt = option.prompt if len(option.prompt) <= 60 else f"...{option.prompt[-60:]}"
    raise MolfError(
        f"the option {option.target!r} {reason} after the prompt {prompt!r}; every option must be exactly one token "
        "there: try it with or without a space before it, or score it as a Likelihood"
    )


def longest_inputs(inputs: Iterable[Ids]) -> dict[Ids, Ids]:
    """Map every input to the longest one that starts with it, often itself."""
    longest: dict[Ids, Ids] = {}
    following: Ids = ()
    # In sorted order, an input comes directly before the inputs that start with it.
    for ids in sorted(set(inputs), reverse=True):
        longest[ids] = longest[following] if following[: len(ids)] == ids else ids
        following = ids
    return longest


def score_targets(
    model: PreTrainedModel, targets: Iterable[EncodedTarget], *, batch_tokens: int, progress: bool
) -> dict[EncodedTarget, TargetScores]:
    """Score every distinct target.

    The model does not read an input that another one starts with, and reads what all inputs start with only once.
    """
    distinct = dict.fromkeys(targets)
    longest = longest_inputs(target.input for target in distinct)
    on_row: dict[Ids, list[EncodedTarget]] = defaultdict(list)
    for target in distinct:
        on_row[longest[target.input]].append(target)
    kept = {row: len(row) + 1 - min(target.start for target in own) for row, own in on_row.items()}
    # By length for little padding, then by the logits they need. The longest first: running out of memory shows at once.
    rows = sorted(on_row, key=lambda row: (len(row), kept[row]), reverse=True)
    prefix = read_prefix(model, rows, most=min((len(row) - kept[row] for row in rows), default=0))
    scores: dict[EncodedTarget, TargetScores] = {}
    with logging.tqdm(total=len(rows), desc="Likelihoods", disable=not progress) as bar:
        for batch in batches(rows, len, batch_tokens, shared=len(prefix.ids)):
            logits = last_logits(model, batch, prefix, max(kept[row] for row in batch))
            scores |= _read_scores(logits, batch, [on_row[row] for row in batch])
            bar.update(len(batch))
    return scores


def last_logits(model: PreTrainedModel, batch: Sequence[Ids], prefix: Prefix, count: int) -> Tensor:
    """Return the logits [R, K, V] of the last ``count`` positions of the left-padded rows."""
    input_ids, attention_mask = prefix.pad(batch, model.device)
    done = len(prefix.ids)
    wanted = {
        # Not every model derives positions from the mask.
        "position_ids": (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, done:],
        CACHE: prefix.of_batch(len(batch)),
        "use_cache": bool(done),
        "logits_to_keep": count,
    }
    known = inspect.signature(base_model(model).forward).parameters
    accepted = {name: value for name, value in wanted.items() if name in known}
    logits: Tensor = model(input_ids=input_ids[:, done:], attention_mask=attention_mask, **accepted).logits
    return logits[:, -count:]


def _read_scores(
    logits: Tensor, batch: Sequence[Ids], targets: Sequence[Sequence[EncodedTarget]]
) -> dict[EncodedTarget, TargetScores]:
    """Score the targets of every row of a batch from its last logits [R, K, V]."""
    places = []  # (row, position in K, token), one per token of a target
    for row, (ids, row_targets) in enumerate(zip(batch, targets, strict=True)):
        shift = logits.shape[1] - len(ids) - 1  # a token is predicted one position before its own
        for target in row_targets:
            places += [(row, target.start + i + shift, token) for i, token in enumerate(target.token_ids)]
    logprobs: list[float] = []
    greedy: list[bool] = []
    for first in range(0, len(places), _TOKENS_PER_SOFTMAX):
        row_at, column_at, tokens = torch.tensor(places[first : first + _TOKENS_PER_SOFTMAX], device=logits.device).T
        found = logits[row_at, column_at].float()
        logprobs += (-cross_entropy(found, tokens, reduction="none")).tolist()
        greedy += (found.gather(-1, tokens[:, None])[:, 0] >= found.amax(-1)).tolist()
    if any(map(math.isnan, logprobs)):
        raise MolfError("the model's logits contain NaN: training probably diverged; try a smaller learning rate")
    values, flags = iter(logprobs), iter(greedy)
    return {
        target: TargetScores(
            tuple(islice(values, len(target.token_ids))), target.token_ids, tuple(islice(flags, len(target.token_ids)))
        )
        for row_targets in targets
        for target in row_targets
    }
