"""A CSV file that many runs append to, even at the same time."""

import csv
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from molf.files import atomic_write


def append_csv(path: Path, row: Mapping[str, Any], key: str | None = None) -> None:
    """Append a row to a CSV file that several runs may share; new columns come last, empty in older rows.

    Under a lock, the new version of the file is written beside the old one and replaces it: a writer that is killed loses at most
    its own row, and a reader never sees half a row. Old rows are parsed only if there are new columns or a row is replaced.

    Args:
        path: The file; created with its parents if missing.
        row: Values by column.
        key: A column with a unique value per row: a row with the same value is replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"), atomic_write(path) as partial:
        columns = _columns(path)
        new = [name for name in row if name not in columns]
        replaced = None
        if key in columns and str(row[key]).encode() in path.read_bytes():
            replaced = key, str(row[key])
        if new or replaced or not _ends_with_newline(path):
            columns += new
            _rewrite(path, partial, columns, replaced)
        else:
            shutil.copyfile(path, partial)
        with partial.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, columns).writerow(row)


def _columns(path: Path) -> list[str]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return next(csv.reader(file), [])


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _rewrite(path: Path, target: Path, columns: list[str], left_out: tuple[str, str] | None) -> None:
    """Copy a file with new columns, without the rows that have ``left_out[1]`` in the column ``left_out[0]``."""
    with target.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        if path.exists():
            with path.open(newline="", encoding="utf-8") as old:
                writer.writerows(
                    row for row in csv.DictReader(old) if left_out is None or row[left_out[0]] != left_out[1]
                )
