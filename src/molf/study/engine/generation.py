"""Greedy continuations of prompts, batched."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from molf.study.engine.batching import Ids, base_model, batches, left_pad, tokenize
from molf.tasks.base import Generate, Request


def generate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Generate],
    *,
    batch_tokens: int,
    progress: bool,
) -> dict[Request, str]:
    """Generate the greedy continuation of every distinct request.

    Raises:
        ValueError: If a prompt has no tokens.
    """
    ids = tokenize(tokenizer, [request.prompt for request in requests])

    def length(request: Generate) -> int:
        return len(ids[request.prompt]) + request.max_new_tokens

    alike: dict[tuple[int, tuple[str, ...]], list[Generate]] = defaultdict(list)
    for request in sorted(requests, key=length, reverse=True):
        if not ids[request.prompt]:
            raise ValueError("nothing to continue: the prompt is empty and the tokenizer adds no BOS token")
        alike[request.max_new_tokens, request.stop].append(request)
    texts: dict[Request, str] = {}
    with logging.tqdm(total=len(requests), desc="Generations", disable=not progress) as bar:
        for (max_new_tokens, stop), group in alike.items():
            for batch in batches(group, length, batch_tokens):
                rows = [ids[request.prompt] for request in batch]
                texts.update(zip(batch, _continue(model, tokenizer, rows, max_new_tokens, stop), strict=True))
                bar.update(len(batch))
    return texts


def _continue(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[Ids],
    max_new_tokens: int,
    stop: tuple[str, ...],
) -> list[str]:
    """Return the greedy continuation of every row, up to an end token or before the first stop string."""
    input_ids, attention_mask = left_pad(batch, model.device)
    end_ids = _end_ids(model, tokenizer)
    pad_id = tokenizer.pad_token_id
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=end_ids or None,
        pad_token_id=pad_id if pad_id is not None else next(iter(end_ids), None),
        stop_strings=list(stop) or None,
    )
    with _plain_generation_config(model):
        output = model.generate(
            input_ids=input_ids, attention_mask=attention_mask, generation_config=config, tokenizer=tokenizer
        )
    new_ids = output[:, input_ids.shape[1] :].tolist()
    return [_cut(_decode(tokenizer, takewhile(lambda token: token not in end_ids, row)), stop) for row in new_ids]


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end a text: the tokenizer's, which training appends, and the checkpoint's own."""
    own = base_model(model).generation_config.eos_token_id
    ids = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return [token for token in dict.fromkeys(ids) if token is not None]


@contextmanager
def _plain_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """Hide the checkpoint's generation settings: ``generate`` takes whatever ours leaves open from them."""
    base = base_model(model)
    checkpoint_config = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = checkpoint_config


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _cut(text: str, stop: tuple[str, ...]) -> str:
    """Return ``text`` up to the first of the stop strings in it."""
    return text[: min((text.index(string) for string in stop if string in text), default=len(text))]
