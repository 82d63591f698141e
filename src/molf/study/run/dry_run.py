"""The dry run: everything about a run that can be found out without training."""

import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from molf.study.config.run_config import RunConfig
from molf.study.config.trainer_config import build_train_config
from molf.study.run.job import Job, check_evaluation, job_recipe, load_job, make_trainer
from molf.study.run.selection import row_key
from molf.study.run.train import check_start
from molf.study.sizing.blueprint import Blueprint
from molf.study.sizing.memory import Needs, available_memory, estimate
from molf.tasks import Split


@dataclass(frozen=True)
class Plan:
    """A run before it starts.

    Attributes:
        config: The resolved settings.
        example: The first training example as the model reads it: pieces of text, and whether they count in the loss.
        rows: Number of training rows and of evaluation rows.
        held_out: Number of training rows held out to evaluate on during training.
        needs: Parameter counts and memory; None for an evaluation.
        warnings: What looks wrong with the data and the settings.
    """

    config: dict[str, Any]
    example: list[tuple[str, bool]]
    rows: tuple[int, int]
    held_out: int
    needs: Needs | None
    warnings: list[str]


def make_plan(config: RunConfig) -> Plan:
    """Load everything that a run needs, tokenise its rows, and report instead of training. No file is left.

    Raises:
        MolfError: A setting, the data or the model does not allow the run.
    """
    config = config.resolved()
    check_start(config)
    job = load_job(config)
    if config.output.only_eval:
        build_train_config(config.train)
        check_evaluation(job)
        return Plan(config.to_dict(), [], (0, len(job.eval_rows)), 0, None, [])
    with tempfile.TemporaryDirectory() as scratch:  # the trainer creates its folder
        trainer = make_trainer(
            job, job_recipe(job), output_dir=scratch, push_to_hub=False
        )  # which creates a repository
        trainer.create_optimizer()  # checks rates and ranks against the model
    return Plan(
        config=config.to_dict(),
        example=_first_example(trainer, job.tokenizer),
        rows=(len(job.split.train), len(job.eval_rows)),
        held_out=len(job.validation),
        needs=estimate(Blueprint(config), accelerator=available_memory() is not None),
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
        found.append(f"{contradicting} prompts occur with different completions; a model cannot learn them all")
    if seen := seen_in_training(job.split):
        found.append(f"{seen} evaluation rows are also training rows")
    warnings: list[str] = found + trainer.warnings
    return warnings


def seen_in_training(split: Split) -> int:
    """Count the evaluation rows that are also training rows; 0 if all are, which is what the benchmark wants."""
    if split.train == split.eval:
        return 0
    trained = {row_key(row) for row in split.train}
    return sum(row_key(row) in trained for row in split.eval)


def contradictions(examples: Sequence[dict[str, Any]]) -> int:
    """Count the prompts that occur with different completions."""
    completions = defaultdict(set)
    for example in examples:
        completions[example["prompt"]].add(example["completion"])
    return sum(len(different) > 1 for different in completions.values())
