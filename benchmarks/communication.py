"""What ranks send each other and keep: MoLF in both forms and full fine-tuning with AdamW, under DDP and FSDP2.

    python benchmarks/communication.py [--ranks 2] [--computed] [--json]

First the bytes of a small model's step, counted on gloo ranks of this machine, against the formulas; then what they say of
large models (computed from their shapes; nothing of that size is run). Bytes are those of the buffers that collectives are given.
On a ring of W ranks a rank sends 2 (W-1)/W of an all-reduce's buffer, and (W-1)/W of a gather's or a scatter's.
"""

import argparse
import importlib.util
import json
import os
import tempfile
from collections import Counter
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from molf import MoLF

METHODS = ("adamw", "merged", "branched")
FUSED = ("merged-fused", "branched-fused")
"""With the step taken by MoLF's own kernels (in Triton's interpreter); counted sharded only, where the optimizer sends much."""
WEIGHTS = "weights and gradients"


@dataclass(frozen=True)
class Shapes:
    """A model: its routed layers, each ``(out, in)`` without bias, and the elements of everything else that trains."""

    layers: tuple[tuple[int, int], ...]
    other: int = 0

    @property
    def weights(self):
        return sum(out * n for out, n in self.layers) + self.other

    def pairs(self, ranks):
        """Elements of all A and of all B."""
        return tuple(sum(r * layer[side] for r in ranks for layer in self.layers) for side in (1, 0))


def llama(hidden, inner, key_value, blocks, vocabulary):
    block = [(hidden, hidden), (key_value, hidden), (key_value, hidden), (hidden, hidden)]
    block += [(inner, hidden), (inner, hidden), (hidden, inner)]
    return Shapes(tuple(block * blocks), 2 * vocabulary * hidden + hidden * (2 * blocks + 1))


LARGE = {"8B": llama(4096, 14336, 1024, 32, 128256), "70B": llama(8192, 28672, 1024, 80, 128256)}


def communicated(shapes, method, sharding, size, ranks, compute=4, reduce=4, master=4):
    """Bytes of the buffers of one step's collectives, by what they are for.

    Args:
        shapes: The model.
        method: "adamw", "merged", or "branched" (experts beside a base that trains); the latter two also "-fused".
        sharding: "ddp" or "fsdp".
        size: Number of ranks W.
        ranks: Of the LoRA experts.
        compute: Bytes per element of gathered weights.
        reduce: Bytes per element of reduced gradients.
        master: Bytes per element of moments, and of the gradients of A.
    """
    method, _, fused = method.partition("-")
    A, B = shapes.pairs(ranks) if method != "adamw" else (0, 0)
    trained = shapes.weights + (A + B if method == "branched" else 0)
    experts = len(shapes.layers) * (1 + len(ranks))
    routed = {"decision": experts} if method != "adamw" else {}
    if sharding == "ddp":
        return {WEIGHTS: reduce * trained, **routed}
    if method != "adamw":
        # Scores are summed tensor by tensor: a weight, and A and B of every pair; by kernels expert by expert, two sums each.
        routed["scores"] = 8 * (2 * experts if fused else len(shapes.layers) * (1 + 2 * len(ranks)))
        routed["dA and norm"] = master * (size + (A if method == "merged" else 0))
    return {WEIGHTS: 2 * compute * trained + reduce * trained, **routed}


def kept(shapes, method, sharding, size, ranks, weight=4, gradient=4):
    """Bytes that a rank keeps: weights, gradients, two float32 moments, and the pairs (A is whole on every rank when merged)."""
    A, B = shapes.pairs(ranks) if method != "adamw" else (0, 0)
    parts = size if sharding == "fsdp" else 1
    model = (weight + gradient + 8) * shapes.weights / parts
    if method == "branched":
        return model + 16 * (A + B) / parts
    return model + 12 * (A + B / parts)


class Traffic(TorchDispatchMode):
    """Counts the bytes of the buffers that collectives are given on this thread, by operation."""

    # Where the whole buffer is among an operation's arguments.
    _BUFFERS = {"allreduce_": 0, "broadcast_": 0, "_allgather_base_": 0, "_reduce_scatter_base_": 1}

    def __init__(self):
        super().__init__()
        self.bytes = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.namespace == "c10d":
            name = operation._schema.name.split("::")[1]
            buffer = args[self._BUFFERS[name]]
            for x in buffer if isinstance(buffer, (list, tuple)) else [buffer]:
                self.bytes[name] += x.numel() * x.element_size()
        return operation(*args, **(kwargs or {}))


class Branched(nn.Module):
    """A linear layer with LoRA adapters as PEFT lays them out."""

    def __init__(self, base, ranks):
        super().__init__()
        self.base_layer = base
        self.r = {f"r{r}": r for r in ranks}
        self.active_adapters, self.scaling, self.lora_variant = list(self.r), dict.fromkeys(self.r, 1.0), {}
        self.lora_A = nn.ModuleDict({k: nn.Linear(base.in_features, r, bias=False) for k, r in self.r.items()})
        self.lora_B = nn.ModuleDict({k: nn.Linear(r, base.out_features, bias=False) for k, r in self.r.items()})

    def get_base_layer(self):
        return self.base_layer

    def forward(self, x):
        return self.base_layer(x) + sum(self.lora_B[k](self.lora_A[k](x)) for k in self.r)


# Rows divide among 2 and 4 ranks, so that nothing is padded: padding would be counted and is no formula's business.
SMALL = Shapes(((16, 8), (16, 16), (8, 16)))


def built(method, sharding, ranks):
    method, _, fused = method.partition("-")
    linears = [nn.Linear(n, out, bias=False) for out, n in SMALL.layers]
    model = nn.Sequential(*(Branched(linear, ranks) if method == "branched" else linear for linear in linears))
    if sharding == "ddp":
        model = DistributedDataParallel(model)
    else:
        for layer in model:
            fully_shard(layer, reshard_after_forward=True)
    if method == "adamw":
        return model, torch.optim.AdamW(model.parameters())
    # Both experts win every step, so that pairs have started and all that may be sent is.
    options = {"top_k": 1 + len(ranks), "fused": bool(fused)}
    return model, MoLF(model, **options, **({"ranks": ranks} if method == "merged" else {}))


def counted(method, sharding, ranks):
    """Take a step, then count another: what backward and what the optimizer gave to collectives, in bytes."""
    model, optimizer = built(method, sharding, ranks)
    reduced = Counter()
    if sharding == "ddp":  # its collectives start outside Python

        def hook(state, bucket):
            reduced[WEIGHTS] += bucket.buffer().numel() * bucket.buffer().element_size()
            future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
            return future.then(lambda done: done.value()[0] / dist.get_world_size())

        model.register_comm_hook(None, hook)
    passes, step = Traffic(), Traffic()
    for _ in range(2):
        optimizer.zero_grad()
        reduced.clear()
        passes.bytes.clear()
        step.bytes.clear()
        with passes:
            model(torch.ones(4, SMALL.layers[0][1])).sum().backward()
        with step:
            optimizer.step()
    return {
        WEIGHTS: reduced[WEIGHTS] if sharding == "ddp" else passes.bytes.total(),
        "optimizer": step.bytes.total(),
    }


def on_rank(rank, size, folder, ranks):
    torch.set_num_threads(1)
    os.environ["TRITON_INTERPRET"] = "1"  # these ranks are on CPUs
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", size), rank=rank, world_size=size)
    fused = FUSED if importlib.util.find_spec("triton") else ()
    cases = [(s, m) for s in ("ddp", "fsdp") for m in METHODS] + [("fsdp", m) for m in fused]
    counts = {f"{s} {m}": counted(m, s, ranks) for s, m in cases}
    if rank == 0:
        with open(f"{folder}/counts.json", "w") as file:
            json.dump(counts, file)
    dist.destroy_process_group()


def count_on_ranks(size, ranks=(2, 4)):
    """Count on so many gloo ranks; return counts and what the formulas say, by sharding and method."""
    with tempfile.TemporaryDirectory() as folder:
        # A fork has imported everything; CUDA does not survive one.
        how = "spawn" if torch.cuda.is_available() else "fork"
        torch.multiprocessing.start_processes(on_rank, (size, folder, ranks), nprocs=size, start_method=how)
        with open(f"{folder}/counts.json") as file:
            counts = json.load(file)
    foreseen = {}
    for name in counts:
        sharding, method = name.split()
        parts = communicated(SMALL, method, sharding, size, ranks)
        weights = parts.pop(WEIGHTS)
        foreseen[name] = {WEIGHTS: weights, "optimizer": sum(parts.values())}
    return counts, foreseen


def large_table(ranks=(128,)):
    """Rows of what the formulas say: bf16 gathered and reduced, float32 weights kept."""
    for name, shapes in LARGE.items():
        for size in (8, 64, 1024):
            for sharding in ("ddp", "fsdp"):
                for method in METHODS:
                    width = {"compute": 2, "reduce": 2}
                    sent = communicated(shapes, method, sharding, size, ranks, **width)
                    yield name, size, sharding, method, sent, kept(shapes, method, sharding, size, ranks)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, choices=(2, 4), help="gloo ranks to count on")
    parser.add_argument("--json", action="store_true", help="make the last line a JSON object")
    parser.add_argument("--computed", action="store_true", help="count nothing, only say what the formulas say")
    args = parser.parse_args()
    counts, foreseen = ({}, {}) if args.computed else count_on_ranks(args.ranks)
    if counts:
        print(f"Counted on {args.ranks} gloo ranks, bytes a step (small model, float32, experts of rank 2 and 4):")
    for name, count in counts.items():
        agree = "as the formula says" if count == foreseen[name] else f"the formula says {foreseen[name]}"
        print(f"  {name:19} {WEIGHTS} {count[WEIGHTS]:6}   optimizer {count['optimizer']:5}   {agree}")
    print("Computed, not run: one expert of rank 128, bf16 compute and reduction, float32 weights; GiB a rank and step")
    for name, size, sharding, method, sent, memory in large_table():
        own = sum(sent.values()) - sent[WEIGHTS]
        print(
            f"  {name:4} {size:5} ranks {sharding:5}{method:9} {WEIGHTS} {sent[WEIGHTS] / 2**30:7.1f}   "
            f"optimizer {own / 2**30:6.3f} ({own / sent[WEIGHTS]:.2%})   kept {memory / 2**30:7.1f}"
        )
    if args.json:
        print(json.dumps({"counted": counts, "formula": foreseen}))


if __name__ == "__main__":
    main()
