"""How close a written query is to the reference: its text, its logic, its result, and BLEU of all of them."""

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from molf.tasks.base import Metric
from molf.tasks.metrics import statistic
from molf.tasks.sql_ast import Schema, logic_of

RELATIVE_TOLERANCE = 1e-6
ABSOLUTE_TOLERANCE = 1e-9

_KEYWORDS = "SELECT|WITH|INSERT|UPDATE|DELETE|REPLACE|CREATE|DROP|ALTER|VALUES"
_FENCE = re.compile(r"```[ \t]*(?:sqlite|sql)?[ \t]*\n?(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
_BEGINNING = re.compile(rf"^[ \t(]*(?:{_KEYWORDS})\b", re.MULTILINE | re.IGNORECASE)
_INSIDE_TEXT = re.compile(rf"\b(?:{_KEYWORDS})\b(?=\s)")
_LITERAL = r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\""
_STATEMENT = re.compile(rf"(?:{_LITERAL}|[^;])*")
_PROSE = re.compile(r"\n\s*\n(?=[A-Z#][a-z]|[*#-])")
_TOKEN = re.compile(rf"{_LITERAL}|\w+(?:\.\w+)*|<=|>=|<>|!=|==|\|\||\S")

Cells = tuple[Any, ...]


def extract_sql(text: str) -> str:
    """Return the first SQL statement of what a model wrote, without code fence, chatter and semicolon.

    Args:
        text: SQL alone, in a code fence, or with words before or, after an empty line, behind it.
    """
    if fenced := _FENCE.search(text):
        text = fenced[1]
    if begun := _BEGINNING.search(text) or _INSIDE_TEXT.search(text):
        text = text[begun.start() :]
    statement = _STATEMENT.match(text)
    assert statement is not None
    return _PROSE.split(statement[0], maxsplit=1)[0].strip()


def exact_match(written: str, reference: str) -> bool:
    """Return whether two queries are the same text, but for white space, case outside literals and a last semicolon."""
    return _tokens(written) == _tokens(reference)


def _tokens(sql: str) -> list[str]:
    tokens = [token if token[0] in "'\"" else token.lower() for token in _TOKEN.findall(sql)]
    while tokens and tokens[-1] == ";":
        tokens.pop()
    return tokens


def logic_match(written: str, reference: str, schema: Schema) -> bool:
    """Return whether two queries say the same thing (``logic_of``); equal texts do, even if they cannot be parsed."""
    if exact_match(written, reference):
        return True
    wanted = logic_of(reference, schema)
    return wanted is not None and wanted == logic_of(written, schema)


def same_rows(found: Sequence[Cells], wanted: Sequence[Cells], *, ordered: bool) -> bool:
    """Compare the results of two queries.

    Numbers are equal within ``RELATIVE_TOLERANCE``, an integer may equal a float, NULL equals NULL, texts are compared as they
    are. The names of columns do not matter, their order does.

    Args:
        found: A result.
        wanted: The right one.
        ordered: Whether the order of rows matters. If not, they are compared as multisets.
    """
    if len(found) != len(wanted):
        return False
    if not ordered:
        found, wanted = sorted(found, key=_sort_key), sorted(wanted, key=_sort_key)
    return all(
        len(one) == len(other) and all(map(_same_cell, one, other)) for one, other in zip(found, wanted, strict=True)
    )


def _same_cell(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, int | float) or isinstance(one, int) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=RELATIVE_TOLERANCE, abs_tol=ABSOLUTE_TOLERANCE)
    return type(one) is type(other) and bool(one == other)


def _sort_key(cells: Cells) -> tuple[Any, ...]:
    """Order rows by all that is no number first, so that two sums which differ in the last bits cannot swap rows."""
    others = tuple((place, type(cell).__name__, cell) for place, cell in enumerate(cells) if not _is_number(cell))
    # A NULL is never compared with another one: equal places and types tie, and the cells are the same object.
    return others, tuple(float(f"{cell:.6g}") for cell in cells if _is_number(cell))


def _is_number(cell: Any) -> bool:
    return isinstance(cell, int | float)


def corpus_bleu(written: Sequence[str], references: Sequence[str]) -> Metric:
    """Return corpus BLEU by sacrebleu (tokenizer 13a, exponential smoothing), with its interval.

    Args:
        written: Queries.
        references: For each the right one.
    """
    from sacrebleu import BLEU

    bleu = BLEU(effective_order=True)  # of single queries only their counts are used
    scores = [
        bleu.sentence_score(_one_line(text), [_one_line(right)])
        for text, right in zip(written, references, strict=True)
    ]
    counts = np.array([[*score.counts, *score.totals, score.sys_len, score.ref_len] for score in scores])

    def compute(columns: list[np.ndarray]) -> np.ndarray:
        sums = np.stack([column.sum(axis=-1) for column in columns], axis=-1)
        return np.apply_along_axis(_bleu_of_counts, -1, sums)

    return statistic(compute, *counts.T)


def _bleu_of_counts(sums: np.ndarray) -> float:
    from sacrebleu import BLEU

    *matches, written_length, right_length = (int(value) for value in sums)
    return float(BLEU.compute_bleu(matches[:4], matches[4:], written_length, right_length, smooth_method="exp").score)


def _one_line(sql: str) -> str:
    return " ".join(sql.split()).rstrip("; ")
