"""Batches of token ids: tokenize, group rows of similar length, pad."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Ids: TypeAlias = tuple[int, ...]
T = TypeVar("T")

_MIN_FILL = 0.75  # of the longest row; a shorter row waits for the next batch


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> dict[str, Ids]:
    """Return the tokens of every distinct text."""
    distinct = list(dict.fromkeys(texts))
    if not distinct:
        return {}
    return {text: tuple(ids) for text, ids in zip(distinct, tokenizer(distinct)["input_ids"], strict=True)}


def batches(
    items: Sequence[T], length: Callable[[T], int], batch_tokens: int, shared: int = 0
) -> Iterator[Sequence[T]]:
    """Group items into batches of similar length, longest first.

    Args:
        items: The items, sorted by decreasing ``length``.
        length: Number of tokens in an item's row.
        batch_tokens: Maximum number of tokens in a batch, padding included. A longer item forms a batch of its own.
        shared: Number of leading tokens of every row that the model has already read.
    """
    first = 0
    while first < len(items):
        longest = length(items[first])
        least = shared + _MIN_FILL * (longest - shared)
        most = items[first : first + max(1, batch_tokens // longest)]
        batch = [item for item in most if length(item) >= least]
        yield batch
        first += len(batch)


def left_pad(batch: Sequence[Ids], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return token ids and attention mask [R, T]. Padding is masked, so its id does not matter."""
    length = max(map(len, batch))
    ids = [[0] * (length - len(row)) + list(row) for row in batch]
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in batch]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def base_model(model: PreTrainedModel) -> Any:
    """Return the model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
