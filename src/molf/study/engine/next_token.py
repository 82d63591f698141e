"""Choices of the next token, as targets of one token each: targets of one prompt share its forward pass."""

from collections.abc import Mapping

from molf.study.engine.likelihood import EncodedTarget
from molf.tasks.base import Likelihood, NextToken, OptionScores, TargetScores


def targets_of(choice: NextToken) -> list[Likelihood]:
    """Return the options as targets after the prompt."""
    return [Likelihood(choice.prompt, option) for option in choice.options]


def check_options(choice: NextToken, encoded: Mapping[Likelihood, EncodedTarget]) -> None:
    """Make sure that one position of one forward pass decides between the options.

    Raises:
        ValueError: If an option is not exactly one token after the prompt.
    """
    for target in targets_of(choice):
        found = encoded[target]
        if found.merges:
            reason = "merges with the end of the prompt into one token"
        elif len(found.token_ids) > 1:
            reason = f"is {len(found.token_ids)} tokens"
        else:
            continue
        raise ValueError(
            f"the option {target.target!r} {reason} after the prompt {_end(choice.prompt)}; every option must be exactly "
            "one token there: try it with or without a space before it, or score it as a Likelihood"
        )


def _end(prompt: str, length: int = 60) -> str:
    return repr(prompt if len(prompt) <= length else f"...{prompt[-length:]}")


def read_options(choice: NextToken, scores: Mapping[Likelihood, TargetScores]) -> OptionScores:
    """Put the scores of the options together."""
    found = [scores[target] for target in targets_of(choice)]
    return OptionScores(tuple(s.logprobs[0] for s in found), tuple(s.token_ids[0] for s in found))
