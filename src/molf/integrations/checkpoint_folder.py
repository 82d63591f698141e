"""Checkpoint folders that are whole or not there: sealed by a manifest, put in place by a rename, checked before use.

A run's folder holds ``checkpoint-N``, whole ones only; ``.unfinished/checkpoint-N``, which are being written or removed; and
``damaged-checkpoint-N`` or ``superseded-checkpoint-N``, which are kept for their owner and never read again.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

__all__ = [
    "MANIFEST",
    "UNFINISHED",
    "checkpoints",
    "fault",
    "publish",
    "remove_checkpoints",
    "rotate",
    "seal",
    "sync",
    "tidy",
]

MANIFEST = "checkpoint_manifest.json"
UNFINISHED = ".unfinished"
PREFIX = "checkpoint-"
_ASIDE = ("damaged", "superseded")
_TRAINER_STATE = "trainer_state.json"  # a Trainer writes it last

logger = logging.getLogger(__name__)


def checkpoints(folder: Path) -> list[Path]:
    """Return the ``checkpoint-N`` folders of a run's folder by their step, the latest last."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.is_dir() and path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the step after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix(PREFIX))


def seal(checkpoint: Path) -> None:
    """Bring all files of a folder to the disk, then write the manifest: their sizes and SHA-256 sums."""
    files = list(_files(checkpoint))
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(_sync_and_digest, files))
    entries = {
        file.relative_to(checkpoint).as_posix(): {"bytes": file.stat().st_size, "sha256": digest}
        for file, digest in zip(files, digests, strict=True)
    }
    manifest = checkpoint / MANIFEST
    manifest.write_text(json.dumps({"files": entries}, indent=1), encoding="utf-8")
    sync(manifest)
    sync(checkpoint)


def publish(sealed: Path, target: Path) -> None:
    """Give a sealed folder its final name.

    Killed after removing what had the name before, the sealed folder is there still, and ``tidy`` finishes the move.
    """
    if target.exists():
        shutil.rmtree(target)
    os.replace(sealed, target)
    sync(target.parent)


def fault(checkpoint: Path) -> str | None:
    """Say what is wrong with a checkpoint, or return None for a whole one.

    One without a manifest, written by a plain Trainer, is taken as whole where the file is that the Trainer writes last.
    """
    if not (checkpoint / MANIFEST).is_file():
        return _unreadable_json(checkpoint / _TRAINER_STATE)
    if problem := _unreadable_json(checkpoint / MANIFEST):
        return problem
    entries: dict[str, dict[str, Any]] = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
    for name, entry in entries.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{name} has {file.stat().st_size} of {entry['bytes']} bytes"
    with ThreadPoolExecutor() as pool:
        for (name, entry), digest in zip(
            entries.items(), pool.map(_digest, [checkpoint / name for name in entries]), strict=True
        ):
            if digest != entry["sha256"]:
                return f"{name} is not what was written (its SHA-256 differs)"
    return None


def tidy(folder: Path) -> None:
    """Finish or remove what a killed run left unfinished."""
    for left in sorted((folder / UNFINISHED).glob(f"{PREFIX}*")):
        if (left / MANIFEST).is_file() and fault(left) is None:
            publish(left, folder / left.name)
            logger.warning("%s was written but not in place yet; it is now", folder / left.name)
    if (folder / UNFINISHED).is_dir():
        shutil.rmtree(folder / UNFINISHED)


def last_whole(folder: Path) -> Path | None:
    """Return the latest whole checkpoint; damaged ones after it are reported and set aside."""
    for checkpoint in reversed(checkpoints(folder)):
        problem = fault(checkpoint)
        if problem is None:
            return checkpoint
        kept = set_aside(checkpoint, "damaged")
        logger.warning("%s is damaged: %s. The one before is used; it is kept as %s", checkpoint, problem, kept.name)
    return None


def set_aside(checkpoint: Path, why: str) -> Path:
    """Rename a checkpoint so that nothing reads, counts or removes it: ``damaged-`` or ``superseded-checkpoint-N``."""
    assert why in _ASIDE
    target = checkpoint.with_name(f"{why}-{checkpoint.name}")
    shutil.rmtree(target, ignore_errors=True)
    return checkpoint.rename(target)


def rotate(folder: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints above a limit, but never the latest nor the best, as the Trainer does.

    Each is renamed first, so that what a kill leaves of it can't be taken for a checkpoint.
    """
    if not limit or limit < 0:
        return
    there = checkpoints(folder)
    kept = {there[-1], *(path for path in there if best is not None and path.resolve() == Path(best).resolve())}
    excess = len(there) - max(limit, len(kept))
    for checkpoint in [path for path in there if path not in kept][: max(excess, 0)]:
        leaving = folder / UNFINISHED / f"removing-{checkpoint.name}"
        leaving.parent.mkdir(exist_ok=True)
        shutil.rmtree(checkpoint.rename(leaving))


def remove_checkpoints(folder: Path) -> None:
    """Remove all that this module ever leaves in a run's folder."""
    aside = [path for why in _ASIDE for path in folder.glob(f"{why}-{PREFIX}*")]
    for path in [*checkpoints(folder), *aside, folder / UNFINISHED]:
        if path.is_dir():
            shutil.rmtree(path)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST)


def _unreadable_json(file: Path) -> str | None:
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{file.name} is missing"
    except ValueError as error:
        return f"{file.name} is no JSON ({error})"
    return None


def _sync_and_digest(file: Path) -> str:
    sync(file)
    return _digest(file)


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
