"""Records by split: of a user's files, whose names tell the split, and of data sets on the Hub."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

from molf.tasks.data import offline_switch
from molf.tasks.records import Located, record_files, records_of

Splits: TypeAlias = dict[str, Iterable[Located]]
"""Records by split: ``train``, ``validation`` and ``test``, or ``UNNAMED`` alone."""

UNNAMED = ""
"""The split of records whose file says nothing of splits."""

_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
    "test": "test",
}
_SAVED_DICT, _SAVED = "dataset_dict.json", "state.json"


def local_splits(path: Path) -> Splits:
    """Return the records of a file, of a folder of files, or of a folder that ``datasets`` saved.

    In a folder, a file belongs to the split whose name is a word of the file's name or of its subfolder's:
    ``train-00000-of-00001.parquet``, ``medmcqa_dev.jsonl``, ``test/part1.csv``.

    Raises:
        FileNotFoundError: If there is nothing of the kind.
        ValueError: If a file's name tells neither its format nor, where others do, its split.
    """
    if (path / _SAVED_DICT).is_file() or (path / _SAVED).is_file():
        from datasets import load_from_disk

        return _located(load_from_disk(str(path)), str(path))
    files = record_files(path)
    if files == [path]:
        return {UNNAMED: records_of(path)}
    named = [(file, _split_name(file.relative_to(path))) for file in files]
    unclear = [file for file, split in named if split is None]
    if unclear and len(unclear) < len(named):
        raise ValueError(
            f"{unclear[0]}: cannot tell the split; next to files of named splits, a name must hold one of the words "
            f"{', '.join(_WORDS)}"
        )
    by_split: dict[str, list[Path]] = defaultdict(list)
    for file, split in named:
        by_split[split or UNNAMED].append(file)
    return {split: chain.from_iterable(map(records_of, own)) for split, own in by_split.items()}


def _split_name(file: Path) -> str | None:
    words = re.split(r"[^a-z]+", file.as_posix().lower())
    return next((_WORDS[word] for word in reversed(words) if word in _WORDS), None)


def hub_splits(name: str, advice: str) -> tuple[Splits, str]:
    """Return the records of a data set on the Hub, at one commit, and what to call it: ``id@commit``.

    Everything is downloaded once; without a network the commit that was downloaded last is read. No code of the data
    set's is ever run: ``datasets`` reads plain data files only.

    Args:
        name: The data set's id, with ``@`` and a branch, tag or commit where it is not to be the newest.
        advice: What the user can do where it cannot be had.

    Raises:
        ConnectionError: If it is neither on the Hub nor in the cache.
        ValueError: If ``datasets`` cannot read it.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    dataset_id, _, revision = name.partition("@")
    switch = offline_switch()
    try:
        # Not load_dataset(name): offline, that takes whatever version it read last and does not say which.
        folder = Path(
            snapshot_download(
                dataset_id, repo_type="dataset", revision=revision or None, local_files_only=switch is not None
            )
        )
    except (OSError, HFValidationError) as error:
        not_cached = switch is not None and isinstance(error, LocalEntryNotFoundError)
        reason = f"{switch} is set and no copy is in the cache" if not_cached else _first_line(error)
        raise ConnectionError(f"cannot get the data set {name} from the Hub: {reason}. {advice}") from error
    origin = f"{dataset_id}@{folder.name}"
    try:
        return _located(load_dataset(str(folder)), origin), origin
    except (DatasetsError, OSError, ValueError) as error:
        raise ValueError(f"{origin}: `datasets` cannot read it: {_first_line(error)}. {advice}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _located(loaded: Any, origin: str) -> Splits:
    """Take apart what ``datasets`` loaded: a ``Dataset``, or one for each split."""
    if not isinstance(loaded, dict):
        return {UNNAMED: _rows(loaded, origin)}
    return {
        _WORDS.get(str(split), str(split)): _rows(rows, f"{origin}, split {split}") for split, rows in loaded.items()
    }


def _rows(rows: Iterable[Any], where: str) -> Iterator[Located]:
    return ((f"{where}, row {number}", row) for number, row in enumerate(rows, start=1))
