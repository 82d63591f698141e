"""A Trainer whose checkpoints appear whole or not at all, and which goes on from the last whole one."""

from __future__ import annotations

import logging
import os
import shutil
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from molf.integrations.checkpoint_folder import (
    PREFIX,
    UNFINISHED,
    checkpoints,
    fault,
    last_whole,
    publish,
    rotate,
    seal,
    set_aside,
    step_of,
    tidy,
)

__all__ = ["CheckpointPart", "WholeCheckpoints"]

logger = logging.getLogger(__name__)


class CheckpointPart:
    """What a method keeps in a checkpoint beside the Trainer's own files; each method here does nothing.

    Attributes:
        replaces_weights: Whether ``restore`` brings back all weights, and what the Trainer saved of them is not to be read.
        every_rank: Whether every process of a run saves its own share of the part, rather than the writing one alone.
    """

    replaces_weights = False
    every_rank = False

    def check(self, folder: Path) -> None:
        """Refuse a checkpoint that this run cannot go on from, before anything of it is loaded."""

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the part's files into a checkpoint."""

    def restore(self, model: nn.Module, folder: Path) -> None:
        """Bring the model back to where it was."""


class WholeCheckpoints:
    """Mixin for any ``transformers.Trainer``: ``class MyTrainer(WholeCheckpoints, SFTTrainer)``.

    The Trainer writes right into ``checkpoint-N`` and offers no hook in between. Here it writes into a folder beside it, which
    is sealed with a manifest and renamed once everything is on the disk; only then old checkpoints are removed. Everything
    else is the Trainer's: file names, contents, what ``save_strategy`` and ``save_total_limit`` mean. A plain Trainer resumes
    from such a checkpoint, and this one from a plain Trainer's.
    """

    parts: Sequence[CheckpointPart] = ()
    _writing = False

    # What comes from the Trainer.
    args: Any
    state: Any
    control: Any
    accelerator: Any
    model: Any

    def find_checkpoint(self, resume_from: str | bool | None) -> Path | None:
        """Put the run's folder in order and return the checkpoint to go on from, on every process the same.

        Args:
            resume_from: True for the last whole checkpoint, or a folder. Later ones of the same run are set aside then, as they
                belong to another continuation.

        Returns:
            The folder; None where there is nothing to go on from, or that was not asked for.

        Raises:
            ValueError: The given folder is no whole checkpoint, or the checkpoint is of another kind of run.
        """
        found: list[Path | None] = [None]
        run_folder = Path(self.args.output_dir)
        if self.args.should_save and resume_from:
            tidy(run_folder)
            found[0] = last_whole(run_folder) if resume_from is True else _given(Path(str(resume_from)), run_folder)
            if found[0] is None:
                logger.warning("no checkpoint in %s yet: training starts from the beginning", run_folder)
        broadcast_object_list(found)
        if (checkpoint := found[0]) is not None:
            for part in self.parts:
                part.check(checkpoint)
        return checkpoint

    def _get_output_dir(self, trial: Any) -> str:
        folder: str = super()._get_output_dir(trial)  # type: ignore[misc]
        return os.path.join(folder, UNFINISHED) if self._writing else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        target = Path(self._get_output_dir(trial)) / f"{PREFIX}{self.state.global_step}"
        partial = target.parent / UNFINISHED / target.name
        try:
            self._write(model, trial, partial, target)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                seal(partial)
                publish(partial, target)
        except (OSError, SafetensorError, RuntimeError, CheckpointException) as error:
            # Words only: an error kept here would keep itself, and the half-written file that it holds open.
            if (words := _not_written(target, error)) is None:
                raise
            shutil.rmtree(partial.parent, ignore_errors=True)
            raise OSError(words) from error
        if self.args.should_save:
            rotate(target.parent, self.args.save_total_limit, self.state.best_model_checkpoint)
            partial.parent.rmdir()
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(target))

    def _write(self, model: nn.Module, trial: Any, partial: Path, target: Path) -> None:
        self._writing = True
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        finally:
            self._writing = False
        for part in self.parts:
            if part.every_rank or self.args.should_save:
                part.save(self.accelerator.unwrap_model(self.model), partial)
        if self.args.should_save and self.state.best_model_checkpoint == str(partial):
            self.state.best_model_checkpoint = str(target)
            self.state.save_to_json(str(partial / "trainer_state.json"))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._writing:
            super()._push_from_checkpoint(checkpoint_folder)  # type: ignore[misc]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not any(part.replaces_weights for part in self.parts):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        for part in self.parts:
            part.restore(self.accelerator.unwrap_model(self.model), Path(resume_from_checkpoint))

    def _run_epoch(self, **kwargs: Any) -> None:
        # Going on from the checkpoint of the last step inside an epoch, the Trainer would take one step more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)  # type: ignore[misc]


def _given(checkpoint: Path, run_folder: Path) -> Path:
    if problem := f"there is no folder {checkpoint}" if not checkpoint.is_dir() else fault(checkpoint):
        raise ValueError(
            f"resume_from_checkpoint={checkpoint} is no whole checkpoint: {problem}; give another, or True for the last whole "
            f"one of {run_folder}"
        )
    if checkpoint.resolve().parent == run_folder.resolve():
        for later in checkpoints(run_folder):
            if step_of(later) > step_of(checkpoint):
                kept = set_aside(later, "superseded")
                logger.warning("%s is later than %s; it is kept as %s", later, checkpoint.name, kept.name)
    return checkpoint


def _write_error(error: BaseException) -> BaseException | None:
    """Return the error of writing files that an error is, or that a rank of a sharded run had; None if it is another."""
    if isinstance(error, CheckpointException):  # every rank gets it, and the causes lose their tracebacks on the way
        causes = (cause for cause, _ in error.failures.values())
        return next((cause for cause in causes if isinstance(cause, OSError | SafetensorError)), None)
    # For a full disk torch has no class, and several wordings.
    *_, (innermost, _) = traceback.walk_tb(error.__traceback__)
    written = isinstance(error, OSError | SafetensorError) or innermost.f_globals["__name__"] == "torch.serialization"
    return error if written else None


def _not_written(target: Path, error: BaseException) -> str | None:
    """Say why a checkpoint could not be written; None if that is not what the error is about."""
    if (failed := _write_error(error)) is None:
        return None
    cause = str(failed).strip().splitlines()[0]
    free = shutil.disk_usage(_existing(target.parent)).free
    before = checkpoints(target.parent)
    last = f"the last whole one is {before[-1]}" if before else "there is none before it"
    return f"the checkpoint {target} cannot be written: {cause} ({free / 2**20:,.1f} MiB free there); {last}"


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.is_dir())
