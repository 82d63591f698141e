"""The folder of a run: what may be written into it, and what must go before a run starts anew."""

import shutil
import tempfile
import uuid
from pathlib import Path

from molf.files import atomic_write
from molf.integrations.checkpoint_folder import checkpoints, remove_checkpoints
from molf.integrations.routing_log import FILE_NAME as ROUTING_FILE
from molf.study.config.run_config import RunConfig
from molf.study.engine.predictions import PREDICTIONS_FILE
from molf.study.faults.trained import TRAINED_FILE
from molf.study.methods.adapters import ADAPTERS_FOLDER
from molf.study.results.result import RESULT_FILE, read_result

CONFIG_FILE = "config.yaml"
CARD_FILE = "README.md"
PICTURE_FILE = "routing.png"
RUN_ID_FILE = ".run_id"


def check_folder(config: RunConfig) -> None:
    """Refuse to write over what an earlier run left, or over the model to be trained.

    An evaluation may replace an evaluation, and leaves checkpoints alone.

    Raises:
        ValueError: The folder holds a run and neither overwriting nor resuming was asked for, or it is the model's own.
        OSError: The folder cannot be written.
    """
    folder, evaluating = config.output_dir, config.output.only_eval
    model = config.model.model_name_or_path
    if model and not evaluating and folder.exists() and Path(model).resolve() == folder.resolve():
        raise ValueError(f"output_dir={folder} is the folder of the model to be trained; choose another output_dir")
    _check_writable(folder)
    finished = (folder / RESULT_FILE).exists()
    resumable = bool(checkpoints(folder)) or (folder / TRAINED_FILE).exists()
    # A finished run that left no checkpoint has nothing to go on from, and starting anew would replace it.
    going_on = config.resume_from and not (config.resume_from is True and finished and not resumable)
    if config.output.overwrite or going_on:
        return
    unfinished = not finished and not evaluating and resumable
    if unfinished or (finished and not (evaluating and read_result(folder).training is None)):
        raise ValueError(
            f"{folder} holds {'a finished run' if finished else 'what an unfinished run can go on from'}; pass --overwrite to "
            "replace it, --resume_from_checkpoint True to go on from what it saved last, or another --output_dir"
        )


def _check_writable(folder: Path) -> None:
    """Find out before anything is computed; nothing is left behind."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise OSError(
            f"output_dir={folder} cannot be written, because of {nearest}: {error.strerror}; choose another output_dir"
        ) from error


def clear_folder(folder: Path) -> None:
    """Remove what an earlier run left that could be taken for this one's: its result, log, picture and checkpoints."""
    for name in (RESULT_FILE, ROUTING_FILE, PREDICTIONS_FILE, PICTURE_FILE):
        (folder / name).unlink(missing_ok=True)
    if (folder / ADAPTERS_FOLDER).is_dir():
        shutil.rmtree(folder / ADAPTERS_FOLDER)
    remove_checkpoints(folder)


def run_id(folder: Path) -> str:
    """Return the id of the run in a folder: the same however often it is started, until the result is there that carries it."""
    file, result = folder / RUN_ID_FILE, folder / RESULT_FILE
    if file.is_file():
        known = file.read_text(encoding="utf-8")
        if not (result.is_file() and known in result.read_text(encoding="utf-8")):
            return known
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as partial:
        partial.write_text(uuid.uuid4().hex, encoding="utf-8")
    return file.read_text(encoding="utf-8")
