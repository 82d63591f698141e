"""Models, data and training for the checks of several ranks. Nothing here needs more than torch."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from molf.numerics.bf16 import join
from molf.numerics.distributed import full, local, local_part, shard_rows_like
from small import mlp

RATES = {"lr": 1e-2, "lora_lr": 2e-2}
MERGED = {"ranks": (2, 3), **RATES}


class AdaptedLinear(nn.Module):
    """A linear layer with LoRA adapters that MoLF takes for PEFT's."""

    def __init__(self, base, ranks):
        super().__init__()
        self.base_layer = base
        self.r = {f"r{r}": r for r in ranks}
        self.active_adapters, self.scaling, self.lora_variant = list(self.r), dict.fromkeys(self.r, 2.0), {}
        linear = {"bias": False, "dtype": base.weight.dtype}
        self.lora_A = nn.ModuleDict({name: nn.Linear(base.in_features, r, **linear) for name, r in self.r.items()})
        self.lora_B = nn.ModuleDict({name: nn.Linear(r, base.out_features, **linear) for name, r in self.r.items()})

    def get_base_layer(self):
        return self.base_layer

    def forward(self, x):
        pairs = [self.scaling[name] * self.lora_B[name](self.lora_A[name](x)) for name in self.r]
        return self.base_layer(x) + sum(pairs)


def adapted(freeze, dtype=torch.float64):
    model = mlp(dtype).requires_grad_(not freeze)
    for i in (1, 4, 5):
        model[i] = AdaptedLinear(model[i], (2, 3))
    return model


def ddp(model):
    return DistributedDataParallel(model)


def fsdp(model, **how):
    for module in (model[1], model[4]):
        fully_shard(module, **how)
    return fully_shard(model, **how)


def fsdp_stacked(model):
    """Shard five stacked matrices: unevenly over two ranks, and over four of which one holds none."""
    fully_shard(model[1])
    return fully_shard(model)


def in_part(model):
    fully_shard(model[1])
    return model


def hsdp(model):
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicas", "shards"))
    return fsdp(model, mesh=mesh)


def batch(t, dtype):
    generator = torch.Generator().manual_seed(100 + t)
    ids = torch.randint(0, 11, (8, 6), generator=generator)
    return ids, torch.randn(8, 6, 3, generator=generator).to(dtype)


def backward(model, t, rows, dtype, micro):
    """Compute the mean gradient of those rows of a batch in ``micro`` parts."""
    ids, target = batch(t, dtype)
    for part in range(micro):
        last = part == micro - 1
        own = rows[part::micro]
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last)
        if isinstance(model, DistributedDataParallel):
            model.require_backward_grad_sync = last
        ((model(ids[own]) - target[own]).square().mean() / micro).backward()


def train(model, optimizer, steps, rows, micro=1, dtype=torch.float64):
    winners = []
    for t in steps:
        optimizer.zero_grad()
        backward(model, t, rows, dtype, micro)
        optimizer.step()
        winners.append(optimizer.routing.winners())
    return winners


def error_of(function, *args, **options):
    """Call a function and return its error, which is expected."""
    try:
        function(*args, **options)
    except (RuntimeError, ValueError) as error:
        return {"error": str(error)}


def my_rows():
    return list(range(dist.get_rank(), 8, dist.get_world_size()))


def everything(model, optimizer):
    """All weights and states, whole, by the names of the plain model."""
    named = {name.removeprefix("module."): p for name, p in model.named_parameters()}
    tensors = {name: full(p.detach()) for name, p in named.items()}
    for name, p in named.items():
        tensors |= {f"{name}/{key}": full(value) for key, value in optimizer.state.get(p, {}).items()}
    return tensors


def exact(model, optimizer):
    """All weights that have low parts, whole and in full precision, by name: int16 low parts cannot be gathered."""
    lows = {p: own["low"] for p, own in optimizer.state.items() if "low" in own}
    joined = {n: (join(local(p.detach()), local(lows[p])), p) for n, p in model.named_parameters() if p in lows}
    return {n: full(shard_rows_like(rows, p)) for n, (rows, p) in joined.items()}


def furthest(one, other):
    assert one.keys() == other.keys()
    return max(float((x - other[name]).abs().max()) for name, x in one.items())


def give(t, *models):
    """Give equal models, sharded or not, the same random gradients of step ``t``, in place if they have some."""
    generator = torch.Generator().manual_seed(t)
    for copies in zip(*(model.parameters() for model in models), strict=True):
        grad = torch.randn(copies[0].shape, generator=generator).to(copies[0].dtype)
        for p in copies:
            p.grad = torch.empty_like(p) if p.grad is None else p.grad
            local(p.grad).copy_(local_part(grad, p))


def given(t, model, optimizer, plain, alone):
    """Take a step of the same random gradients with both and return whether the same experts won."""
    give(t, plain, model)
    optimizer.step()
    alone.step()
    return optimizer.routing.winners() == alone.routing.winners()
