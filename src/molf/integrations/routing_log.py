"""A Trainer callback that writes down what the router decided."""

from __future__ import annotations

import json
import logging
import os
from collections import deque
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from molf.integrations.checkpoint_folder import sync
from molf.integrations.fetching import Fetch
from molf.integrations.trainer import check_release_settings, clip_once
from molf.optimizer import MoLF
from molf.routing import Routing

__all__ = ["FILE_NAME", "RoutingLog", "selection_record"]

logger = logging.getLogger(__name__)

FILE_NAME = "molf_expert_selection.jsonl"
_MOST_PENDING = 16  # decisions that may be on their way; so far behind, an accelerator is waited for


def selection_record(step: int, routing: Routing) -> dict[str, Any]:
    """Return one line of the log: the winners (best first) and all scores of every module at a step."""
    winners = routing.winners()
    scores = routing.scores.tolist()
    return {
        "step": step,
        "selections": {
            module: {"winners": winners[module], "scores": dict(zip(routing.experts, row, strict=True))}
            for module, row in zip(routing.modules, scores, strict=True)
        },
    }


class RoutingLog(TrainerCallback):  # type: ignore[misc]
    """Write every step's decision to ``molf_expert_selection.jsonl`` and add MoLF's numbers to the Trainer's logs.

    Each line is ``{"step": 3, "selections": {module: {"winners": [...], "scores": {expert: score}}}}``. The logs get
    ``lr/fft``, ``lr/lora``, ``molf/fft_share`` (share of the wins since the last log), ``molf/skipped_steps`` and
    ``grad_norm``. On resuming, lines of steps after the checkpoint are dropped, so there are neither gaps nor duplicates.

    No step waits for a decision that is on an accelerator still: its line follows when it is there, and before the Trainer logs,
    saves the optimizer or ends.

    Args:
        output_dir: Folder of the log file, created when training starts. Only the main process writes.
    """

    def __init__(self, output_dir: str | os.PathLike[str]):
        self.path = Path(output_dir) / FILE_NAME
        self._writes = False
        self._shares: list[float] = []
        self._last: Routing | None = None
        self._rates: dict[str, float | Tensor] = {}
        self._pending: deque[tuple[int, Fetch]] = deque()
        self._before_saving: Any = None

    def attach(self, trainer: Trainer) -> RoutingLog:
        """Add this callback to a trainer, ahead of the reporting ones, so that trackers receive its numbers too."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Open the log: a new one, or on resuming the old one up to the checkpoint's step.

        Raises:
            ValueError: If the Trainer would do to gradients what can't be done to released ones.
        """
        molf = _molf(optimizer)
        if molf.optimizer_in_backward:
            check_release_settings(vars(args))
        clip_once(args, molf.max_grad_norm)
        self._stop_watching()  # of a training that failed
        self._before_saving = molf.register_state_dict_pre_hook(lambda _: self._bring_to_disk())
        self._last, self._shares = molf.routing, []
        self._writes = state.is_world_process_zero
        if not self._writes:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = _lines_until(self.path, state.global_step) if state.global_step else []
        missing = state.global_step - molf.skipped_steps - len(kept)
        if missing > 0:
            logger.warning("%s lacks %d of the %d steps before the checkpoint", self.path, missing, state.global_step)
        beside = self.path.with_name(self.path.name + ".tmp")
        beside.write_text("".join(kept), encoding="utf-8")
        beside.replace(self.path)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Take the decision of the step just taken down; a step that was left out has none."""
        molf = _molf(optimizer)
        group = next(group for group in molf.param_groups if "module" in group)
        # The scheduler has not moved yet: this is the rate of the step just taken. A tensor it may change in place.
        lr = group["lr"].clone() if isinstance(group["lr"], Tensor) else group["lr"]
        self._rates = {"lr/fft": lr, "lr/lora": lr * group["lora_lr_ratio"]}
        routing = molf.routing
        if routing is None or routing is self._last:
            return
        self._last = routing
        self._pending.append((state.global_step + 1, Fetch(routing)))
        self._settle(wait=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write what is left."""
        self._settle(wait=True)
        self._stop_watching()

    def _stop_watching(self) -> None:
        self._pending.clear()
        if self._before_saving is not None:
            self._before_saving.remove()
            self._before_saving = None

    def _settle(self, wait: bool) -> None:
        """Write the decisions that are there, or all of them, waiting."""
        while self._pending and (wait or self._pending[0][1].done or len(self._pending) > _MOST_PENDING):
            step, fetch = self._pending.popleft()
            self._write(step, fetch.get())

    def _bring_to_disk(self) -> None:
        """Let the log survive the machine too, as the checkpoint will that is written next."""
        self._settle(wait=True)
        if self._writes:
            sync(self.path)

    def _write(self, step: int, routing: Routing) -> None:
        if not routing.taken:  # a fused step that was left out says so only when asked
            return
        if "fft" in routing.experts:
            self._shares.append(routing.share("fft"))
        if self._writes:
            # Opened for each line: one that is written stays, and whatever ends the training leaves no file open.
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(selection_record(step, routing)) + "\n")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Add MoLF's numbers to a training log."""
        if logs is None or "loss" not in logs:
            return
        molf = _molf(optimizer)
        self._settle(wait=True)  # the Trainer has waited for its loss
        ours: dict[str, float] = {name: float(lr) for name, lr in self._rates.items()}
        ours["molf/skipped_steps"] = molf.skipped_steps
        if self._shares:
            ours["molf/fft_share"] = sum(self._shares) / len(self._shares)
            self._shares = []
        own_norm = molf.max_grad_norm is not None or molf.optimizer_in_backward or "grad_norm" not in logs
        if molf.grad_norm is not None and own_norm:
            ours["grad_norm"] = float(molf.grad_norm)
        logs.update(ours)
        if state.log_history:
            state.log_history[-1].update(ours)


def _molf(optimizer: Any) -> MoLF:
    inner = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inner, MoLF):
        raise TypeError(
            f"RoutingLog logs what MoLF decides, but this trainer's optimizer is {type(inner).__name__}: pass "
            "optimizer_cls_and_kwargs=molf.trainer_optimizer(...) too"
        )
    return inner


def _lines_until(path: Path, step: int) -> list[str]:
    """Return the whole lines of a log up to a step; a torn last line (the run was killed) is left out."""
    if not path.exists():
        return []
    lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    return [line for number, line in enumerate(lines, start=1) if _step_of(line, f"{path}, line {number}") <= step]


def _step_of(line: str, where: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{where}: no line of a routing log ({error!r}); mend or remove the line to go on from a checkpoint"
        ) from error
