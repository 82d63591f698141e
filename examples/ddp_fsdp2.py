"""MoLF in a plain loop on several devices: DDP, or FSDP2 with --fsdp. The LoRA pairs are sharded like the weights.

torchrun --nproc_per_node 2 examples/ddp_fsdp2.py [--fsdp]
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from molf import MoLF


def main(shard, steps=10):
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    dist.init_process_group()  # NCCL on GPUs, else gloo
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if device.type != "cpu":
        torch.accelerator.set_device_index(rank % torch.accelerator.device_count())
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8)).to(device)
    model = fully_shard(model) if shard else nn.parallel.DistributedDataParallel(model)
    optimizer = MoLF(model, ranks=(4,), lr=1e-3, max_grad_norm=1.0)
    x = torch.randn(256, 32, device=device)[rank::ranks]
    for _ in range(steps):
        loss = nn.functional.mse_loss(model(x), torch.tanh(x[:, :8]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    dist.all_reduce(loss)
    if rank == 0:
        print(f"loss {loss.item() / ranks:.6f}, last winners {optimizer.routing.winners()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main("--fsdp" in sys.argv)
