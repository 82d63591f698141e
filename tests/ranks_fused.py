"""What several ranks check together of the Triton kernels, in the interpreter; called by ``ranks.run``."""

import contextlib
import copy
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate

from dispatch_modes import NoScalarReads, NoSyncs
from fused import DEVICE  # noqa: F401 - with a faster interpreter
from molf import MoLF
from molf.numerics.distributed import find_ranks, full, local
from sharding import AdaptedLinear, error_of, everything, exact, give, hsdp, in_part, my_rows, train

# With a small eps the first step of an element whose gradient is all but 0 would be a matter of rounding.
OPTIONS = {"ranks": (2,), "lr": 1e-2, "lora_lr": 2e-3, "eps": 1e-2}


def small(dtype=torch.float32):
    """Rows that do not divide among ranks; of four, one has no row of the last."""
    torch.manual_seed(3)
    layers = nn.Embedding(11, 7), nn.Linear(7, 13), nn.LayerNorm(13), nn.Tanh(), nn.Linear(13, 3, bias=False)
    return nn.Sequential(*layers).to(dtype)


def adapted(dtype=torch.float32):
    """The same with adapters beside a base that trains."""
    model = small(dtype)
    for i in (1, 4):
        model[i] = AdaptedLinear(model[i], (2,))
    return model


def large(dtype=torch.float32):
    """Matrices whose moments are kept in 8 bits, a routed and an ordinary one; of four ranks one has no row of anything."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Embedding(3, 1400), nn.Linear(1400, 3)).to(dtype)


def differences(one, other):
    """How far apart floats are, in shares of 1 + their magnitude, and the smallest share of codes that are the same."""
    assert one.keys() == other.keys()
    codes = [name for name, x in one.items() if x.dtype == torch.uint8]
    floats = [(x, other[name]) for name, x in one.items() if name not in codes]
    return {
        "apart": max(float(((x - y).abs() / (1 + y.abs())).max()) for x, y in floats),
        "codes alike": min([float((one[name] == other[name]).double().mean()) for name in codes], default=1.0),
    }


@contextlib.contextmanager
def no_syncs():
    """Make every sync and every copy of a table an error."""
    with NoSyncs(), NoScalarReads(), mock.patch("torch.tensor", side_effect=AssertionError("a table is copied")):
        yield


class Three:
    """A model in one process and two sharded copies, the second with the fused step; all start equal."""

    def __init__(self, alone, build, wrap=fully_shard, dtype=torch.float32, **options):
        self.models = [build(dtype)]
        self.models += [wrap(copy.deepcopy(self.models[0])) for _ in range(2)]
        self.optimizers = []
        for model, fused, group in zip(self.models, (False, False, True), (alone, None, None), strict=True):
            torch.manual_seed(5)
            self.optimizers.append(MoLF(model, fused=fused, process_group=group, **{**OPTIONS, **options}))
        self.winners = [[], [], []]

    def given(self, steps, disturb=None):
        """Take steps of given gradients, always in the same tensors; from the second on nothing may sync."""
        for t in range(steps):
            give(t, *self.models)
            for model, optimizer, winners in zip(self.models, self.optimizers, self.winners, strict=True):
                if disturb is not None:
                    disturb(t, model, optimizer)
                with no_syncs() if t and optimizer.fused else contextlib.nullcontext():
                    optimizer.step()
                if disturb is None or t == steps - 1:  # of a skipped step only the fused one has a record
                    winners.append(optimizer.routing.winners())
        return self.report()

    def report(self):
        """How far apart the three are."""
        alone, sharded, fused = (
            exact(m, o) or everything(m, o) for m, o in zip(self.models, self.optimizers, strict=True)
        )
        norms = [float(optimizer.grad_norm) for optimizer in self.optimizers]
        scores = [optimizer.routing.scores for optimizer in self.optimizers]
        return {
            "one process": differences(fused, alone),
            "plain shards": differences(fused, sharded),
            "norms apart": max(abs(norm / norms[0] - 1) for norm in norms),
            "scores apart": max(float((own / scores[0] - 1).abs().max()) for own in scores),
            "same winners": self.winners[0] == self.winners[1] == self.winners[2],
            "kinds of winners": len({name for step in self.winners[0] for names in step.values() for name in names}),
            "skipped": [optimizer.skipped_steps for optimizer in self.optimizers],
        }


def scaled(t, model, optimizer):
    """Scale gradients as a GradScaler does; the second step overflows, the third is not finite, each on one rank only."""
    first = find_ranks(optimizer.param_groups, None).shard_index == 0  # of its replica: gradients are equal on all
    for p in model.parameters():
        local(p.grad).mul_(128)
    if t == 2 and first:
        local(model[1].weight.grad)[0, 0] = torch.nan
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(128.0), torch.tensor(float(t == 1 and first))


class Fused:
    """A part of ``ranks.Checks``."""

    def fused_backward(self):
        """Gradients as FSDP leaves them, new ones at each step."""

        def wrap(model):
            fully_shard(model[1])
            return fully_shard(model)

        three, everyone = Three(self._alone, small, wrap, ranks=(2, 3)), list(range(8))
        for i, rows in enumerate((everyone, my_rows(), my_rows())):
            three.winners[i] = train(three.models[i], three.optimizers[i], range(3), rows, dtype=torch.float32)
        return three.report()

    def fused_scaled(self):
        """Two winners, clipped, by PFN, with a loss scale; on four ranks replicated shards."""
        how = {"top_k": 2, "max_grad_norm": 0.5, "score": "pfn"}
        return Three(self._alone, small, hsdp if self._size == 4 else fully_shard, **how).given(4, scaled)

    def fused_in_part(self):
        return Three(self._alone, small, in_part, max_grad_norm=0.5, score="coherence").given(2)

    def fused_adapters(self):
        return Three(self._alone, adapted, ranks=None).given(2)

    def fused_low_parts(self):
        return Three(self._alone, small, dtype=torch.bfloat16).given(2)

    def fused_8_bits(self):
        return Three(self._alone, large, optim_bits=8, top_k=2).given(2)

    def fused_other_rows(self):
        """A gradient of other rows than the weight's is refused: kernels would read past its end."""
        model = fully_shard(small())
        optimizer = MoLF(model, **OPTIONS, fused=True)
        give(0, model)
        weight = model[1].weight
        weight.grad = weight.grad.redistribute(placements=[Replicate()])
        return error_of(optimizer.step)

    def fused_stochastic_rounding(self):
        """Replicated weights are rounded alike on all ranks; every tensor and every shard has random numbers of its own."""
        model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)).to(torch.bfloat16)
        for p in model.parameters():
            nn.init.ones_(p)
        fully_shard(model, ignored_params={model[0].weight})
        rates = {"lr": 1e-3, "weight_decay": 0.0, "lora_lr": 1e-9}
        optimizer = MoLF(model, ranks=(2,), **rates, bf16_update="stochastic", fused=True)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        whole, shards = model[0].weight.detach(), full(model[1].weight.detach())
        first, parts = whole.clone(), shards.chunk(self._size)
        dist.broadcast(first, src=0)
        return {
            "whole apart": float((first - whole).abs().max()),
            "values": [len(x.unique()) for x in (whole, *parts)],
            "shards alike": torch.equal(whole, shards) or any(torch.equal(parts[0], part) for part in parts[1:]),
        }

    def fused_checkpoint(self):
        """Two ranks save after a step by either kernels; any number of ranks continues with the others and ends equal."""
        ends = {}
        for writer in (True, False):
            folder = self._folder / f"fused-{writer}"
            if self._size == 2:
                model, optimizer = self._large(writer)
                self._step(0, model, optimizer)
                weights, states = get_state_dict(model, optimizer)
                dcp.save({"model": weights, "optimizer": states}, checkpoint_id=folder)
                self._step(1, model, optimizer)
                end = everything(model, optimizer)
                if dist.get_rank() == 0:
                    torch.save(end, folder / "end.pt")
                dist.barrier()
            model, optimizer = self._large(not writer)
            weights, states = get_state_dict(model, optimizer)
            state = {"model": weights, "optimizer": states}
            dcp.load(state, checkpoint_id=folder)
            set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
            self._step(1, model, optimizer)
            ends[f"written by {'fused' if writer else 'plain'}"] = differences(
                everything(model, optimizer), torch.load(folder / "end.pt")
            )
        return ends

    def _large(self, fused):
        model = fully_shard(large())
        torch.manual_seed(5)
        return model, MoLF(model, **OPTIONS, optim_bits=8, fused=fused)

    def _step(self, t, model, optimizer):
        give(t, model)
        optimizer.step()
