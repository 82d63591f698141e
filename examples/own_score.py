"""A router of one's own: a score is one small class. Here: expected descent per expert instead of per parameter.

python examples/own_score.py
"""

import torch
from torch import nn

from molf import MoLF, Score


class TotalDescent(Score):
    """The paper's EPD (Eq. 10) without its division by N: favours experts with many parameters."""

    name = "total_descent"

    def term(self, m, v, eps):
        return m * m / (v.sqrt() + eps)

    def finish(self, total, n, lr):
        return lr * total  # [M, E], modules x experts


def main(steps=20):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8))
    optimizer = MoLF(model, ranks=(4,), lr=1e-3, score=TotalDescent())
    x, y = torch.randn(256, 32), torch.randn(256, 8)
    for _ in range(steps):
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for module, winners in optimizer.routing.winners().items():
        print(f"layer {module}: {', '.join(winners)} won the last step")
    return loss.item(), optimizer.routing


if __name__ == "__main__":
    main()
