"""What several gloo ranks check together, for ``test_distributed.py``: every check returns numbers, which the test judges.

One start of the processes serves all checks. Nothing here needs more than torch.
"""

import copy
import importlib.util
import json
import os
import traceback
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from molf import MoLF
from molf.numerics.distributed import full, local
from ranks_8_bits import EightBits
from ranks_fused import Fused
from sharding import (
    MERGED,
    RATES,
    adapted,
    backward,
    ddp,
    error_of,
    everything,
    exact,
    fsdp,
    fsdp_stacked,
    furthest,
    given,
    hsdp,
    in_part,
    my_rows,
    train,
)
from small import Prefer, mlp
from stacks import mixture

COMPARED = {  # with one process
    "ddp_merged": (mlp, ddp, MERGED),
    "ddp_accumulating": (mlp, ddp, {**MERGED, "max_grad_norm": 0.1}, 2),
    "ddp_branched": (lambda: adapted(freeze=True), ddp, {**RATES, "lora_lr": "matched"}),
    "fsdp_merged": (mlp, fsdp, MERGED),
    "fsdp_two_winners_clipped": (mlp, fsdp, {**MERGED, "top_k": 2, "max_grad_norm": 0.1}),
    "fsdp_pfn_accumulating": (mlp, fsdp, {**MERGED, "score": "pfn"}, 2),
    "fsdp_made_before_sharding": (mlp, fsdp, MERGED, 1, True),
    "fsdp_branched": (lambda: adapted(freeze=True), fsdp, {**RATES, "lora_lr": "matched", "max_grad_norm": 0.1}),
    "fsdp_branched_beside_the_base": (lambda: adapted(freeze=False), fsdp, {**RATES, "top_k": 2}),
    "ddp_stacked": (mixture, ddp, {**MERGED, "max_grad_norm": 0.1}),
    "fsdp_stacked": (mixture, fsdp_stacked, MERGED),
    "fsdp_stacked_clipped": (mixture, fsdp_stacked, {**MERGED, "top_k": 2, "max_grad_norm": 0.1}, 2, True),
    "hsdp_merged": (mlp, hsdp, {**MERGED, "max_grad_norm": 0.1}),
}
ON_FOUR_RANKS = {"hsdp_merged"}  # replicated shards
ON_TWO_RANKS = {
    *("fused_backward", "fused_low_parts", "fused_in_part", "fused_adapters"),  # slow in the interpreter
    # Four ranks add shards without rows, which the other checks have.
    *(
        name
        for name in COMPARED
        if name.startswith("ddp") or name in ("fsdp_made_before_sharding", "fsdp_pfn_accumulating")
    ),
}


class Checks(EightBits, Fused):
    """The checks of one rank. Names without an underscore are run in order."""

    def __init__(self, folder):
        self._folder = Path(folder)
        self._size = dist.get_world_size()
        groups = [dist.new_group([rank]) for rank in range(self._size)]
        self._alone = groups[dist.get_rank()]

    def _compare(self, build, wrap, options, micro=1, before=False):
        """Train alone on whole batches and together on parts of them; return how far apart they end."""
        plain, shared = build(), build()
        shared.load_state_dict(plain.state_dict())
        torch.manual_seed(5)
        alone = MoLF(plain, process_group=self._alone, **options)
        expected = train(plain, alone, range(5), list(range(8)), micro)
        torch.manual_seed(5)
        optimizer = MoLF(shared, **options) if before else None
        shared = wrap(shared)
        optimizer = optimizer or MoLF(shared, **options)
        winners = train(shared, optimizer, range(5), my_rows(), micro)
        return {
            "apart": furthest(everything(shared, optimizer), everything(plain, alone)),
            "same winners": winners == expected,
            "kinds of winners": len({name for step in winners for names in step.values() for name in names}),
            "norms apart": abs(float(optimizer.grad_norm) - float(alone.grad_norm)),
        }

    def different_seeds(self):
        """Ranks seeded differently start from the first one's experts."""
        torch.manual_seed(dist.get_rank())
        model = ddp(mlp())
        optimizer = MoLF(model, **MERGED)
        train(model, optimizer, range(2), my_rows())
        A = optimizer.experts["1"]["lora_r2"].A
        first = A.clone()
        dist.broadcast(first, src=0)
        return {"apart": float((A - first).abs().max())}

    def decision_is_the_first_ones(self):
        """A score that differs between ranks does not make them decide differently."""
        model = ddp(mlp())
        optimizer = MoLF(model, score=Prefer(min(dist.get_rank(), 1)), **MERGED)
        train(model, optimizer, range(1), my_rows())
        return {"winners": sorted({name for names in optimizer.routing.winners().values() for name in names})}

    def one_rank_is_not_finite(self):
        """If a gradient is not finite on one rank, all ranks skip the step."""
        model = fsdp(mlp())
        optimizer = MoLF(model, **MERGED)
        train(model, optimizer, range(2), my_rows())
        before = copy.deepcopy(everything(model, optimizer))
        backward(model, 2, my_rows(), torch.float64, 1)
        if dist.get_rank() == self._size - 1:
            model[1].weight.grad._local_tensor[0, 0] = torch.nan
        optimizer.step()
        skipped = optimizer.skipped_steps
        return {"skipped": skipped, "apart": furthest(everything(model, optimizer), before)}

    def overflow_on_one_rank(self):
        model = fsdp(mlp())
        optimizer = MoLF(model, **MERGED)
        backward(model, 0, my_rows(), torch.float64, 1)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(float(dist.get_rank() == 0))
        optimizer.step()
        return {"skipped": optimizer.skipped_steps}

    def views_are_whole(self):
        """Experts are read and assigned whole, and the effective weight follows."""
        model = fsdp(mlp())
        optimizer = MoLF(model, **MERGED)
        train(model, optimizer, range(3), my_rows())
        experts = optimizer.experts["1"]
        weight, pair, effective = experts["fft"].weight, experts["lora_r3"], full(model[1].weight.detach()).clone()
        A, B = pair.A.clone(), pair.B.clone()
        pair.assign(A=A + 1, B=B - 1)
        experts["fft"].assign(weight=weight + 2, bias=torch.ones(13))
        moved = full(model[1].weight.detach()) - effective
        return {
            "shapes": [list(weight.shape), list(A.shape), list(B.shape), list(experts["fft"].bias.shape)],
            "apart": max(
                float((moved - 2 - pair.scale * ((B - 1) @ (A + 1) - B @ A)).abs().max()),
                float((experts["fft"].weight - weight - 2).abs().max()),
                float((pair.B - B + 1).abs().max()),
                float((experts["fft"].bias - 1).abs().max()),
            ),
        }

    def bf16(self):
        """Given the same gradients, bf16 shards with low parts end where whole bf16 weights with low parts end."""
        plain, options = mlp(torch.bfloat16), {**MERGED, "max_grad_norm": 1.0}
        model = fsdp(copy.deepcopy(plain))
        torch.manual_seed(5)
        optimizer, alone = MoLF(model, **options), MoLF(plain, process_group=self._alone, **options)
        same = all(given(t, model, optimizer, plain, alone) for t in range(5))
        return {"apart": furthest(exact(model, optimizer), exact(plain, alone)), "same winners": same}

    def in_part(self):
        """With a shard of one layer only, given gradients move all layers as in one process."""
        ends = {}
        for build, options in ((mlp, {**MERGED, "max_grad_norm": 0.1}), (partial(adapted, freeze=False), RATES)):
            plain = build()
            model = in_part(copy.deepcopy(plain))
            torch.manual_seed(5)
            optimizer = MoLF(model, **options)
            torch.manual_seed(5)
            alone = MoLF(plain, process_group=self._alone, **options)
            same = all([given(t, model, optimizer, plain, alone) for t in range(5)])
            ends[build is mlp] = furthest(everything(model, optimizer), everything(plain, alone)) if same else None
        return {"merged": ends[True], "branched": ends[False]}

    def stochastic_rounding(self):
        """Shards round with random numbers of their own, replicas alike; a repeated step is the same."""
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(8, 16, bias=False, dtype=torch.bfloat16))
        nn.init.ones_(model[0].weight)
        model = fully_shard(model)
        optimizer = MoLF(model, ranks=(2,), lr=1e-3, weight_decay=0.0, bf16_update="stochastic")
        state = copy.deepcopy(optimizer.state_dict())
        runs = []
        for _ in range(2):
            optimizer.load_state_dict(copy.deepcopy(state))
            nn.init.ones_(model[0].weight)
            weight = model[0].weight
            weight.grad = torch.full_like(weight, 1.0)
            optimizer.step()
            runs.append(full(weight.detach()).float())
        parts = runs[0].chunk(self._size)
        return {
            "again apart": float((runs[0] - runs[1]).abs().max()),
            "values": len(runs[0].unique()),
            "shards alike": any(torch.equal(parts[0], part) for part in parts[1:]),
        }

    def mixed_precision(self):
        """Float32 shards computing in bf16: weights and states stay float32."""
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        model = fsdp(mlp(torch.float32), mp_policy=policy)
        optimizer = MoLF(model, **MERGED)
        train(model, optimizer, range(3), my_rows(), dtype=torch.bfloat16)
        tensors = [x for own in optimizer.state.values() for x in own.values()]
        finite = all(full(x).isfinite().all() for x in [*tensors, *(p.detach() for p in model.parameters())])
        return {"dtypes": sorted({str(x.dtype) for x in [*tensors, *model.parameters()]}), "finite": bool(finite)}

    def sharded_states(self):
        """Every state of a shard is a shard, A is whole."""
        model = fsdp(mlp(torch.bfloat16))
        optimizer = MoLF(model, **MERGED)
        backward(model, 0, my_rows(), torch.bfloat16, 1)
        optimizer.step()
        own = optimizer.state[model[1].weight]
        return {"sharded": sorted(key for key, value in own.items() if isinstance(value, DTensor))}

    def odd_placements(self):
        """Column shards are refused, with the reason."""
        model = nn.Sequential(nn.Linear(8, 8))
        fully_shard(model, shard_placement_fn=lambda p: Shard(1) if p.ndim == 2 else None)
        model(torch.ones(1, 8)).sum().backward()
        return error_of(MoLF(model, **MERGED).step)

    def gradient_release(self):
        """Refused at construction, whether the model is whole or sharded."""
        whole, sharded = (error_of(MoLF, model, **MERGED, optimizer_in_backward=True) for model in (mlp(), fsdp(mlp())))
        return {"errors": [whole["error"], sharded["error"]]}

    def state_before_sharding(self):
        model = mlp()
        optimizer = MoLF(model, **MERGED)
        optimizer.experts["1"]["lora_r2"].assign(B=torch.ones(13, 2))
        model = fsdp(model)
        backward(model, 0, my_rows(), torch.float64, 1)
        return error_of(optimizer.step)

    def another_shape(self):
        """A sharded parameter whose memory is replaced, by a whole of another shape or by other rows here, moves nothing."""
        model = fsdp(mlp())
        optimizer = MoLF(model, **MERGED)
        train(model, optimizer, range(1), my_rows())
        weight, errors = model[4].weight, []
        taller = distribute_tensor(torch.ones(9, 13, dtype=torch.float64), weight.device_mesh, weight.placements)
        before = copy.deepcopy(optimizer.state_dict()["state"])
        backward(model, 1, my_rows(), torch.float64, 1)
        old = weight.data, weight._local_tensor
        weight._local_tensor = torch.cat([old[1], torch.ones(1, 13, dtype=torch.float64)])
        errors.append(error_of(optimizer.step)["error"])
        weight._local_tensor, weight.grad = old[1], None
        weight.data = taller
        errors.append(error_of(optimizer.step)["error"])
        after = optimizer.state_dict()["state"]
        still = all(torch.equal(local(x), local(after[i][key])) for i, own in before.items() for key, x in own.items())
        return {"errors": errors, "still": still}

    def a_whole_state_is_sharded(self):
        """``load_state_dict`` takes a state that was saved by one process."""
        plain = mlp()
        alone = MoLF(plain, process_group=self._alone, **MERGED)
        train(plain, alone, range(3), list(range(8)))
        model = fsdp(copy.deepcopy(plain))
        optimizer = MoLF(model, **MERGED)
        optimizer.load_state_dict(copy.deepcopy(alone.state_dict()))
        train(plain, alone, range(3, 6), list(range(8)))
        train(model, optimizer, range(3, 6), my_rows())
        return {"apart": furthest(everything(model, optimizer), everything(plain, alone))}

    def checkpoint(self):
        return self._checkpoint(fsdp(mlp()), "checkpoint")

    def checkpoint_stacked(self):
        return self._checkpoint(fsdp_stacked(mixture()), "checkpoint_stacked")

    def _checkpoint(self, model, name):
        """Two ranks save and go on; other numbers of ranks load and must end where they ended."""
        folder, end_file = self._folder / name, self._folder / f"{name}.pt"
        torch.manual_seed(5 if self._size == 2 else 99)
        optimizer = MoLF(model, **MERGED)
        if self._size == 2:
            train(model, optimizer, range(3), my_rows())
            optimizer.zero_grad()
        weights, states = get_state_dict(model, optimizer)
        state = {"model": weights, "optimizer": states}
        if self._size == 2:
            dcp.save(state, checkpoint_id=folder)
        else:
            dcp.load(state, checkpoint_id=folder)
            set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        train(model, optimizer, range(3, 6), my_rows())
        end = everything(model, optimizer)
        if self._size == 2 and dist.get_rank() == 0:
            torch.save(end, end_file)
        dist.barrier()
        return {"apart": furthest(end, torch.load(end_file))}


def run(rank, size, folder):
    """Run all checks on one rank and write what they return, or how they failed, to ``{size}ranks-{rank}.json``."""
    torch.set_num_threads(1)
    os.environ["TRITON_INTERPRET"] = "1"  # these ranks are on CPUs
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nothing here writes into an output
    store = dist.FileStore(f"{folder}/store{size}", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=120))
    checks, reports = Checks(folder), {}
    fused = vars(Fused) if importlib.util.find_spec("triton") else ()
    calls = {name: getattr(checks, name) for name in (*vars(EightBits), *fused, *vars(Checks)) if name[0] != "_"}
    calls |= {name: partial(checks._compare, *case) for name, case in COMPARED.items()}
    for name, check in calls.items():
        if name in ON_TWO_RANKS and size != 2 or name in ON_FOUR_RANKS and size != 4:
            continue
        try:
            reports[name] = check()
        except Exception:
            reports[name] = {"failed": traceback.format_exc()}
    Path(folder, f"{size}ranks-{rank}.json").write_text(json.dumps(reports))
    dist.destroy_process_group()
