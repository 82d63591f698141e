"""Any number of results in one place: found in folders, read one by one, written as CSV or Parquet."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molf.files import atomic_write
from molf.study.results.result import RESULT_FILE, Result, read_result


@dataclass(frozen=True)
class Gathered:
    """What was found.

    Attributes:
        results: The results by their run's folder, in the order of the folders' names.
        unreadable: Why a file is none, by its path.
    """

    results: dict[str, Result]
    unreadable: dict[str, str]

    def rows(self) -> list[dict[str, Any]]:
        """Return one flat row per result (``Result.row``), with the folder before it."""
        return [{"folder": folder, **result.row()} for folder, result in self.results.items()]


def gather(places: Iterable[Path]) -> Gathered:
    """Read all results in some folders and in the folders in them.

    Args:
        places: Folders, or ``result.json`` files.

    Raises:
        ValueError: A place is not there, or there is no result in any.
    """
    places = list(places)
    files = sorted({file for place in places for file in _files(place)})
    if not files:
        raise ValueError(f"there is no {RESULT_FILE} in {', '.join(map(str, places))}")
    results, unreadable = {}, {}
    for file in files:
        try:
            results[str(file.parent)] = read_result(file)
        except (ValueError, OSError) as error:
            unreadable[str(file)] = str(error)
    return Gathered(results, unreadable)


def _files(place: Path) -> Iterable[Path]:
    if not place.exists():
        raise ValueError(f"there is no {place}")
    return [place] if place.is_file() else place.rglob(RESULT_FILE)


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as a CSV file, whole or not at all; what a row does not have is empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _columns(rows))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as a Parquet file, whole or not at all; what a row does not have is null.

    A column whose values are of several types, such as a setting that is a word in one run and a number in another, is text.
    """
    from pyarrow import parquet, table

    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {name: _column([row.get(name) for row in rows]) for name in _columns(rows)}
    with atomic_write(path) as partial:
        parquet.write_table(table(columns), partial)


def _columns(rows: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _column(values: list[Any]) -> list[Any]:
    kinds = {type(value) for value in values if value is not None}
    if kinds == {int, float}:
        return [None if value is None else float(value) for value in values]
    return values if len(kinds) < 2 else [None if value is None else str(value) for value in values]
