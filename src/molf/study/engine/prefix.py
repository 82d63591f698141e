"""The prefix that all prompts of an evaluation share, such as worked examples or instructions, read only once."""

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.generation import GenerateDecoderOnlyOutput

from molf.study.engine.batching import Ids, base_model, left_pad

CACHE = "cache" if "cache" in {field.name for field in fields(GenerateDecoderOnlyOutput)} else "past_key_values"
"""The argument by which models take their cache, and the field that returns it: transformers 5.24 renamed both."""

MIN_TOKENS = 16
"""A shorter prefix is read again with every row: copying its cache costs more."""


@dataclass(frozen=True)
class Prefix:
    """Tokens that all rows start with, and the model's keys and values [1, heads, tokens, size] of them."""

    ids: Ids = ()
    cache: DynamicCache | None = None

    def of_batch(self, rows: int) -> DynamicCache | None:
        """Return a copy of the cache for ``rows`` rows that the model may extend."""
        cache = copy.deepcopy(self.cache)
        if cache is not None:
            cache.batch_repeat_interleave(rows)
        return cache

    def pad(self, batch: Sequence[Ids], device: torch.device) -> tuple[Tensor, Tensor]:
        """Return token ids and attention mask [R, T] of whole rows, with the padding between the prefix and the rest."""
        ids, mask = left_pad([row[len(self.ids) :] for row in batch], device)
        prefix = torch.tensor([self.ids], dtype=ids.dtype, device=device).expand(len(batch), -1)
        return torch.cat([prefix, ids], dim=1), torch.cat([torch.ones_like(prefix), mask], dim=1)


def read_prefix(model: PreTrainedModel, rows: Sequence[Ids], most: int) -> Prefix:
    """Run the model once over the tokens, at most ``most``, that all rows start with.

    The prefix is empty if it would not save time or the model's cache cannot be copied.
    """
    shared = _shared_prefix(rows)[:most]
    if len(set(rows)) < 2 or len(shared) < MIN_TOKENS or not has_full_cache(model):
        return Prefix()
    cache = DynamicCache(config=base_model(model).config)
    model(input_ids=torch.tensor([shared], device=model.device), use_cache=True, **{CACHE: cache})
    return Prefix(shared, cache)


def _shared_prefix(rows: Sequence[Ids]) -> Ids:
    # What the first and the last row in sorted order share, all rows share.
    first, last = (min(rows), max(rows)) if rows else ((), ())
    differ = (place for place, (one, other) in enumerate(zip(first, last, strict=False)) if one != other)
    return first[: next(differ, min(len(first), len(last)))]


def has_full_cache(model: PreTrainedModel) -> bool:
    """Return whether the cache holds the keys and values of all tokens, so that its rows can be copied and removed.

    Sliding windows would count the padding after a prefix, and recurrent states cannot be split.
    """
    base = base_model(model)
    takes_cache = CACHE in inspect.signature(base.forward).parameters
    return takes_cache and all(type(layer) is DynamicLayer for layer in DynamicCache(config=base.config).layers)
