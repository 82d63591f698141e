"""The training rows as the trainer takes them: tokenised once, with the labels, and what ``max_length`` cuts off."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from trl.chat_template_utils import is_chat_template_stop_token_trained

from molf.study.config.trainer_config import TrainConfig
from molf.study.engine.bounded import bounded
from molf.study.engine.examples import ExampleIds, tokenize_examples, training_template
from molf.study.run.process_group import from_rank_0

_log = logging.getLogger(__name__)
_NO_LOSS = -100  # the label that the loss ignores


@dataclass(frozen=True)
class CutTargets:
    """Training examples that lose targets to ``max_length``.

    Attributes:
        max_length: Maximum number of tokens of an example, or None for no limit.
        dropped: Examples without any target left; the trainer leaves them out.
        truncated: Other examples that lose some targets.
    """

    max_length: int | None
    dropped: int
    truncated: int

    def warnings(self) -> list[str]:
        """Say what is lost."""
        limit = f"max_length={self.max_length}"
        found = []
        if self.dropped:
            found.append(f"{self.dropped} examples have no completion within {limit} and are left out")
        if self.truncated:
            found.append(
                f"{self.truncated} examples lose the end of their target to {limit}, so they never teach where to stop"
            )
        return found


def tokenize_training_data(
    tokenizer: Any, examples: Sequence[Mapping[str, Any]], args: TrainConfig
) -> tuple[Dataset, CutTargets]:
    """Tokenise training examples on rank 0 and send them to the others.

    Returns:
        Rows with ``input_ids`` and ``labels``, not cut yet, and what the trainer will cut.
    """

    def tokenize() -> tuple[Dataset, CutTargets]:
        tokens = tokenize_examples(tokenizer, examples)
        _warn_of_untrained_stop(tokenizer, examples)
        # Whether the user wants the loss on prompts, or on what others than the assistant say, too.
        chat = "messages" in examples[0]
        all_in_loss = not args.assistant_only_loss if chat else args.completion_only_loss is False
        return _rows(tokens, all_in_loss), cut_targets(tokens, args)

    return from_rank_0(tokenize)


def cut_targets(examples: Sequence[ExampleIds], args: TrainConfig) -> CutTargets:
    """Count the examples whose targets the trainer cuts.

    Args:
        examples: The tokenised examples.
        args: The trainer's settings. If packing splits long examples, nothing is lost.
    """
    if args.max_length is None or (args.packing and args.packing_strategy != "bfd"):
        return CutTargets(args.max_length, 0, 0)
    kept = slice(None, args.max_length) if args.truncation_mode == "keep_start" else slice(-args.max_length, None)
    left = [(sum(example.in_loss[kept]), sum(example.in_loss)) for example in examples]
    dropped = sum(kept == 0 for kept, _ in left)
    return CutTargets(args.max_length, dropped, sum(0 < kept < whole for kept, whole in left))


def _rows(examples: Sequence[ExampleIds], all_in_loss: bool) -> Dataset:
    labels = [
        [token if all_in_loss or wanted else _NO_LOSS for token, wanted in zip(e.ids, e.in_loss, strict=True)]
        for e in examples
    ]
    return Dataset.from_dict({"input_ids": [list(example.ids) for example in examples], "labels": labels})


def _warn_of_untrained_stop(tokenizer: Any, examples: Sequence[Mapping[str, Any]]) -> None:
    """Warn as TRL does, which sees tokens only and no conversations here."""
    if "messages" not in examples[0]:
        return
    template = training_template(tokenizer)
    with bounded():
        stops = is_chat_template_stop_token_trained(tokenizer, chat_template=template)
    if not stops:
        _log.warning(
            "the chat template does not mark the end of the assistant's turns as theirs, so the model may not learn to stop; "
            "move it inside {% generation %} ... {% endgeneration %} in a copy of the template (--chat_template_path)"
        )
