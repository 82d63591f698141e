"""What several ranks check together of 8-bit moments; called by ``ranks.run``."""

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from molf import MoLF
from molf.numerics.distributed import local
from sharding import MERGED, error_of, everything, fsdp, furthest, given, my_rows, train
from small import wide

EIGHT_BITS = {**MERGED, "optim_bits": 8, "max_grad_norm": 1.0}


def columns(p):
    """Shard embeddings by columns."""
    return Shard(1) if p.shape == (64, 64) else None


class EightBits:
    """A part of ``ranks.Checks``."""

    def eight_bits(self):
        """Given the same gradients, sharded 8-bit states end where whole ones end; of four ranks one has no row of the last."""
        plain = wide()
        plain[4], plain[5] = nn.Linear(41, 1400, bias=False), nn.Linear(1400, 3, bias=False)
        model = fsdp(copy.deepcopy(plain))
        torch.manual_seed(5)
        optimizer, alone = MoLF(model, **EIGHT_BITS), MoLF(plain, process_group=self._alone, **EIGHT_BITS)
        same = all(given(t, model, optimizer, plain, alone) for t in range(3))
        one, other = everything(model, optimizer), everything(plain, alone)
        codes = [name for name, value in one.items() if value.dtype == torch.uint8]
        maxima = [x for own in optimizer.state.values() for key, x in own.items() if key.endswith("absmax")]
        return {
            "same winners": same,
            "codes alike": min(float((one[name] == other[name]).double().mean()) for name in codes),
            "apart": furthest(*({n: x for n, x in side.items() if n not in codes} for side in (one, other))),
            "quantized": sum(key.endswith("exp_avg") for key in codes),
            "own maxima": sum(local(x).numel() for x in maxima),
            "all maxima": sum(x.numel() for x in maxima),
        }

    def eight_bit_checkpoint(self):
        """Two ranks save codes and maxima; other numbers of ranks load the same and go on."""
        model = fsdp(wide())
        torch.manual_seed(5)
        optimizer = MoLF(model, **EIGHT_BITS)
        if self._size == 2:
            train(model, optimizer, range(3), my_rows(), dtype=torch.float32)
            optimizer.zero_grad()
        weights, states = get_state_dict(model, optimizer)
        state, folder = {"model": weights, "optimizer": states}, self._folder / "eight-bits"
        if self._size == 2:
            dcp.save(state, checkpoint_id=folder)
            saved = everything(model, optimizer)
            if dist.get_rank() == 0:
                torch.save(saved, self._folder / "eight-bits.pt")
            dist.barrier()
            model = fsdp(wide(seed=9))
            optimizer = MoLF(model, **EIGHT_BITS)
            weights, states = get_state_dict(model, optimizer)
            state = {"model": weights, "optimizer": states}
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        loaded, saved = everything(model, optimizer), torch.load(self._folder / "eight-bits.pt")
        differing = sorted(name for name, x in saved.items() if not torch.equal(loaded[name], x))
        train(model, optimizer, range(3, 5), my_rows(), dtype=torch.float32)
        end = everything(model, optimizer)
        return {
            "differing": differing,
            "dtypes": sorted({str(x.dtype) for x in loaded.values()}),
            "finite": all(bool(x.isfinite().all()) for x in end.values()),
        }

    def eight_bits_in_columns(self):
        """Column shards are refused: a row has its maxima in one place."""
        model = fully_shard(nn.Sequential(nn.Embedding(64, 64), nn.Linear(64, 2)), shard_placement_fn=columns)
        model(torch.ones(1, dtype=torch.long)).sum().backward()
        return error_of(MoLF(model, **EIGHT_BITS).step)
