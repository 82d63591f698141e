"""The records of a user's data by split: a file, a folder of files, or what ``datasets`` saved or loaded."""

import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

from molf.errors import MolfError
from molf.tasks.base import Row
from molf.tasks.formats import JSON_NAMES, READ, Located, is_readable, json_name, records_of

Splits: TypeAlias = dict[str, Iterable[Located]]
"""Records by split: ``train``, ``validation``, ``test`` and others of any name, or ``UNNAMED`` alone."""
UNNAMED = ""
"""The split of files whose names do not tell their split."""

_log = logging.getLogger(__name__)

_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "validation"),
    "test": "test",
}
_BESIDE_DATA = re.compile(r"(readme|licen[cs]e|notice|citation|copying|changelog)\b.*|.*\.(md|rst|py|sh|ya?ml)")
"""Names of files that go with data and hold none."""


def local_splits(path: Path) -> Splits:
    """Return the records of a file, of a folder of files, or of a folder saved by ``datasets``.

    In a folder, a file belongs to the split whose name is a word of the file's or its subfolder's name:
    ``train-00000-of-00001.parquet``, ``medmcqa_dev.jsonl``, ``test/part1.csv``. Files are sorted by name; hidden ones and
    documentation are left out.

    Raises:
        MolfError: There is nothing to read, or something that is not read.
    """
    if not path.exists():
        raise MolfError(f"no file or folder {path}")
    if not path.is_dir():
        if not is_readable(path.name):
            raise MolfError(f"{path}: cannot tell the format; the name must end as one of {READ}")
        return {UNNAMED: records_of(path)}
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        from datasets import load_from_disk

        try:
            return located_splits(load_from_disk(str(path)), str(path))
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:  # its files are read unchecked
            raise MolfError(f"{path}: `datasets` cannot read it: {str(error).splitlines()[0]}") from error
    by_split: dict[str, list[Path]] = defaultdict(list)
    for file in sorted(_data_files(path)):
        words = re.split(r"[^a-z]+", file.relative_to(path).as_posix().lower())
        split = next((_SPLIT_WORDS[word] for word in reversed(words) if word in _SPLIT_WORDS), UNNAMED)
        by_split[split].append(file)
    if not by_split:
        raise MolfError(f"no {READ} file in the folder {path}")
    if UNNAMED in by_split and len(by_split) > 1:
        raise MolfError(
            f"{by_split[UNNAMED][0]}: cannot tell the split; other files have one, so this name must contain one of the "
            f"words {', '.join(_SPLIT_WORDS)}"
        )
    return {split: chain.from_iterable(map(records_of, files)) for split, files in by_split.items()}


def _data_files(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder, links to other folders included."""

    def unreadable(error: OSError) -> None:
        raise MolfError(f"{error.filename}: cannot be read: {error.strerror}") from error

    for place, folders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for inner in (Path(place, name) for name in folders):
            if inner.resolve() in {parent.resolve() for parent in inner.absolute().parents}:
                raise MolfError(f"{inner}: a link to a folder that it is in; remove it")
        for file in (Path(place, name) for name in names if not name.startswith(".")):
            if is_readable(file.name) and file.is_file():
                yield file
            elif not _BESIDE_DATA.fullmatch(file.name.lower()):
                reason = "cannot tell the format" if file.is_file() else "not a file"
                raise MolfError(
                    f"{file}: {reason}; what is read ends as one of {READ}. Move it out of {folder}, or convert it"
                )


def located_splits(loaded: Any, origin: str) -> Splits:
    """Return the records of what ``datasets`` loaded, a ``Dataset`` or a ``DatasetDict``.

    Splits that mean the same, such as ``validation`` and ``dev``, keep their own names.
    """

    def located(rows: Iterable[Any], where: str) -> Iterator[Located]:
        return ((f"{where}, row {number}", row) for number, row in enumerate(rows, start=1))

    if not isinstance(loaded, dict):
        return {UNNAMED: located(loaded, origin)}
    names = {str(split): rows for split, rows in loaded.items()}
    meanings = Counter(map(_meaning, names))
    return {
        _meaning(name) if meanings[_meaning(name)] == 1 else name: located(rows, f"{origin}, split {name}")
        for name, rows in names.items()
    }


def split_names(found: Splits, split: str) -> list[str]:
    """Return the names of all splits that mean the same as ``split``: ``dev`` is ``validation``."""
    return [name for name in found if _meaning(name) == _meaning(split)]


def tell_unused(names: Iterable[str], origin: str) -> None:
    """Warn about splits of the user's data that a run neither trains nor evaluates on."""
    if unused := ", ".join(name or "rows without one" for name in names):
        _log.warning("%s: splits that are not used: %s", origin, unused)


def _meaning(split: str) -> str:
    return _SPLIT_WORDS.get(split.lower(), split)


def check_fields(record: Row, fields: Mapping[str, type], where: str) -> None:
    """Check the types of a record's fields; a dot in a name goes into an object (``"rewrite.prompt": str``)."""
    for name, expected in fields.items():
        value: Any = record
        for key in name.split("."):
            if not isinstance(value, dict) or key not in value:
                there = ", ".join(value) if isinstance(value, dict) else json_name(value)
                raise MolfError(f"{where}: no field {name!r}; {key!r} is missing from: {there or 'nothing'}")
            value = value[key]
        if not isinstance(value, expected):
            raise MolfError(f"{where}: field {name!r} must be {JSON_NAMES[expected]}, found {json_name(value)}")
