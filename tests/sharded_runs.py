"""Whole runs on several gloo ranks whose model is sharded by accelerate, for ``test_sharding.py``.

accelerate shards on accelerators only and quietly takes DDP on a CPU. Here it is told that these ranks are accelerators;
everything else (the Trainer, accelerate's FSDP2, distributed checkpoints, this project) is as it is there.
"""

import errno
import gc
import io
import json
import logging
import os
import shutil
import signal
import traceback
import warnings
from contextlib import contextmanager, nullcontext, redirect_stderr
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.checkpoint import FileSystemWriter

from molf.cli import main
from molf.study.faults.preemption import Preempted
from molf.study.run.job import make_trainer
from small_runs import NoStep, SignalAt, carry_out

STEPS = 4


@contextmanager
def shard_on_cpus():
    """Let accelerate shard over processes without accelerators."""
    original = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    with mock.patch.object(AcceleratorState, "__init__", init):
        yield


def carry_out_all(rank, size, folder, plan):
    """Be one of ``size`` ranks and carry out a plan; what went wrong is left in ``{size}ranks-{rank}.json``, by case.

    Args:
        rank: Of this process.
        size: The number of them.
        folder: Where all of it is.
        plan: For each case the names of functions of this module, and what they take after the rank.
    """
    gc.freeze()  # what is imported need not be looked through by every collection of garbage
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {name: str(value) for name, value in where.items()}
    failures = {}
    for number, (name, function, *given) in enumerate(plan):
        try:
            with mock.patch.dict(os.environ):  # where the Trainer leaves settings for accelerate
                globals()[function](rank, f"{folder}/store-{size}-{number}", *given)
        except BaseException:
            failures[name] = traceback.format_exc()
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()  # so that the others do not wait
    Path(folder, f"{size}ranks-{rank}.json").write_text(json.dumps(failures))


def join(rank, store):
    """Join a group of all ranks."""
    AcceleratorState._reset_state(reset_partial_state=True)  # which is one for all of a process, plugin included
    size = int(os.environ["WORLD_SIZE"])
    store = torch.distributed.FileStore(store, size)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))


def refused(rank, store, arguments, words):
    """The command refuses to shard on CPUs."""
    join(rank, store)
    said = io.StringIO()
    with redirect_stderr(said):
        status = main(arguments)
    torch.distributed.destroy_process_group()
    assert status == 1 and words in said.getvalue(), (status, said.getvalue())


def whole(rank, store, settings):
    """A run from its start to its end, after which the ranks have no group any more."""
    with shard_on_cpus():
        join(rank, store)
        carry_out(settings)
    assert not torch.distributed.is_initialized()


def half(rank, store, settings, finished, damage=False):
    """Go on from what a run left that was killed after half of its steps, or whose last checkpoint was damaged."""
    if rank == 0:
        shutil.copytree(finished, settings["output_dir"])
        last = Path(settings["output_dir"], f"checkpoint-{STEPS}")
        Path(settings["output_dir"], "result.json").unlink()
        Path(settings["output_dir"], "model.safetensors").unlink()
        if damage:
            shard = last / "pytorch_model_fsdp_0" / "__1_0.distcp"
            shard.write_bytes(shard.read_bytes()[:-7])
        else:
            shutil.rmtree(last)
    whole(rank, store, settings | {"resume_from_checkpoint": True})


@contextmanager
def called_back(callback):
    """Give the trainers of runs a callback."""

    def make(*given, **more):
        trainer = make_trainer(*given, **more)
        trainer.add_callback(callback)
        return trainer

    with mock.patch("molf.study.run.train.make_trainer", make):
        yield


def disk_is_full(self, plan, planner):
    raise OSError(errno.ENOSPC, "No space left on device")


def faults(rank, store, settings):
    """A full disk on the last rank, SIGTERM to it in a step and to the first in its evaluation; the run goes on each time."""
    settings, folder = settings | {"resume_from_checkpoint": True}, Path(settings["output_dir"])
    last = rank == int(os.environ["WORLD_SIZE"]) - 1
    with mock.patch.object(FileSystemWriter, "write_data", disk_is_full) if last else nullcontext():
        error = failure_of(OSError, rank, f"{store}-full", settings)
    assert f"the checkpoint {folder / 'checkpoint-2'} cannot be written: [Errno 28] No space left on device" in str(
        error
    )
    torch.distributed.barrier()
    assert not [path for path in folder.iterdir() if "checkpoint" in path.name or path.name == ".unfinished"]
    torch.distributed.destroy_process_group()
    with called_back(SignalAt(2)) if last else nullcontext():
        stopped = failure_of(Preempted, rank, f"{store}-stopped", settings)
    assert f"after step 3 of {STEPS}" in stopped.message and (folder / "checkpoint-3").is_dir()
    if rank == 0:
        with mock.patch("molf.study.run.train.evaluate", lambda *given, **more: os.kill(os.getpid(), signal.SIGTERM)):
            failure_of(Preempted, rank, f"{store}-evaluating", settings)
    else:
        whole(rank, f"{store}-evaluating", settings)
    with called_back(NoStep()):
        whole(rank, f"{store}-evaluated", settings)


def failure_of(kind, rank, store, settings):
    try:
        whole(rank, store, settings)
    except kind as error:
        return error.with_traceback(None)
    raise AssertionError(f"no {kind.__name__}")
