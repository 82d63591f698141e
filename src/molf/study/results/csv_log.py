"""A CSV file that many runs append to, even at the same time."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock

from molf.files import atomic_write


def append_csv(path: Path, row: Mapping[str, Any], key: str | None = None) -> None:
    """Append a row to a CSV file that several runs may share; new columns come last, empty in older rows.

    Under a lock, the new version of the file is written beside the old one and replaces it: a writer that is killed loses at most
    its own row, and a reader never sees half a row.

    Args:
        path: The file; created with its parents if missing.
        row: Values by column.
        key: A column with a unique value per row: a row with the same value is replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tables = [pd.DataFrame([row], dtype=object)]
    with FileLock(f"{path}.lock"), atomic_write(path) as partial:
        if path.exists() and path.stat().st_size > 0:
            older = pd.read_csv(path, dtype=str, keep_default_na=False)
            if key is not None and key in older:
                older = older[older[key] != str(row[key])]
            tables.insert(0, older)
        pd.concat(tables).to_csv(partial, index=False, lineterminator="\r\n")
