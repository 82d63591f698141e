"""MoLF in a loop of accelerate: ``prepare`` takes it like any optimizer, on one device, under DDP and FSDP2.

accelerate launch examples/accelerate_loop.py
"""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from molf import MoLF


def main(folder="runs/accelerate", steps=8, resume=False):
    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8))
    # accelerator.clip_grad_norm_ does not see the LoRA experts' gradients: max_grad_norm clips them all.
    optimizer = MoLF(model, ranks=(4,), lr=1e-3, max_grad_norm=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * steps)
    x = torch.randn(64 * steps, 32, generator=torch.Generator().manual_seed(1))
    data = DataLoader(TensorDataset(x, torch.tanh(x[:, :8])), batch_size=32)
    model, optimizer, schedule, data = accelerator.prepare(model, optimizer, schedule, data)
    if resume:
        accelerator.load_state(folder)
    for inputs, targets in data:
        with accelerator.accumulate(model):
            loss = nn.functional.mse_loss(model(inputs), targets)
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    accelerator.save_state(folder)
    return loss.item(), model, optimizer.optimizer


if __name__ == "__main__":
    loss, _, optimizer = main()
    print(f"loss {loss:.3f}, last winners {optimizer.routing.winners()}")
