"""MoLF in Lightning: what ``configure_optimizers`` returns. Run by python examples/lightning_module.py."""

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from molf import MoLF


class Regression(lightning.LightningModule):
    """Any module of Lightning's."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8))

    def training_step(self, batch, _):
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        # Lightning's own gradient_clip_val does not see the LoRA experts' gradients: clip here.
        optimizer = MoLF(self, ranks=(4,), lr=1e-3, max_grad_norm=1.0)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)]


def main(epochs=5, **settings):
    torch.manual_seed(0)
    x = torch.randn(256, 32)
    trainer = lightning.Trainer(max_epochs=epochs, logger=False, enable_checkpointing=False, **settings)
    trainer.fit(Regression(), DataLoader(TensorDataset(x, torch.tanh(x[:, :8])), batch_size=64))
    return float(trainer.callback_metrics["loss"]), trainer.optimizers[0].routing.winners()


if __name__ == "__main__":
    print("loss {:.3f}, last step {}".format(*main()))
