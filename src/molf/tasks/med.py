"""MedMCQA: four-option questions of Indian medical entrance exams.

The data set is A. Pal, L. K. Umapathi, M. Sankarasubbu, "MedMCQA: A Large-scale Multi-Subject Multi-Choice Dataset for
Medical domain Question Answering", CHIL 2022. Its test split has no public answers, so the validation split is what is
evaluated on. Every question is read in two ways: which of the four letters is the most likely next token, and which letter
the model writes by itself.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, cast

from molf.tasks.base import Answer, Generate, Metric, NextToken, OptionScores, Request, Row, Split
from molf.tasks.metrics import percentage
from molf.tasks.sources import HubData, Source

LETTERS = "ABCD"
OPTIONS = ("opa", "opb", "opc", "opd")
MAX_NEW_TOKENS = 4

_LETTER = re.compile(r"\s*([A-D])(?:$|[).\n])")


def _problem(row: Row) -> str | None:
    """Say why a record with all its fields still cannot be used."""
    if not row["question"].strip():
        return "the question is empty"
    if not 0 <= row["cop"] <= len(LETTERS):
        return f"cop={row['cop']} names no option; it must be 0 to 3 (the published test split has no answers)"
    return None


def count_from_zero(rows: list[Row]) -> list[Row]:
    """Bring ``cop`` of all rows of a file to 0..3, as on the Hub; the authors' own files count from 1.

    Raises:
        ValueError: If the rows do not tell which of the two it is.
    """
    found = {row["cop"] for row in rows}
    if {0, 4} <= found:
        raise ValueError("cop is 0 in some rows and 4 in others; it must be 0 to 3, or 1 to 4 as in the authors' files")
    if not found & {0, 4}:
        raise ValueError(
            f"cop is {', '.join(map(str, sorted(found)))} in all rows, so that it may count from 0 or from 1; add a row "
            "whose answer is the first option (0) or, counting from 1, the last (4)"
        )
    return [{**row, "cop": row["cop"] - 1} for row in rows] if 4 in found else rows


SOURCE = Source(
    published=HubData("openlifescienceai/medmcqa"),
    packaged=("medmcqa_train_sample.jsonl.gz", "medmcqa_validation_sample.jsonl.gz"),
    splits=("train", "validation"),
    fields={"question": str, "cop": int, **dict.fromkeys(OPTIONS, str)},
    problem=_problem,
    normal=count_from_zero,
)


class Med:
    """The MedMCQA benchmark."""

    name: str = "med"
    headline: str = "accuracy"

    def load(
        self, data_path: str | None = None, *, sample: bool = False, limit: int | None = None, seed: int = 0
    ) -> Split:
        """Load the questions; ``limit`` takes the first ones of each split.

        Args:
            data_path: A folder with a train and a validation file, or one file to evaluate on; None for the Hub's.
            sample: Use the packaged slice, 1,828 questions to train on and 500 to evaluate on.
            limit: The most questions per split; None for all.
            seed: Not used, nothing is chosen at random.

        Raises:
            ValueError: If the arguments contradict each other or a record is not usable.
            OSError: If the data cannot be read or downloaded.
        """
        return SOURCE.load(data_path, sample=sample, limit=limit)

    def example(self, row: Row) -> dict[str, str]:
        """Return the question with its options, and the letter of the right one."""
        return {"prompt": question_prompt(row), "completion": f" {LETTERS[row['cop']]}"}

    def requests(self, row: Row) -> list[Request]:
        """Ask for the next token among the letters, and for what the model writes."""
        prompt = question_prompt(row)
        return [NextToken(prompt, tuple(f" {letter}" for letter in LETTERS)), Generate(prompt, MAX_NEW_TOKENS)]

    def score(self, rows: list[Row], answers: list[list[Answer]]) -> dict[str, Metric]:
        """Return how many questions are answered rightly.

        Returns:
            ``accuracy``: percentage of questions whose right letter is the most likely of the four.
            ``accuracy_generated``: percentage of questions for which the model writes the right letter.
            ``invalid_answers``: percentage of questions for which it writes no letter; they count as wrong.
            ``accuracy/SUBJECT``: ``accuracy`` of the questions of a subject, where the data names subjects.
        """
        outcomes = self.outcomes(rows, answers)
        if not outcomes:
            return {}
        metrics = {
            "accuracy": percentage(outcome["chosen"] == outcome["right"] for outcome in outcomes),
            "accuracy_generated": percentage(outcome["written"] == outcome["right"] for outcome in outcomes),
            "invalid_answers": percentage(outcome["written"] is None for outcome in outcomes),
        }
        by_subject = defaultdict(list)
        for row, outcome in zip(rows, outcomes, strict=True):
            if subject := row.get("subject_name"):
                by_subject[subject].append(outcome["chosen"] == outcome["right"])
        return metrics | {f"accuracy/{subject}": percentage(by_subject[subject]) for subject in sorted(by_subject)}

    def outcomes(self, rows: list[Row], answers: list[list[Answer]]) -> list[dict[str, Any]]:
        """Return for each question the right letter, the most likely one, and the one written, if any."""
        return [
            {
                "right": LETTERS[row["cop"]],
                "chosen": LETTERS[cast(OptionScores, options).best],
                "written": written_letter(cast(str, text)),
            }
            for row, (options, text) in zip(rows, answers, strict=True)
        ]


def question_prompt(row: Row) -> str:
    """Return the question, its options by letter, and the word that the answer follows."""
    return "\n".join([f"Question: {row['question'].strip()}", *_options(row), "Answer:"])


def _options(row: Row) -> Iterable[str]:
    return (f"{letter}. {row[field].strip()}" for letter, field in zip(LETTERS, OPTIONS, strict=True))


def written_letter(text: str) -> str | None:
    """Return the letter that an answer begins with, alone or followed by ``)``, ``.`` or a newline; else None."""
    found = _LETTER.match(text.rstrip())
    return found[1] if found else None
