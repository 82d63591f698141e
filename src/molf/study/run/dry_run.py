"""What a run would do, found out without training: the dry run."""

import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from molf.study.config.run_config import RunConfig
from molf.study.methods.trainable import routed_layers
from molf.study.run.job import Job, job_recipe, load_job, make_trainer
from molf.study.run.selection import row_key
from molf.study.run.training_data import cut_targets
from molf.study.sizing.sizes import Sizes, measure
from molf.tasks import Split


@dataclass(frozen=True)
class Plan:
    """A run before it starts.

    Attributes:
        config: The resolved settings.
        example: The first training example as the model gets it: pieces of text, and whether they are in the loss.
        rows: Number of training examples and of evaluation rows.
        sizes: Parameter counts and memory.
        warnings: What looks wrong with the data, in words.
    """

    config: dict[str, Any]
    example: list[tuple[str, bool]]
    rows: tuple[int, int]
    sizes: Sizes
    warnings: list[str]


def make_plan(config: RunConfig) -> Plan:
    """Load everything that a run needs, tokenise its rows, and report instead of training. Writes nothing that stays.

    Args:
        config: The run.

    Raises:
        ValueError: The settings do not make a run.
        OSError: Data or model cannot be had.
    """
    config = config.resolved()
    job = load_job(config)
    recipe = job_recipe(job)
    with tempfile.TemporaryDirectory() as scratch:  # the trainer makes its folder at once
        trainer = make_trainer(job, recipe, output_dir=scratch)
    routed = routed_layers(trainer.model, config.method).values() if recipe.merged else ()
    return Plan(
        config=config.to_dict(),
        example=_first_example(trainer, job.tokenizer),
        rows=(len(job.split.train), len(job.eval_rows)),
        sizes=measure(
            trainer.model,
            routed,
            config.method.ranks or (),
            config.method.optim_bits,
            config.method.optimizer_in_backward,
        ),
        warnings=_warnings(job, trainer),
    )


def _first_example(trainer: Any, tokenizer: Any) -> list[tuple[str, bool]]:
    row = trainer.train_dataset[0]
    tokens = zip(row["input_ids"], row["labels"], strict=True)
    runs = groupby(tokens, key=lambda token: token[1] != -100)
    return [(tokenizer.decode([token for token, _ in run]), in_loss) for in_loss, run in runs]


def _warnings(job: Job, trainer: Any) -> list[str]:
    found = []
    if contradicting := contradictions([example for example in job.examples if "prompt" in example]):
        found.append(f"{contradicting} prompts occur with different completions, which no model can learn both of")
    if (seen := seen_in_training(job.split)) > 0:
        found.append(f"{seen} of the rows to evaluate on are trained on too")
    return found + cut_targets(job.tokenizer, job.examples, trainer.args).warnings()


def seen_in_training(split: Split) -> int:
    """Count the rows to evaluate on that are trained on too; none where a benchmark wants it so for all of them."""
    if split.train == split.eval:
        return 0
    trained = {row_key(row) for row in split.train}
    return sum(row_key(row) in trained for row in split.eval)


def contradictions(examples: Sequence[dict[str, Any]]) -> int:
    """Count the prompts that occur with more than one completion.

    Args:
        examples: Mappings with a ``prompt`` and a ``completion``.
    """
    completions = defaultdict(set)
    for example in examples:
        completions[example["prompt"]].add(example["completion"])
    return sum(len(different) > 1 for different in completions.values())
