"""Greedy continuations of prompts, batched."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from molf.errors import MolfError
from molf.study.engine.batching import Ids, base_model, batches, tokenize
from molf.study.engine.prefix import CACHE, Prefix, has_full_cache, read_prefix
from molf.tasks.base import Generate, Request

_TOKENS_PER_ROUND = 16  # complete rows leave their batch between rounds


def generate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Generate],
    *,
    batch_tokens: int,
    progress: bool,
) -> dict[Request, str]:
    """Generate the greedy continuation of every request."""
    ids = prompt_ids(tokenizer, requests)

    def length(request: Generate) -> int:
        return len(ids[request.prompt]) + request.max_new_tokens

    by_settings: dict[tuple[int, tuple[str, ...]], list[Generate]] = defaultdict(list)
    for request in sorted(requests, key=length, reverse=True):
        by_settings[request.max_new_tokens, request.stop].append(request)
    prefix = read_prefix(model, list(ids.values()), most=min(map(len, ids.values()), default=1) - 1)
    end_ids = end_tokens(model, tokenizer)
    texts: dict[Request, str] = {}
    with (
        _plain_generation_config(model),
        logging.tqdm(total=len(requests), desc="Generations", disable=not progress) as bar,
    ):
        for (max_new_tokens, stop), group in by_settings.items():
            ending = _Ending(tokenizer, max_new_tokens, end_ids, stop)
            for batch in batches(group, length, batch_tokens, shared=len(prefix.ids)):
                found = _continue(model, [ids[request.prompt] for request in batch], prefix, ending)
                texts.update(zip(batch, map(ending.text, found), strict=True))
                bar.update(len(batch))
    return texts


def prompt_ids(tokenizer: PreTrainedTokenizerBase, requests: Sequence[Generate]) -> dict[str, Ids]:
    """Return the tokens of every prompt."""
    ids = tokenize(tokenizer, [request.prompt for request in requests])
    if not all(ids.values()):
        raise MolfError("nothing to continue: the prompt is empty and the tokenizer adds no BOS token")
    return ids


@dataclass(frozen=True)
class _Ending:
    """What ends a continuation: its maximum length, an end token or a stop string."""

    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int
    end_ids: list[int]
    stop: tuple[str, ...]

    def settings(self, count: int) -> GenerationConfig:
        """Return the settings to generate at most ``count`` greedy tokens."""
        pad_id = self.tokenizer.pad_token_id
        return GenerationConfig(
            do_sample=False,
            max_new_tokens=count,
            eos_token_id=self.end_ids or None,
            pad_token_id=pad_id if pad_id is not None else next(iter(self.end_ids), None),
            stop_strings=list(self.stop) or None,
            return_dict_in_generate=True,
        )

    def reached(self, new_ids: Sequence[int]) -> bool:
        """Return whether a continuation is complete."""
        if len(new_ids) >= self.max_new_tokens or not set(self.end_ids).isdisjoint(new_ids):
            return True
        text = self.tokenizer.decode(new_ids) if self.stop else ""
        return any(string in text for string in self.stop)

    def text(self, new_ids: Sequence[int]) -> str:
        """Return the continuation without its end token or stop string."""
        own = list(takewhile(lambda token: token not in self.end_ids, new_ids))
        text = str(self.tokenizer.decode(own, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        return text[: min((text.index(string) for string in self.stop if string in text), default=len(text))]


def _continue(model: PreTrainedModel, batch: Sequence[Ids], prefix: Prefix, ending: _Ending) -> list[list[int]]:
    """Return the greedy continuation of every row of a batch."""
    batch_shrinks = has_full_cache(model)
    ids, mask = prefix.pad(batch, model.device)
    cache: Any = prefix.of_batch(len(batch))
    prompt_length = ids.shape[1]
    going = list(range(len(batch)))
    new_ids: list[list[int]] = [[] for _ in batch]
    while going:
        left = ending.max_new_tokens - (ids.shape[1] - prompt_length)
        output: Any = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=ending.settings(min(_TOKENS_PER_ROUND, left) if batch_shrinks else left),
            tokenizer=ending.tokenizer,
            **{CACHE: cache},
        )
        ids, cache = output.sequences, getattr(output, CACHE)
        for row, tokens in zip(going, ids[:, prompt_length:].tolist(), strict=True):
            new_ids[row] = tokens
        kept = [place for place, row in enumerate(going) if batch_shrinks and not ending.reached(new_ids[row])]
        going = [going[place] for place in kept]
        if going:
            ids, mask = ids[kept], torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)[kept]
            cache.batch_select_indices(torch.tensor(kept, device=ids.device))
    return new_ids


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end a text: the tokenizer's, which training appends, and those of the checkpoint."""
    own = base_model(model).generation_config.eos_token_id
    ids = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return [token for token in dict.fromkeys(ids) if token is not None]


@contextmanager
def _plain_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """Hide the checkpoint's generation config, from which ``generate`` fills what ours leaves unset."""
    base = base_model(model)
    checkpoint_config = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = checkpoint_config
