"""MedMCQA: four-option questions from Indian medical entrance exams.

Data set: A. Pal, L. K. Umapathi, M. Sankarasubbu, "MedMCQA: A Large-scale Multi-Subject Multi-Choice Dataset for
Medical domain Question Answering", CHIL 2022. Its test split has no public answers, so evaluation uses the validation
split. Every question is asked twice: which of the four letters is the most likely next token, and which letter the model
generates.
"""

import re
from collections.abc import Mapping
from typing import Any, cast

from molf.errors import MolfError
from molf.tasks.base import Answer, Better, Generate, Metric, NextToken, OptionScores, Request, Row
from molf.tasks.metrics import percentage, percentage_by
from molf.tasks.sources import HubData, Source, SourceTask

LETTERS = "ABCD"
OPTIONS = ("opa", "opb", "opc", "opd")
MAX_NEW_TOKENS = 4

_LETTER = re.compile(r"\s*([A-D])(?:$|[).\n])")


def _problem(row: Row) -> str | None:
    """Return why a record with all its fields still cannot be used, or None."""
    if not row["question"].strip():
        return "the question is empty"
    if not 0 <= row["cop"] <= len(LETTERS):
        return f"cop={row['cop']} names no option; it must be 0 to 3 (the published test split has no answers)"
    return None


def count_from_zero(rows: list[Row]) -> list[Row]:
    """Return the rows with ``cop`` counted from 0, as on the Hub; the authors' own files count from 1."""
    found = {row["cop"] for row in rows}
    if {0, 4} <= found:
        raise MolfError("cop is 0 in some rows and 4 in others; it must be 0 to 3, or 1 to 4 as in the authors' files")
    if not found & {0, 4}:
        raise MolfError(
            f"cop is {', '.join(map(str, sorted(found)))} in all rows, so it may count from 0 or from 1; add a row whose "
            "answer is the first option (0) or, counting from 1, the last (4)"
        )
    return [{**row, "cop": row["cop"] - 1} for row in rows] if 4 in found else rows


class Med(SourceTask):
    """The MedMCQA benchmark."""

    name: str = "med"
    headline: str = "accuracy"
    metrics: Mapping[str, Better] = {"accuracy": "more", "accuracy_generated": "more", "invalid_answers": "less"}
    source = Source(
        published=HubData("openlifescienceai/medmcqa"),
        packaged=("medmcqa_train_sample.jsonl.gz", "medmcqa_validation_sample.jsonl.gz"),
        splits=("train", "validation"),
        fields={"question": str, "cop": int, **dict.fromkeys(OPTIONS, str)},
        problem=_problem,
        normalize=count_from_zero,
    )

    def example(self, row: Row) -> dict[str, str]:
        """Return the question with its options, and the correct letter."""
        return {"prompt": question_prompt(row), "completion": f" {LETTERS[row['cop']]}"}

    def requests(self, row: Row) -> list[Request]:
        """Ask for the most likely letter, and for what the model generates."""
        prompt = question_prompt(row)
        return [NextToken(prompt, tuple(f" {letter}" for letter in LETTERS)), Generate(prompt, MAX_NEW_TOKENS)]

    def score(self, rows: list[Row], answers: list[list[Answer]]) -> dict[str, Metric]:
        """Return the share of correct answers.

        Returns:
            ``accuracy``: percentage of questions whose correct letter is the most likely of the four.
            ``accuracy_generated``: percentage of questions for which the model generates the correct letter.
            ``invalid_answers``: percentage of questions for which it generates no letter; they count as wrong.
            ``accuracy/SUBJECT``: ``accuracy`` by subject, if the data names subjects.
        """
        outcomes = self.outcomes(rows, answers)
        if not outcomes:
            return {}
        metrics = {
            "accuracy": percentage(outcome["accuracy"] for outcome in outcomes),
            "accuracy_generated": percentage(outcome["written"] == outcome["right"] for outcome in outcomes),
            "invalid_answers": percentage(outcome["written"] is None for outcome in outcomes),
        }
        right = [outcome["accuracy"] for outcome in outcomes]
        return metrics | percentage_by("accuracy", [row.get("subject_name") for row in rows], right)

    def outcomes(self, rows: list[Row], answers: list[list[Answer]]) -> list[dict[str, Any]]:
        """Return for each question whether it counts, the correct letter, the most likely one and any generated one."""
        return [
            {
                "accuracy": (chosen := LETTERS[cast(OptionScores, options).best]) == (right := LETTERS[row["cop"]]),
                "right": right,
                "chosen": chosen,
                "written": written_letter(cast(str, text)),
            }
            for row, (options, text) in zip(rows, answers, strict=True)
        ]


def question_prompt(row: Row) -> str:
    """Return the question, its options, and the word before the answer."""
    options = [f"{letter}. {row[field].strip()}" for letter, field in zip(LETTERS, OPTIONS, strict=True)]
    return "\n".join([f"Question: {row['question'].strip()}", *options, "Answer:"])


def answered_question(row: Row) -> str:
    """Return the question and the text of the right option."""
    return f"{row['question'].strip()} {row[OPTIONS[row['cop']]].strip()}"


def written_letter(text: str) -> str | None:
    """Return the letter at the start of an answer if it stands alone or before ``)``, ``.`` or a newline; else None."""
    found = _LETTER.match(text.rstrip())
    return found[1] if found else None
