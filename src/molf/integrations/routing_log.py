"""A Trainer callback that logs the router's decisions."""

import logging
import os
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerState

from molf.errors import MolfError
from molf.files import atomic_write
from molf.integrations.checkpoint_folder import sync
from molf.integrations.routing_lines import LOG_FILES, CompactLines, Format, PublishedLines, find_log, lines_until
from molf.integrations.trainer import check_release_settings, clip_once
from molf.optimizer import MoLF
from molf.routing import Routing

logger = logging.getLogger(__name__)

_MAX_PENDING = 16  # decisions being copied to the host; with more, wait for the oldest


class Fetch:
    """An asynchronous copy of a decision to the host; from a GPU into pinned memory.

    Args:
        routing: The decision; its tensors may be overwritten after this call.
    """

    def __init__(self, routing: Routing):
        device = routing.scores.device
        taken = _to_host(routing.taken) if isinstance(routing.taken, Tensor) else routing.taken
        self._routing = replace(routing, scores=_to_host(routing.scores), chosen=_to_host(routing.chosen), taken=taken)
        self._copied = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

    @property
    def done(self) -> bool:
        """Whether the copy is complete."""
        return self._copied is None or bool(self._copied.query())

    def get(self) -> Routing:
        """Return the copy, waiting if necessary."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._routing


def _to_host(x: Tensor) -> Tensor:
    # Only CUDA has an event to wait for the copy with.
    return x.to("cpu", non_blocking=x.is_cuda)


class RoutingLog(TrainerCallback):  # type: ignore[misc]
    """Write every step's decision to ``routing.jsonl`` and add MoLF's numbers to the Trainer's logs.

    The file has a header with all names, then a line of arrays per step (``molf.integrations.routing_lines.CompactLines``); it
    can be read while it is written. The published format is ``{"step": 3, "selections": {module: {"winners": [...], "scores":
    {expert: score}}}}`` per line, in ``molf_expert_selection.jsonl``. The logs get ``lr/fft``, ``lr/lora``, ``molf/fft_share``
    (share of the wins since the last log), ``molf/skipped_steps`` and ``grad_norm``. When a run resumes, lines of steps after the
    checkpoint are dropped, so there are neither gaps nor duplicates.

    No step waits for an accelerator: a line is written when its decision has reached the host, at the latest before the Trainer
    logs, saves the optimizer or ends. If MoLF clips gradients, the Trainer's clipping is turned off.

    Args:
        output_dir: Folder of the log file, created when training starts. Only the main process writes.
        every: Write every ``every``-th step only. The numbers in the Trainer's logs are those of all steps.
        format: ``compact``, or ``published`` for the published file; a log that is resumed keeps its own.
    """

    def __init__(self, output_dir: str | os.PathLike[str], every: int = 1, format: Format = "compact"):
        if every < 1:
            raise MolfError(f"every={every} must be at least 1")
        if format not in LOG_FILES:
            raise MolfError(f"format={format!r} is none of {', '.join(LOG_FILES)}")
        self.path = Path(output_dir) / LOG_FILES[format]
        self.every = every
        self._lines: CompactLines | PublishedLines = CompactLines()
        self._writes = False
        self._shares: list[float] = []
        self._last: Routing | None = None
        self._rates: dict[str, float | Tensor] = {}
        self._pending: deque[tuple[int, Fetch]] = deque()
        self._save_hook: Any = None

    def attach(self, trainer: Trainer) -> "RoutingLog":
        """Add this callback to a trainer, before the reporting ones, so that trackers receive its numbers too."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, *, optimizer: Any, **kwargs: Any) -> None:
        """Start a new log, or on resuming continue the old one from the checkpoint's step, in the format that it has.

        Raises:
            MolfError: The Trainer's settings do not work with ``optimizer_in_backward``, or a line of the old log is damaged.
        """
        molf = _unwrap(optimizer)
        if molf.optimizer_in_backward:
            check_release_settings(vars(args))
        clip_once(args, molf.max_grad_norm)
        self._reset()  # an earlier training may have failed
        self._save_hook = molf.register_state_dict_pre_hook(lambda _: self._flush_to_disk())
        self._last, self._shares = molf.routing, []
        self._writes = state.is_world_process_zero
        if not self._writes:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if state.global_step and not self.path.exists():  # two files would each have a part of the steps
            self.path = find_log(self.path.parent) or self.path
        self._lines = PublishedLines() if self.path.name == LOG_FILES["published"] else CompactLines()
        kept = self._keep_until(state.global_step)
        expected = state.global_step // self.every
        if (missing := expected - molf.skipped_steps - kept) > 0:
            logger.warning("%s lacks %d of the %d steps before the checkpoint", self.path, missing, expected)

    def _keep_until(self, step: int) -> int:
        """Drop what the log has after a step, and return how many steps it keeps."""
        kept = 0
        with atomic_write(self.path) as partial, partial.open("wb") as file:
            for line, is_header in lines_until(self.path, step) if step and self.path.exists() else ():
                file.write(line)
                if is_header:
                    self._lines.resume(line)
                else:
                    kept += 1
        return kept

    def on_optimizer_step(self, args: Any, state: TrainerState, control: Any, *, optimizer: Any, **kwargs: Any) -> None:
        """Start to copy the decision of this step; a skipped step has none."""
        molf = _unwrap(optimizer)
        group = next(group for group in molf.param_groups if "module" in group)
        # The scheduler steps after this callback, so this is the rate of this step. It changes tensors in place.
        lr = group["lr"].clone() if isinstance(group["lr"], Tensor) else group["lr"]
        self._rates = {"lr/fft": lr, "lr/lora": lr * group["lora_lr_ratio"]}
        routing = molf.routing
        if routing is None or routing is self._last:
            return
        self._last = routing
        self._pending.append((state.global_step + 1, Fetch(routing)))
        self._flush(ready=True)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Write the remaining lines."""
        self._flush()
        self._reset()

    def on_log(
        self, args: Any, state: TrainerState, control: Any, *, logs: dict[str, Any], optimizer: Any, **kwargs: Any
    ) -> None:
        """Add MoLF's numbers to a training log."""
        if "loss" not in logs:
            return
        molf = _unwrap(optimizer)
        self._flush()  # the Trainer has waited for the loss anyway
        ours: dict[str, float] = {name: float(lr) for name, lr in self._rates.items()}
        ours["molf/skipped_steps"] = molf.skipped_steps
        if self._shares:
            ours["molf/fft_share"] = sum(self._shares) / len(self._shares)
            self._shares = []
        clips = molf.max_grad_norm is not None or molf.optimizer_in_backward or "grad_norm" not in logs
        if molf.grad_norm is not None and clips:
            ours["grad_norm"] = float(molf.grad_norm)
        logs.update(ours)
        if state.log_history:
            state.log_history[-1].update(ours)

    def _reset(self) -> None:
        self._pending.clear()
        if self._save_hook is not None:
            self._save_hook.remove()
            self._save_hook = None

    def _flush(self, ready: bool = False) -> None:
        """Wait for all decisions and write them; or only the ready ones, and the oldest if too many are pending."""
        while self._pending and (not ready or self._pending[0][1].done or len(self._pending) > _MAX_PENDING):
            self._write(*self._pending.popleft())

    def _flush_to_disk(self) -> None:
        """Make the log as durable as the checkpoint that is written next."""
        self._flush()
        if self._writes:
            sync(self.path)

    def _write(self, step: int, fetch: Fetch) -> None:
        routing = fetch.get()
        if not routing.taken:  # only the device knows that a fused step was skipped
            return
        if "fft" in routing.experts:
            self._shares.append(routing.share("fft"))
        if self._writes and step % self.every == 0:
            # Opened for each step, so that no file stays open however training ends.
            with self.path.open("a", encoding="utf-8") as file:
                file.write(self._lines.encode(step, routing))


def _unwrap(optimizer: Any) -> MoLF:
    inner = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inner, MoLF):
        raise TypeError(
            f"RoutingLog logs the decisions of MoLF, but this trainer's optimizer is {type(inner).__name__}: call "
            "molf.use_in(trainer, ...) before train()"
        )
    return inner
