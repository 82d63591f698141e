"""Checkpoint folders that are complete or absent: written beside, listed in a manifest, renamed into place, checked before use.

A run's folder holds ``checkpoint-N``, complete ones only; ``.unfinished/checkpoint-N``, those being written or removed; and
``damaged-checkpoint-N`` or ``superseded-checkpoint-N``, kept for the user and never read again.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

from molf.errors import MolfError
from molf.files import read_json, typed

MANIFEST = "checkpoint_manifest.json"
SETTINGS_FILE = "made_with.json"
"""The settings of the run that wrote a checkpoint; a plain Trainer writes none."""
UNFINISHED = ".unfinished"
PREFIX = "checkpoint-"
_ASIDE = ("damaged", "superseded")
_TRAINER_STATE = "trainer_state.json"  # a Trainer writes it last
# Hashing gigabytes at each save takes minutes, and size, fsync and rename already detect unfinished writes.
_HASHED_BYTES = 2**20

logger = logging.getLogger(__name__)


def checkpoints(folder: Path) -> list[Path]:
    """Return the ``checkpoint-N`` folders of a run, ordered by step."""
    return sorted((path for path in folder.glob(f"{PREFIX}*") if path.is_dir() and is_left(path.name)), key=step_of)


def is_left(name: str) -> bool:
    """Return whether this module makes files of a name in a run's folder, which ``remove_checkpoints`` removes."""
    aside = rf"({'|'.join(_ASIDE)})-{PREFIX}[0-9]+(-[0-9]+)?"
    return name == UNFINISHED or re.fullmatch(rf"{PREFIX}[0-9]+|{aside}", name) is not None


def step_of(checkpoint: Path) -> int:
    """Return the step after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix(PREFIX))


def write_manifest(checkpoint: Path) -> None:
    """Flush all files of a folder to disk, then list them: their sizes, and SHA-256 digests of files up to 1 MiB."""
    entries: dict[str, dict[str, Any]] = {}
    for file in sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != MANIFEST):
        sync(file)
        entry = entries[file.relative_to(checkpoint).as_posix()] = {"bytes": file.stat().st_size}
        if entry["bytes"] <= _HASHED_BYTES:
            entry["sha256"] = _digest(file)
    manifest = checkpoint / MANIFEST
    manifest.write_text(json.dumps({"files": entries}, indent=1), encoding="utf-8")
    sync(manifest)
    sync(checkpoint)


def commit(written: Path, target: Path) -> None:
    """Rename a folder with a manifest to its final name.

    If the process is killed after an older ``target`` is removed, ``recover`` finishes the rename.
    """
    _delete(target)
    os.replace(written, target)
    sync(target.parent)


def verify(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None if it is complete.

    A checkpoint with neither a manifest nor settings was written by a plain Trainer. It counts as complete if the file that the
    Trainer writes last is there.
    """
    try:
        if not has_manifest(checkpoint) and not (checkpoint / SETTINGS_FILE).exists():
            global_step(checkpoint)
            return None
        entries = _read(checkpoint / MANIFEST, _Manifest).files
    except MolfError as error:
        return str(error)
    for name, entry in entries.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry.bytes:
            return f"{name} has {file.stat().st_size} of {entry.bytes} bytes"
        # Manifests of earlier versions have digests of large files too.
        if entry.bytes <= _HASHED_BYTES and _digest(file) != entry.sha256:
            return f"{name} has other contents than were written (its SHA-256 differs)"
    return None


def has_manifest(checkpoint: Path) -> bool:
    """Return whether a checkpoint lists its files; a plain Trainer's does not."""
    return (checkpoint / MANIFEST).is_file()


def global_step(checkpoint: Path) -> int:
    """Return the step after which a checkpoint was written, whatever its name.

    Raises:
        MolfError: The state of the Trainer is missing or damaged.
    """
    state = _read(checkpoint / _TRAINER_STATE, dict[str, Any])
    try:
        return int(typed(int, state.get("global_step"), "global_step"))
    except MolfError as error:
        raise MolfError(f"{_TRAINER_STATE} is damaged: {error}") from error


def recover(folder: Path) -> None:
    """Finish or remove the checkpoints that a killed run left unfinished."""
    for left in sorted((folder / UNFINISHED).glob(f"{PREFIX}*")):
        if is_left(left.name) and has_manifest(left) and verify(left) is None:
            commit(left, folder / left.name)
            logger.warning("%s was complete but not in place yet; it is now", folder / left.name)
    _delete(folder / UNFINISHED)


def can_resume(folder: Path) -> bool:
    """Return whether a run's folder has a complete checkpoint, in place or still to be renamed; nothing is changed."""
    unfinished = (path for path in (folder / UNFINISHED).glob(f"{PREFIX}*") if (path / MANIFEST).is_file())
    return any(verify(path) is None and has_optimizer(path) for path in [*checkpoints(folder), *unfinished])


def has_optimizer(checkpoint: Path) -> bool:
    """Return whether a checkpoint has the state of an optimizer, in one file or in shards."""
    return any(checkpoint.glob("optimizer*"))


def last_complete(folder: Path) -> Path | None:
    """Return the latest complete checkpoint; damaged ones after it are reported and renamed."""
    for checkpoint in reversed(checkpoints(folder)):
        problem = verify(checkpoint)
        if problem is None:
            return checkpoint
        kept = set_aside(checkpoint, "damaged")
        logger.warning("%s is damaged: %s. Using the one before; it is kept as %s", checkpoint, problem, kept.name)
    return None


def set_aside(checkpoint: Path, why: str) -> Path:
    """Rename a checkpoint to ``damaged-`` or ``superseded-checkpoint-N``, so that nothing reads, counts or removes it.

    If there is one of that name, its own ends in ``-2``, ``-3`` and so on.
    """
    assert why in _ASIDE
    names = (f"{why}-{checkpoint.name}{number}" for number in chain([""], (f"-{n}" for n in count(2))))
    return checkpoint.rename(next(path for name in names if not os.path.lexists(path := checkpoint.with_name(name))))


def rotate(folder: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints above a limit, but never the latest or the best one, as the Trainer does."""
    if not limit or limit < 0:
        return
    found = checkpoints(folder)
    kept = {found[-1], *(path for path in found if best is not None and path.resolve() == Path(best).resolve())}
    excess = len(found) - max(limit, len(kept))
    for checkpoint in [path for path in found if path not in kept][: max(excess, 0)]:
        _remove(checkpoint)


def remove_checkpoints(folder: Path, aside: bool = True) -> None:
    """Remove all checkpoints of a run's folder, and what is unfinished.

    Args:
        folder: The run's folder.
        aside: Also remove those that were set aside.
    """
    others = [path for why in _ASIDE for path in folder.glob(f"{why}-{PREFIX}*")] if aside else []
    for checkpoint in [*checkpoints(folder), *others]:
        _remove(checkpoint)
    _delete(folder / UNFINISHED)


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint, which is renamed first: what is left of it after a kill is never taken for a checkpoint."""
    leaving = checkpoint.parent / UNFINISHED / f"removing-{checkpoint.name}"
    leaving.parent.mkdir(exist_ok=True)
    _delete(leaving)  # of an earlier attempt
    _delete(checkpoint.rename(leaving))


def _delete(path: Path) -> None:
    """Remove a folder if it is there; of a symlink the link alone."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


@dataclass(frozen=True)
class _Entry:
    bytes: int
    sha256: str | None = None


@dataclass(frozen=True)
class _Manifest:
    files: dict[str, _Entry]


def _read(file: Path, kind: Any) -> Any:
    try:
        return read_json(file, kind)
    except OSError as error:
        raise MolfError(f"{file.name} is missing ({error.strerror})") from error
    except MolfError as error:
        raise MolfError(f"{file.name} is damaged: {error}") from error


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk, so that they survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
