"""The folder of a run: whether a run may write there, and what is removed before it starts from the beginning."""

import errno
import logging
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from molf.errors import MolfError
from molf.files import atomic_write
from molf.integrations.checkpoint_folder import can_resume, checkpoints, is_left, remove_checkpoints
from molf.integrations.routing_lines import LOG_FILES
from molf.study.config.run_config import RunConfig
from molf.study.config.sameness import differing
from molf.study.engine.predictions import PREDICTIONS_BEFORE_FILE, PREDICTIONS_FILE
from molf.study.faults.run_lock import lock_file
from molf.study.faults.trained import TRAINED_FILE
from molf.study.methods.adapters import ADAPTERS_FOLDER
from molf.study.results.gather import check_log, log_file
from molf.study.results.history import HISTORY_FILE
from molf.study.results.result import RESULT_FILE, Result, check_link, read_result
from molf.study.results.tables import PICTURE_FILE

_log = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
CARD_FILE = "README.md"
RUN_ID_FILE = ".run_id"

_FULL = ("No space left on device", "Disk quota exceeded")
_INPUTS = (
    *("model_name_or_path", "chat_template_path", "data_path", "eval_path", "retention_path"),
    *("fsdp_config", "accelerator_config"),  # which may be files
)
_EVALUATED = (RESULT_FILE, PREDICTIONS_FILE, CONFIG_FILE, RUN_ID_FILE)
_MEASURED = (*LOG_FILES.values(), PICTURE_FILE, HISTORY_FILE, PREDICTIONS_BEFORE_FILE)
# What other commands make of a run, where they write by default.
_MADE = re.compile(rf"{ADAPTERS_FOLDER}|export-(peft|merged)|recipe-[a-z]+(-\d+)?|report\.html")
_TRAINED = re.compile(
    "|".join((*map(re.escape, (*_MEASURED, CARD_FILE, TRAINED_FILE)), _MADE.pattern))
    + r"|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|(generation_)?config\.json"
    # What the tokenizers of transformers save, by any of their classes.
    r"|(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json|vocab\.txt|merges\.txt"
    r"|(tokenizer|spiece|sentencepiece|sentencepiece\.bpe)\.model|chat_template\.jinja|additional_chat_templates"
)


def check_folder(config: RunConfig) -> None:
    """Check that a run may write into its folder.

    An evaluation may replace an evaluation, and leaves checkpoints alone.

    Raises:
        MolfError: The folder holds a run that is neither overwritten nor resumed, a broken symlink for its result, files of
            other origin that the run would replace, or what it reads, or is not writable; $LOG_FILE cannot get a row; a setting
            cannot be written as text.
    """
    folder, evaluating = config.output_dir, config.output.only_eval
    _check_text(config)
    check_name(folder)
    check_link(folder / RESULT_FILE)
    _check_writable(folder)
    _check_inputs(config)
    _check_foreign(config)
    if (log := log_file()) is not None:
        check_log(log)
    finished = (folder / RESULT_FILE).exists()
    resumable = can_resume(folder) or (folder / TRAINED_FILE).exists()
    last = config.resume_from is True
    # A finished run that cannot resume stays: starting from the beginning would replace it.
    if config.output.overwrite or (config.resume_from and not (last and finished and not resumable)):
        return
    if last and not evaluating:
        raise MolfError(
            f"{folder} holds a finished run, and no complete checkpoint to resume from; choose another --output_dir, or pass "
            "--overwrite without --resume_from_checkpoint to replace it"
        )
    unfinished = not finished and not evaluating and (resumable or bool(checkpoints(folder)))
    if unfinished or (finished and not (evaluating and read_result(folder).training is None)):
        raise MolfError(
            f"{folder} holds {'a finished run' if finished else 'an unfinished run that can resume'}; pass --overwrite to "
            "replace it, --resume_from_checkpoint True to resume from what it saved last, or another --output_dir"
        )


def finished_result(config: RunConfig) -> Result | None:
    """Return the result of this very run if it is finished and asked to resume: nothing is left to do."""
    check_name(config.output_dir)
    if config.resume_from is not True or not (config.output_dir / RESULT_FILE).is_file():
        return None
    with suppress(MolfError):  # what cannot be read is still a finished run: `check_folder` keeps it
        result = read_result(config.output_dir)
        return None if differing(result.config, config, "evaluation") else result
    return None


def check_name(folder: Path) -> None:
    """Check that a path can name a folder and the lock beside it.

    Raises:
        MolfError: It is too long, or the file system cannot look it up.
    """
    try:
        os.lstat(lock_file(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:  # ValueError: a null character
        why = getattr(error, "strerror", None) or error
        raise MolfError(f"output_dir={folder} cannot name a folder: {why}; choose another") from error


def _check_text(config: RunConfig) -> None:
    for name, value in config.to_dict().items():
        try:
            str(value).encode()
        except UnicodeEncodeError as error:
            raise MolfError(
                f"{name}={value!r} is not Unicode text, so no result could record it; give another value"
            ) from error


def _writes(name: str, training: bool) -> bool:
    """Return whether a run writes, replaces or removes a file or folder of a name in its folder."""
    return name in _EVALUATED or (training and (_TRAINED.fullmatch(name) is not None or is_left(name)))


def _check_inputs(config: RunConfig) -> None:
    """Refuse inputs that the run would remove or replace, by whatever path they are given."""
    folder, training = Path(os.path.realpath(config.output_dir)), not config.output.only_eval
    # A file behind a symlink is replaced too.
    written = {os.path.realpath(folder / name) for name in _names(folder) if _writes(name, training)}
    settings = config.to_dict()
    inputs = [(name, settings.get(name)) for name in _INPUTS if isinstance(settings.get(name), str)]
    inputs += [("config", file) for file in config.files] + [("recipe", config.method.allocation)]
    log = log_file()
    for name, given in [*inputs, ("LOG_FILE", log)]:
        if not given:
            continue
        path = Path(os.path.realpath(Path(given).expanduser()))
        first = next(iter(path.relative_to(folder).parts), "") if path.is_relative_to(folder) else None
        own = str(path) in written or (first is not None and (_writes(first, training) if first else training))
        if own and (path.exists() or name in ("model_name_or_path", "LOG_FILE")):
            raise MolfError(
                f"{name}={given} is {'' if first == '' else 'in '}output_dir={config.output_dir}, where the run would replace "
                "it; choose another --output_dir"
            )
        if log and name != "LOG_FILE" and path == Path(os.path.realpath(log)):
            raise MolfError(f"LOG_FILE={log} is also {name}, which the run reads; choose another LOG_FILE")


def _names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def check_foreign(folder: Path, training: bool = True) -> None:
    """Refuse a folder without a run that has files of the names that a run writes.

    Raises:
        MolfError: There are such files; they are named.
    """
    names = _names(folder)
    if any(name in (RESULT_FILE, RUN_ID_FILE, TRAINED_FILE) or is_left(name) for name in names):
        return
    if foreign := [name for name in names if _writes(name, training)]:
        raise MolfError(
            f"{folder} holds {', '.join(foreign)}, which no run wrote and this one would replace; move what you need, or choose "
            "another folder"
        )


def _check_foreign(config: RunConfig) -> None:
    """Check for files of the user, whom ``overwrite`` allows to replace them unless they are those of the model."""
    folder, evaluating, model = config.output_dir, config.output.only_eval, config.model.model_name_or_path
    reads = model is not None and os.path.realpath(Path(model).expanduser()) == os.path.realpath(folder)
    if not config.output.overwrite or reads:
        check_foreign(folder, training=not evaluating)


def _check_writable(folder: Path) -> None:
    """Try to write a file that is removed at once, before anything is computed."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise MolfError(f"output_dir={folder} is not writable ({nearest}: {error.strerror}); choose another") from error


def clear_folder(folder: Path, aside: bool) -> None:
    """Remove an earlier run but for what is replaced later, and what was made of it; checkpoints set aside if so asked."""
    for name in (RESULT_FILE, PREDICTIONS_FILE, *_MEASURED):  # the others are replaced later
        (folder / name).unlink(missing_ok=True)
    for path in map(folder.joinpath, filter(_MADE.fullmatch, _names(folder))):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    remove_checkpoints(folder, aside)


def run_id(folder: Path) -> str:
    """Return the id of the run in a folder. It stays the same over all starts of the run, until its result is written."""
    file, result = folder / RUN_ID_FILE, folder / RESULT_FILE
    if file.is_file():
        known = file.read_bytes()
        if not re.fullmatch(rb"[0-9a-f]{32}", known):
            _log.warning("%s is damaged; the run gets a new id, and perhaps another row in $LOG_FILE", file)
        elif not (result.is_file() and known in result.read_bytes()):
            return known.decode()
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as partial:
        partial.write_text(uuid.uuid4().hex, encoding="utf-8")
    return file.read_text(encoding="utf-8")


@contextmanager
def report_full_disk(folder: Path) -> Iterator[None]:
    """Turn the error of a full disk into a ``MolfError`` that says what to do."""
    try:
        yield
    except Exception as error:  # those of tokenizers have no type of their own
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(
            words in str(error) for words in _FULL
        )
        if not full or isinstance(error, MolfError):
            raise
        raise MolfError(
            f"the disk of {folder} is full: free some space, then run the same command with --resume_from_checkpoint True to "
            "resume from what was saved last"
        ) from error
