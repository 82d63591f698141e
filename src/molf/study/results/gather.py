"""The results of many runs in one table: gathered from folders, or appended to a shared CSV file by every run."""

import errno
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
from filelock import FileLock
from pandas.api.types import infer_dtype
from pyarrow import parquet

from molf.errors import MolfError
from molf.files import NotWritable, atomic_write, is_stream, write_errors
from molf.study.results.result import RESULT_FILE, Result, check_link, read_result


@dataclass(frozen=True)
class Gathered:
    """The results that were found.

    Attributes:
        results: Results by the folder of their run, sorted by folder.
        unreadable: Why a file could not be read, by its path.
    """

    results: dict[str, Result]
    unreadable: dict[str, str]

    @cached_property
    def table(self) -> pd.DataFrame:
        """One flat row per result (``Result.row``), with its folder in the first column."""
        rows = [{"folder": folder, **result.row()} for folder, result in self.results.items()]
        return pd.DataFrame(rows, dtype=object)  # an int with gaps stays an int

    def write_csv(self, path: Path) -> None:
        """Write the table as CSV; what a result does not have is empty."""
        with atomic_write(path) as partial:
            self.table.to_csv(partial, index=False)

    def write_parquet(self, path: Path) -> None:
        """Write the table as Parquet; what a result does not have is null.

        A column of several types, such as a setting that is a word in one run and a number in another, becomes text.
        """
        table = self.table.copy()
        for name, column in table.items():
            if infer_dtype(column, skipna=True) in ("mixed", "mixed-integer"):
                table[name] = column.map(str, na_action="ignore")
        with atomic_write(path) as partial:
            table.to_parquet(partial, index=False)


def gather(places: Iterable[Path]) -> Gathered:
    """Read all results in folders, at any depth, also behind symlinks; a folder with several paths is read once.

    Raises:
        MolfError: A place does not exist, or none has a result in it.
    """
    places = list(places)
    results: dict[str, Result] = {}
    unreadable: dict[str, str] = {}
    files: dict[str, Path] = {}
    for place in places:
        for file in _files(place, unreadable):
            files.setdefault(os.path.join(os.path.realpath(file.parent), file.name), file)
    if not files and not unreadable:
        raise MolfError(f"there is no {RESULT_FILE} in {', '.join(map(str, places))}")
    for file in sorted(files.values()):
        try:
            # The bytes of a name need not be text.
            folder = os.fsencode(file.parent).decode(errors="backslashreplace")
            results[folder] = read_result(file)
        except (MolfError, OSError) as error:
            unreadable[str(file)] = str(error)
    return Gathered(results, unreadable)


def _files(place: Path, unreadable: dict[str, str]) -> Iterator[Path]:
    """Yield the results in a place, and note what cannot be looked into: folders and broken symlinks."""
    if not os.path.lexists(place):
        raise MolfError(f"there is no {place}")
    if not place.is_dir():
        yield place
        return

    def note(error: OSError) -> None:
        unreadable[str(error.filename)] = f"{error.filename}: {error.strerror}"

    left, seen = [place], set()
    while left:  # symlinks last: a folder is named by its own path if it has one
        for folder, folders, files in os.walk(left.pop(0), onerror=note):
            if (real := os.path.realpath(folder)) in seen:
                folders.clear()
                continue
            seen.add(real)
            here, is_run = Path(folder), RESULT_FILE in [*folders, *files]
            left += sorted(here / name for name in folders if (here / name).is_symlink())
            if is_run:
                yield here / RESULT_FILE
            for path in [here / name for name in files if not is_run]:  # perhaps the folder of a run
                try:
                    check_link(path)
                except MolfError as error:
                    unreadable[str(path)] = str(error)


def append_csv(path: Path, row: Mapping[str, Any], key: str | None = None) -> None:
    """Append a row to a CSV file that several runs may share; new columns come last, empty in older rows.

    Under a lock, the new version of the file is written beside the old one and replaces it: a writer that is killed loses at most
    its own row, and a reader never sees half a row. A stream such as ``/dev/stdout`` gets the row with its header.

    Args:
        path: The file; created with its parents if missing.
        row: Values by column.
        key: A column with a unique value per row: a row with the same value is replaced.
    """
    tables = [pd.DataFrame([row], dtype=object)]
    if is_stream(path):
        with atomic_write(path) as partial:
            return _write_rows(tables, partial)
    real = Path(os.path.realpath(path))  # one lock for a file, whatever it is called
    with _lock(real), atomic_write(real) as partial:
        if real.exists() and real.stat().st_size > 0:
            older = _read_rows(real)
            if key is not None and key in older:
                older = older[older[key] != str(row[key])]
            tables.insert(0, older)
        _write_rows(tables, partial)


def log_file() -> Path | None:
    """Return the CSV file that ``$LOG_FILE`` asks for."""
    return Path(given).expanduser() if (given := os.environ.get("LOG_FILE")) else None


def check_log(path: Path) -> None:
    """Check that ``append_csv`` can add a row to a file, before there is one; nothing is changed.

    Raises:
        MolfError: It is a folder, a pipe or a disk, not writable, or has contents that are not such a log: CSV in UTF-8 with a
            column ``run_id``.
    """
    if is_stream(path):
        if os.path.realpath(path) == "/dev/full":
            raise NotWritable(f"cannot write {path}: {os.strerror(errno.ENOSPC)}; choose another path")
        if path.is_fifo():
            raise NotWritable(f"cannot write {path}: it is a named pipe, which needs a reader; choose a file")
        return
    real = Path(os.path.realpath(path))
    if real.exists() and real.stat().st_size > 0 and "run_id" not in _read_rows(real):
        raise MolfError(
            f"{path} is not a CSV table of runs (its header has no run_id); choose another file, or move it"
        )
    nearest = next(place for place in (real, *real.parents) if os.path.lexists(place))
    with write_errors(path):
        if nearest != real and not nearest.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not (os.access(nearest, os.W_OK) and os.access(nearest if nearest != real else real.parent, os.W_OK)):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def check_parquet(path: Path) -> None:
    """Check that a Parquet table may replace a file; nothing is changed.

    Raises:
        MolfError: It is a folder or a disk, or has contents that are not such a table.
    """
    if is_stream(path) or not path.exists() or path.stat().st_size == 0:
        return
    try:
        known = "run_id" in parquet.read_schema(path).names
    except (pa.ArrowException, OSError):
        known = False
    if not known:
        raise MolfError(f"{path} is not a Parquet table of runs; choose another file, or move it")


def _read_rows(file: Path) -> pd.DataFrame:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "error", pd.errors.ParserWarning
            )  # rows with more cells than the header, which would be cut
            header = pd.read_csv(file, header=None, nrows=1, dtype=str, keep_default_na=False).iloc[0].tolist()
            if len(set(header)) < len(header) or "" in header:  # pandas would rename these
                twice = next(name for name in header if not name or header.count(name) > 1)
                problem = f"names {twice!r} twice" if twice else "has a column without a name"
                raise MolfError(f"the header of {file} {problem}, so it gets no row; repair or move it")
            return pd.read_csv(file, dtype=str, keep_default_na=False, index_col=False)
    except (UnicodeDecodeError, pd.errors.ParserError, pd.errors.ParserWarning, pd.errors.EmptyDataError) as error:
        raise MolfError(f"{file} is not CSV in UTF-8 ({error}), so it gets no row; repair or move it") from error


def _write_rows(tables: Sequence[pd.DataFrame], path: Path) -> None:
    pd.concat(tables).to_csv(path, index=False, lineterminator="\r\n")


@contextmanager
def _lock(file: Path) -> Iterator[None]:
    with ExitStack() as held:
        with write_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(FileLock(f"{file}.lock"))
        yield
