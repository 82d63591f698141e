"""What of the training targets ``max_length`` cuts off."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from molf.study.config.trainer_config import TrainConfig
from molf.study.engine.examples import tokenize_examples


@dataclass(frozen=True)
class CutTargets:
    """Training examples that lose something to ``max_length``.

    Attributes:
        max_length: The most tokens of an example, or None for any number.
        dropped: Examples without any token in the loss left; the trainer leaves them out.
        truncated: Other examples of which some tokens in the loss are cut off.
    """

    max_length: int | None
    dropped: int
    truncated: int

    def warnings(self) -> list[str]:
        """Say what is lost, in words."""
        limit = f"max_length={self.max_length}"
        found = []
        if self.dropped:
            found.append(f"{self.dropped} examples have no completion within {limit} and are left out")
        if self.truncated:
            found.append(
                f"{self.truncated} examples lose the end of their target to {limit}, and so never teach where to stop"
            )
        return found


def cut_targets(tokenizer: Any, examples: Sequence[Mapping[str, Any]], args: TrainConfig) -> CutTargets:
    """Count the examples whose targets the trainer would cut.

    Args:
        tokenizer: The tokenizer.
        examples: What the trainer is given.
        args: Its settings. Where packing splits long examples, nothing of them is lost.

    Raises:
        ValueError: An example has nothing in the loss even in full, or the chat template is not fit for it.
    """
    if args.max_length is None or (args.packing and args.packing_strategy != "bfd"):
        return CutTargets(args.max_length, 0, 0)
    kept = slice(None, args.max_length) if args.truncation_mode == "keep_start" else slice(-args.max_length, None)
    dropped = truncated = 0
    for example in tokenize_examples(tokenizer, examples):
        left = sum(example.in_loss[kept])
        dropped += not left
        truncated += 0 < left < sum(example.in_loss)
    return CutTargets(args.max_length, dropped, truncated)
