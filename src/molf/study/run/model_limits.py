"""What a model can do, checked before the training: predict the next token, and read all tokens and positions of the rows."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset

from molf.errors import MolfError
from molf.study.config.trainer_config import TrainConfig
from molf.study.engine.inference import evaluation_mode, positions_needed
from molf.tasks import Row, Task

_SEES_LATER = 1e-3
"""Relative change of logits from which a model sees later tokens: causal models have 0, random encoders 0.007 or more."""


def check_causal(model: Any) -> None:
    """Check that a model does not see the tokens that it is to predict.

    An encoder such as BERT loads as a causal model with a mere warning. It would learn to copy the next token.
    """
    config = model.config.get_text_config()
    attention = config._attn_implementation
    if "flash" in str(attention):  # runs on accelerators only, where the model is not yet
        config._attn_implementation = "eager"
    try:
        with evaluation_mode(model), torch.no_grad():
            ids = torch.tensor([[4, *[later] * 7] for later in (5, 6)], device=model.device)
            one, other = model(input_ids=ids).logits[:, 0].float()
    finally:
        config._attn_implementation = attention
    if (one - other).abs().max() > _SEES_LATER * one.abs().max():
        raise MolfError(
            f"{type(model).__name__} of {model.config.name_or_path!r} is no causal language model: what it predicts after a "
            "token changes with the tokens that follow, so it would see what it is to predict; use a decoder such as Llama"
        )


@dataclass(frozen=True)
class ModelLimits:
    """What a model can read.

    Attributes:
        tokens: Number of token ids that it has embeddings and logits for.
        positions: Number of positions that it has, or None without a limit: rotary positions just become less accurate.
    """

    tokens: int
    positions: int | None

    @classmethod
    def of(cls, model: Any) -> "ModelLimits":
        """Read the limits of a causal language model."""
        inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
        tokens = int(inputs.weight.shape[0])
        tokens = min(tokens, getattr(outputs, "out_features", tokens))
        config = model.config.get_text_config()
        relative = getattr(config, "rope_parameters", None) or getattr(config, "alibi", False)
        return cls(tokens, None if relative else getattr(config, "max_position_embeddings", None))

    def check(self, tokenizer: Any, rows: Iterable[tuple[str, Sequence[int], int]], advice: str) -> None:
        """Check that the model can read all rows.

        Args:
            tokenizer: The tokenizer of the rows.
            rows: For each row its name, its tokens, and how many positions it takes.
            advice: What to do about rows that are too long.

        Raises:
            MolfError: The model has no embedding for a token, or no position for it.
        """
        for name, ids, length in rows:
            if ids and max(ids) >= self.tokens:
                self._refuse(tokenizer, max(ids), name)
            if self.positions is not None and length > self.positions:
                raise MolfError(f"{name} needs {length} positions, but the model has {self.positions}; {advice}")

    def check_padding(self, tokenizer: Any) -> None:
        """Check that the model can read the token that fills batches."""
        if tokenizer.pad_token_id >= self.tokens:
            self._refuse(tokenizer, tokenizer.pad_token_id, "padding")

    def _refuse(self, tokenizer: Any, token: int, name: str) -> None:
        raise MolfError(
            f"{name} has the token {tokenizer.convert_ids_to_tokens(token)!r} of id {token}, but the model has only "
            f"{self.tokens} tokens: its tokenizer is another model's, or has more tokens; use the model's own, or save the model "
            "again after model.resize_token_embeddings(len(tokenizer))"
        )


def check_training_rows(model: Any, tokenizer: Any, rows: Dataset, args: TrainConfig, kind: str = "training") -> None:
    """Check that a model can read tokenised rows as the trainer cuts them; ``kind`` names them."""
    limits = ModelLimits.of(model)
    limits.check_padding(tokenizer)
    joined = args.packing and args.packing_strategy == "wrapped"
    named = (
        (f"{kind} row {number}", ids, args.max_length if joined else min(len(ids), args.max_length or len(ids)))
        for number, ids in enumerate(rows["input_ids"], start=1)
    )
    limits.check(tokenizer, named, f"pass --max_length {limits.positions}")


def check_evaluation_rows(model: Any, tokenizer: Any, task: Task, rows: Sequence[Row]) -> None:
    """Check that a model can read all that a task asks about its evaluation rows, which are never cut."""
    numbers = {request: number for number, row in enumerate(rows, start=1) for request in task.requests(row)}
    try:
        needed = positions_needed(tokenizer, list(numbers))
    except MolfError as error:
        raise MolfError(f"evaluation rows: {error}") from error
    named = ((f"evaluation row {numbers[request]}", ids, length) for request, ids, length in needed)
    ModelLimits.of(model).check(tokenizer, named, "shorten or remove the row")
