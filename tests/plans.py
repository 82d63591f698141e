"""Plans made by hand for the tests of single kernels: tensors, tables and launches without a model."""

from types import SimpleNamespace

import torch

from molf.kernels.launches import Launches
from molf.kernels.plan import Entry
from molf.kernels.step import _Step
from molf.kernels.tables import GRAD
from molf.numerics.adamw import TensorState
from molf.scores import EPD

BETAS, EPS, LR, DECAY, T = (0.9, 0.99), 1e-8, 0.1, 0.3, 3
CORRECTIONS = (1 - BETAS[0] ** T, 1 - BETAS[1] ** T)


def entry(param, m, v, expert, low=None, absmax=(None, None), **how):
    """Return a plan's entry of a tensor, by default one that is whole, of layer 0, with a stream of its own."""
    how = {"layer": 0, "stream": 11 * expert, "decay": DECAY, "counted": True} | how
    tensor = TensorState(param, None, m, v, low, *absmax)
    return Entry(tensor, -1, False, expert=expert, group=0, ratio=1.0, **how)


def step_of(entries, grads, experts, device, clip=1.0, go=1.0, score=None, chosen=None, seed=3):
    """Return a step over tensors, ready for any of its phases.

    Args:
        entries: Those with gradients of their own, then A and B of all pairs.
        grads: The gradients of the former.
        experts: The number of experts.
        device: Of all of them.
        clip: The factor of the gradients.
        go: 0 for a step that is skipped.
        score: EPD unless given.
        chosen: The experts that won.
        seed: For stochastic rounding.
    """
    gradients = SimpleNamespace(offsets=[0] * (len(entries) - len(grads)))
    plan = SimpleNamespace(
        entries=entries,
        owned=len(grads),
        routed=experts,
        experts=experts,
        counts=[None],
        effective=[i for i, one in enumerate(entries) if one.effective],
        gradients=gradients,
    )
    addresses = [grad.data_ptr() for grad in grads]
    made = SimpleNamespace(plan=plan, device=device)
    made.launches = Launches(plan, addresses, device)
    made.launches.rows[:, GRAD.value] = torch.tensor(addresses + gradients.offsets)
    step = _Step(made, SimpleNamespace(score=score or EPD()), 0)
    scalars = [go, clip, 1 - BETAS[0], BETAS[1], 1 - BETAS[1], EPS]
    step._scalars, step._go = torch.tensor(scalars, device=device), torch.tensor(go, device=device)
    won = torch.tensor([float(e in (chosen or ())) for e in range(experts)], device=device)
    rates = torch.tensor([LR] * len(entries) + [LR * one.decay for one in entries], device=device)
    step._moves = made.launches.moves([won], torch.tensor([CORRECTIONS], device=device), rates)
    step._noise = torch.full((), seed, device=device)
    return step


def phase2(step):
    """Move the winners of a step that ``step_of`` made."""
    for what in step._tables.early:
        step._launch_winners(what, step._scalars)
    for chunk in step._tables.chunks:
        step._move_chunk(chunk)


def adam(m, v):
    """Return a step at rate 1, by the formula."""
    return (m / CORRECTIONS[0]) / ((v / CORRECTIONS[1]).sqrt() + EPS)


__all__ = ["BETAS", "DECAY", "EPS", "LR", "adam", "entry", "phase2", "step_of"]
