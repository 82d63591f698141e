"""How close a generated query is to the reference: its text, its logic, its result, and BLEU over all queries."""

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
_LINE_START = re.compile(rf"^[ \t(]*(?:{_KEYWORDS})\b", re.MULTILINE | re.IGNORECASE)
_INSIDE_TEXT = re.compile(rf"\b(?:{_KEYWORDS})\b(?=\s)")
_LITERAL = r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\""
_STATEMENT = re.compile(rf"(?:{_LITERAL}|[^;])*")
_PROSE = re.compile(r"\n[^\S\n]*\n(?=[A-Z#][a-z]|[*#-])")
_TOKEN = re.compile(rf"{_LITERAL}|\w+(?:\.\w+)*|<=|>=|<>|!=|==|\|\||\S")

Cells = tuple[Any, ...]


def extract_sql(text: str) -> str:
    """Return the first SQL statement of a generated text, without code fence, prose and semicolon."""
    if fenced := _FENCE.search(text):
        text = fenced[1]
    if start := _LINE_START.search(text) or _INSIDE_TEXT.search(text):
        text = text[start.start() :]
    statement = _STATEMENT.match(text)
    assert statement is not None  # the pattern matches the empty text, too
    return _PROSE.split(statement[0], maxsplit=1)[0].strip()


def exact_match(written: str, reference: str) -> bool:
    """Return whether two queries are equal up to white space, case outside literals and a final semicolon."""
    return _tokens(written) == _tokens(reference)


def _tokens(sql: str) -> list[str]:
    tokens = [token if token[0] in "'\"" else token.lower() for token in _TOKEN.findall(sql)]
    while tokens and tokens[-1] == ";":
        tokens.pop()
    return tokens


def logic_match(written: str, reference: str, schema: Schema) -> bool:
    """Return whether two queries say the same (``logic_of``); equal texts do, even if they cannot be parsed."""
    if exact_match(written, reference):
        return True
    wanted = logic_of(reference, schema)
    return wanted is not None and wanted == logic_of(written, schema)


def same_rows(found: Sequence[Cells], wanted: Sequence[Cells], *, ordered: bool) -> bool:
    """Compare the results of two queries.

    Numbers are equal within ``RELATIVE_TOLERANCE``, an integer may equal a float, NULL equals NULL, strings are compared
    exactly. The order of columns matters, their names do not. Results that are not ``ordered`` are compared as multisets.
    """
    if len(found) != len(wanted):
        return False
    if not ordered:
        found, wanted = sorted(found, key=_sort_key), sorted(wanted, key=_sort_key)
    return all(
        len(one) == len(other) and all(map(_same_cell, one, other)) for one, other in zip(found, wanted, strict=True)
    )


def _same_cell(one: Any, other: Any) -> bool:
    if type(one) is not type(other) and not (_is_number(one) and _is_number(other)):
        return False
    if isinstance(one, float) or isinstance(other, float):
        return math.isclose(one, other, rel_tol=RELATIVE_TOLERANCE, abs_tol=ABSOLUTE_TOLERANCE)
    return bool(one == other)


def _sort_key(cells: Cells) -> tuple[Any, ...]:
    """Sort rows by their other cells before their numbers: sums that differ in the last bits must not swap rows."""
    others = tuple((place, type(cell).__name__, cell) for place, cell in enumerate(cells) if not _is_number(cell))
    # A NULL is never compared with another one: equal places and types tie, and the cells are the same object.
    return others, tuple(float(f"{cell:.6g}") for cell in cells if _is_number(cell))


def _is_number(cell: Any) -> bool:
    return isinstance(cell, int | float)


def corpus_bleu(written: Sequence[str], references: Sequence[str]) -> Metric:
    """Return sacrebleu's corpus BLEU (tokenizer 13a, exponential smoothing), with its interval."""
    from sacrebleu import BLEU  # slow to import

    bleu = BLEU(effective_order=True)  # only the counts of single queries are used
    scores = [
        bleu.sentence_score(_one_line(text), [_one_line(right)])
        for text, right in zip(written, references, strict=True)
    ]
    counts = np.array([[*score.counts, *score.totals, score.sys_len, score.ref_len] for score in scores])

    def of_counts(sums: np.ndarray) -> float:
        *matches, written_length, right_length = (int(value) for value in sums)
        found = BLEU.compute_bleu(matches[:4], matches[4:], written_length, right_length, smooth_method="exp")
        return float(found.score)

    def compute(columns: list[np.ndarray]) -> np.ndarray:
        return np.apply_along_axis(of_counts, -1, np.stack([column.sum(axis=-1) for column in columns], axis=-1))

    return statistic(compute, *counts.T)


def _one_line(sql: str) -> str:
    return " ".join(sql.split()).rstrip("; ")
