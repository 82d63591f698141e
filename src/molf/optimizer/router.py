"""One routed step over all layers: move every expert's moments, score, decide, step the winners.

Layers are worked on in chunks, so that temporaries (LoRA gradients, float32 copies, snapshots) stay bounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from molf.layers.base import RoutedLayer
from molf.numerics.adamw import Rates, Slot, Workspace, observe_, settle_, update_
from molf.numerics.bf16 import Noise
from molf.numerics.distributed import Ranks, is_sharded
from molf.routing import Routing, choose
from molf.scores import Score

__all__ = ["route"]

# Weights (elements) whose layers share launches on an accelerator; a CPU takes layer by layer, while it is in the cache.
_CHUNK = 1 << 26


def route(layers: Sequence[RoutedLayer], score: Score, top_k: int, noise: Noise | None, ranks: Ranks) -> Routing:
    """Take the step of all routed layers.

    Args:
        layers: The M layers that have a gradient, at least one; all with the same E experts.
        score: What ranks the experts of a layer.
        top_k: How many of them move.
        noise: For stochastic rounding, None where low parts are kept.
        ranks: Those that train these layers together; scores are summed over the shards, and all take the first's decision.

    Returns:
        The decision.
    """
    workspace = Workspace()
    total, n = _observe(layers, score, workspace, ranks)
    lr = torch.tensor([layer.lrs for layer in layers], dtype=torch.float64, device="cpu")
    scores = score.finish(total=total, n=n, lr=lr)
    chosen = ranks.agree(choose(scores, top_k), layers[0].group["params"][0].device)
    winners = iter([[i for i, won in enumerate(row) if won] for row in chosen.tolist()])
    for chunk in _chunks(layers):
        _update(chunk, [next(winners) for _ in chunk], workspace, noise)
    return Routing(tuple(layer.name for layer in layers), layers[0].experts, scores, chosen)


def _observe(layers: Sequence[RoutedLayer], score: Score, workspace: Workspace, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Move all moments; return the scores' sums and the experts' sizes, ``[M, E]`` float64 on the host."""
    shape = (len(layers), len(layers[0].experts))
    sizes = torch.zeros(shape, dtype=torch.float64, device="cpu")
    sums: list[Tensor] = []
    owners: list[tuple[int, int]] = []
    sharded: list[bool] = []
    first = 0
    for chunk in _chunks(layers):
        for layer in chunk:
            layer.count_step()
        # Expert by expert: what phase 1 reads of a weight's gradient is in the cache when the LoRA gradients are taken of it.
        for e in range(shape[1]):
            slots: list[Slot] = []
            for m, layer in enumerate(chunk, start=first):
                own = layer.slots(e)
                slots += own
                owners += [(m, e)] * len(own)
                sharded += [is_sharded(slot.param) for slot in own]
                sizes[m, e] = sum(slot.param.numel() for slot in own)
            sums += observe_(slots, chunk[0].group["betas"], chunk[0].group["eps"], score, workspace)
        for layer in chunk:
            layer.release()
        first += len(chunk)
    # The step's one transfer of scores. Everything on the host says so: the default device may be another.
    parts = torch.stack([part.to(sums[0].device) for part in sums])
    on_host = ranks.sum_parts(parts, sharded).cpu().double()
    total = torch.zeros(shape, dtype=torch.float64, device="cpu")
    total.index_put_(torch.tensor(owners, device="cpu").unbind(1), on_host, accumulate=True)
    return total, sizes


def _update(
    layers: Sequence[RoutedLayer], winners: Sequence[Sequence[int]], workspace: Workspace, noise: Noise | None
) -> None:
    work: dict[Rates, list[Slot]] = {}
    for layer, won in zip(layers, winners, strict=True):
        for rates, slot in layer.begin_update(won):
            work.setdefault(rates, []).append(slot)
    for rates, slots in work.items():
        update_(slots, rates, workspace, noise)
    lost = [
        slot
        for layer, won in zip(layers, winners, strict=True)
        for i in range(len(layer.experts))
        for slot in layer.slots(i)
        if i not in won and slot.in_8_bits
    ]
    settle_(lost, layers[0].group["betas"], layers[0].group["eps"], workspace)
    for layer in layers:
        layer.finish_update()


def _chunks(layers: Sequence[RoutedLayer]) -> Iterator[list[RoutedLayer]]:
    """Cut the layers into runs that are worked on together, each with one setting of Adam."""
    chunk: list[RoutedLayer] = []
    for layer in layers:
        budget = 0 if layer.group["params"][0].device.type == "cpu" else _CHUNK
        same = chunk and all(chunk[0].group[key] == layer.group[key] for key in ("betas", "eps"))
        if chunk and (not same or sum(member.numel for member in chunk) + layer.numel > budget):
            yield chunk
            chunk = []
        chunk.append(layer)
    yield chunk
