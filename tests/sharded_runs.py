"""Whole runs on several gloo ranks whose model is sharded by accelerate, for ``test_sharding.py``.

accelerate shards on accelerators only and quietly takes DDP on a CPU. Here it is told that these ranks are accelerators;
everything else (the Trainer, accelerate's FSDP2, distributed checkpoints, this project) is as it is there.
"""

import logging
import os
import shutil
import warnings
from pathlib import Path

import torch
from accelerate import state as accelerate_state
from accelerate.utils import DistributedType

from molf.study.config import RunConfig
from molf.study.train import run

STEPS = 4


def shard_on_cpus():
    """Let accelerate shard over processes without accelerators."""
    original = accelerate_state.AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            accelerate_state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    accelerate_state.AcceleratorState.__init__ = init


def carry_out_all(rank, size, port, plan):
    """Be one of ``size`` ranks and carry out a plan: runs, and half of each once more.

    Args:
        rank: Of this process.
        size: The number of them.
        port: Where the first one listens.
        plan: Settings of runs by name; with ``again``, the run's first half is copied to that folder and gone on from.
    """
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {name: str(value) for name, value in where.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo")
    shard_on_cpus()
    for settings, again in plan:
        if not Path(settings["output_dir"]).exists():
            one_run(settings)
        if again is not None:
            if rank == 0:
                half_of(settings["output_dir"], again)
            torch.distributed.barrier()
            one_run({**settings, "output_dir": str(again), "resume_from_checkpoint": True})
    torch.distributed.destroy_process_group()


def one_run(settings):
    accelerate_state.AcceleratorState._reset_state()  # which is one for all of a process, plugin included
    run(RunConfig.from_dict(settings))
    torch.distributed.barrier()


def half_of(finished, folder):
    """Leave in a folder what a run left that was killed after half of its steps."""
    shutil.copytree(finished, folder)
    for name in ("result.json", "model.safetensors", f"checkpoint-{STEPS}"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
