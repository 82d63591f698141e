"""Token ids in batches: tokenizing texts once, cutting sorted rows into batches, padding them."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Ids: TypeAlias = tuple[int, ...]
T = TypeVar("T")

_LEAST_FILLED = 0.75  # of a row; a shorter one waits for a batch with less padding


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> dict[str, Ids]:
    """Return the tokens of every distinct text."""
    distinct = list(dict.fromkeys(texts))
    if not distinct:
        return {}
    return {text: tuple(ids) for text, ids in zip(distinct, tokenizer(distinct)["input_ids"], strict=True)}


def batches(
    items: Sequence[T], length: Callable[[T], int], batch_tokens: int, shared: int = 0
) -> Iterator[Sequence[T]]:
    """Cut items, longest first, into batches of rows of about equal length.

    Args:
        items: What to cut, sorted by falling ``length``.
        length: How many tokens of a row an item takes.
        batch_tokens: The most tokens of a batch once all its rows are as long as the longest; a longer item is a
            batch of its own.
        shared: How many tokens at the beginning of every row have been read already.
    """
    first = 0
    while first < len(items):
        longest = length(items[first])
        least = shared + _LEAST_FILLED * (longest - shared)
        most = items[first : first + max(1, batch_tokens // longest)]
        batch = [item for item in most if length(item) >= least]
        yield batch
        first += len(batch)


def left_pad(batch: Sequence[Ids], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return token ids and attention mask [R, T]; padding is masked, so that any id will do for it."""
    length = max(map(len, batch))
    ids = [[0] * (length - len(row)) + list(row) for row in batch]
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in batch]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def base_model(model: PreTrainedModel) -> Any:
    """Return the model inside a PEFT model, else the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
