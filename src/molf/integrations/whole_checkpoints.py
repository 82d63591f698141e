"""A Trainer whose checkpoints are complete or absent, and which resumes from the last complete one."""

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

from molf.errors import MolfError
from molf.integrations.checkpoint_folder import (
    MANIFEST,
    PREFIX,
    UNFINISHED,
    checkpoints,
    commit,
    global_step,
    has_manifest,
    has_optimizer,
    last_complete,
    recover,
    rotate,
    set_aside,
    step_of,
    verify,
    write_manifest,
)

logger = logging.getLogger(__name__)


class CheckpointError(MolfError, OSError):
    """A checkpoint could not be written: the disk is full, or the like."""


class CheckpointPart:
    """What a method keeps in a checkpoint beside the Trainer's own files. Each method here does nothing.

    Attributes:
        replaces_weights: Whether ``restore`` restores all weights, so that the Trainer's weights are not loaded.
        every_rank: Whether every process saves its own share of the part, rather than the main process alone.
    """

    replaces_weights = False
    every_rank = False

    def check(self, folder: Path) -> None:
        """Raise an error if this run cannot resume from a checkpoint; called before anything is loaded."""

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the part's files into a checkpoint."""

    def restore(self, model: nn.Module, folder: Path) -> None:
        """Restore the model from a checkpoint."""


class WholeCheckpoints:
    """Mixin for any ``transformers.Trainer``: ``class MyTrainer(WholeCheckpoints, SFTTrainer)``.

    The Trainer writes directly into ``checkpoint-N`` and has no hook for anything else. This mixin lets it write into a folder
    beside it, adds a manifest and renames the folder once everything is on disk; only then are old checkpoints removed. File
    names, contents and the meaning of ``save_strategy`` and ``save_total_limit`` stay the Trainer's. A plain Trainer resumes
    from such a checkpoint, and this one from a plain Trainer's.
    """

    parts: Sequence[CheckpointPart] = ()
    _writing = False

    # Attributes of the Trainer.
    args: Any
    state: Any
    control: Any
    accelerator: Any
    model: Any
    model_wrapped: Any
    is_fsdp_enabled: bool

    def find_checkpoint(self, resume_from: str | bool | None) -> Path | None:
        """Clean up the run's folder and return the checkpoint to resume from, the same on every process.

        Args:
            resume_from: True for the last complete checkpoint, or a folder. Later checkpoints of the same run are then set aside,
                because they belong to another continuation.

        Returns:
            The folder; None if there is no checkpoint or none was asked for.
        """
        found: list[Path | None] = [None]
        run_folder = Path(self.args.output_dir)
        if self.args.should_save and resume_from:
            recover(run_folder)
            found[0] = last_complete(run_folder) if resume_from is True else _given(Path(str(resume_from)), run_folder)
            if found[0] is None:
                logger.warning("no checkpoint in %s yet: training starts from the beginning", run_folder)
            else:
                _check_optimizer(found[0])
        broadcast_object_list(found)
        if (checkpoint := found[0]) is not None:
            if self.args.should_save and not has_manifest(checkpoint):
                logger.warning("%s has no %s: only that a Trainer wrote it to its end is known", checkpoint, MANIFEST)
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
                write_manifest(partial)
                commit(partial, target)
        except (OSError, SafetensorError, RuntimeError, CheckpointException) as error:
            if (cause := _write_error(error)) is None:
                raise
            # Only its text: keeping the error would keep the half-written file open.
            message = _failure(target, str(cause))
            del cause
            shutil.rmtree(partial.parent, ignore_errors=True)
            raise CheckpointError(message) from error
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

    def _load_best_model(self) -> None:
        # The Trainer's own would load one adapter and no parts.
        best = Path(self.state.best_model_checkpoint)
        if problem := f"there is no folder {best}" if not best.is_dir() else verify(best):
            raise MolfError(
                f"load_best_model_at_end: {best} is not a complete checkpoint: {problem}; resume without load_best_model_at_end "
                "to keep the model of the last step"
            )
        self._load_from_checkpoint(str(best), self.model_wrapped if self.is_fsdp_enabled else None)

    def _run_epoch(self, **kwargs: Any) -> None:
        # The Trainer would take one more step after resuming from the checkpoint of the last step inside an epoch.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)  # type: ignore[misc]


def _given(checkpoint: Path, run_folder: Path) -> Path:
    if problem := f"there is no folder {checkpoint}" if not checkpoint.is_dir() else verify(checkpoint):
        raise MolfError(
            f"resume_from_checkpoint={checkpoint} is not a complete checkpoint: {problem}; give another one, or True for "
            f"the last complete one in {run_folder}"
        )
    _check_optimizer(checkpoint)
    if checkpoint.resolve().parent == run_folder.resolve():
        step = global_step(checkpoint)
        for later in checkpoints(run_folder):
            if step_of(later) >= step and later.resolve() != checkpoint.resolve():
                kept = set_aside(later, "superseded")
                logger.warning("%s is not before %s; it is kept as %s", later, checkpoint.name, kept.name)
    return checkpoint


def _check_optimizer(checkpoint: Path) -> None:
    """Refuse a checkpoint from which the Trainer would go on with fresh moments."""
    if not has_optimizer(checkpoint):
        raise MolfError(
            f"{checkpoint} has no optimizer state (save_only_model), so no run can resume from it; give another checkpoint, or "
            "pass --overwrite without --resume_from_checkpoint to train from the start"
        )


def _write_error(error: BaseException) -> BaseException | None:
    """Return the failure to write a file behind an error, on this rank or another; None if the error has another cause."""
    if isinstance(error, CheckpointException):  # every rank gets the causes, without their tracebacks
        causes = (cause for cause, _ in error.failures.values())
        return next((cause for cause in causes if isinstance(cause, OSError | SafetensorError)), None)
    # torch.save raises a RuntimeError with varying messages when the disk is full.
    *_, (innermost, _) = traceback.walk_tb(error.__traceback__)
    written = isinstance(error, OSError | SafetensorError) or innermost.f_globals["__name__"] == "torch.serialization"
    return error if written else None


def _failure(target: Path, cause: str) -> str:
    existing = next(path for path in target.parents if path.is_dir())
    free = shutil.disk_usage(existing).free / 2**20
    before = checkpoints(target.parent)
    last = f"the last complete one is {before[-1]}" if before else "there is none before it"
    reason = cause.strip().splitlines()[0]
    return f"the checkpoint {target} cannot be written: {reason} ({free:,.1f} MiB free there); {last}"
