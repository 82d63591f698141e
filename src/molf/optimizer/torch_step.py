"""The step by PyTorch's kernels: prepare the gradients, score all experts, decide, move the winners.

Letters: M routed layers, E experts. Layers are processed in chunks, so that temporaries (LoRA gradients, float32 copies) stay
bounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from molf.errors import MolfError
from molf.layers.base import RoutedLayer, level_gradients_
from molf.numerics.adamw import (
    Rates,
    TensorState,
    Workspace,
    adamw_,
    adamw_update_,
    requantize_moments_,
    update_moments_and_score_,
)
from molf.numerics.bf16 import master_dtype
from molf.numerics.context import StepContext
from molf.numerics.distributed import is_sharded, local
from molf.numerics.gradients import check_dense, exact_norm, norm_over_shards
from molf.routing import Outcome, Routing, choose
from molf.scores import Evidence

__all__ = ["prepare_gradients", "route", "torch_step"]

# Weight elements whose layers share launches. On a CPU a layer, or several small ones, should stay in the cache.
_CHUNK, _CPU_CHUNK = 1 << 26, 1 << 17


def torch_step(layers: Sequence[RoutedLayer], ordinary: Sequence[dict[str, Any]], context: StepContext) -> Outcome:
    """Take the step, or skip it whole if a gradient is not finite.

    Args:
        layers: The M routed layers that have gradients, all with the same experts.
        ordinary: Groups of parameters that take plain AdamW.
        context: Of this step.
    """
    level_gradients_(layers)
    dense = [p.grad for group in ordinary for p in group["params"] if p.grad is not None]
    dense += [grad for layer in layers for grad in layer.gradients()]
    norm = prepare_gradients(dense, layers, context)
    if context.found_inf or not norm.isfinite():
        return Outcome(None, norm, taken=False)
    routing = route(layers, context) if layers else None
    for group in ordinary:
        _adamw(group, context)
    return Outcome(routing, norm, taken=True)


def prepare_gradients(dense: Sequence[Tensor], layers: Sequence[RoutedLayer], context: StepContext) -> Tensor:
    """Unscale and clip the gradients in place, and return their norm in between, 0-dim.

    The norm is not finite if a gradient is not, or if it is not clipped and its square is not. Clipping counts the gradients
    of all experts, ``dW``, ``dA`` and ``dB``: in the merged form nobody outside can see the LoRA ones. Without clipping the
    norm is that of the dense gradients.

    Args:
        dense: Gradients that backward left on parameters.
        layers: The routed layers; with shards, their gradients of A are summed over the ranks here.
        context: Of this step.

    Raises:
        MolfError: If a gradient is sparse.
    """
    check_dense(dense)
    if not dense:
        return torch.zeros(())
    parts, max_norm = [local(grad) for grad in dense], context.max_grad_norm
    if context.grad_scale is not None:
        torch._foreach_mul_(parts, context.grad_scale.double().reciprocal())
    sharded = context.ranks.shards is not None
    norm = _reduce_over_shards(dense, layers, context) if sharded else exact_norm(parts, max_norm is not None)
    if max_norm is None or not norm.isfinite():
        return norm
    lora = [x.grad for layer in layers for x in layer.derived_tensors() if x.grad is not None]
    if not sharded:
        norm = exact_norm([*parts, *lora], clipped=True)
    torch._foreach_mul_([*parts, *lora], (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _reduce_over_shards(dense: Sequence[Tensor], layers: Sequence[RoutedLayer], context: StepContext) -> Tensor:
    """Sum the gradients of A over the shards and return the norm of all gradients, in one all-reduce."""
    ranks = context.ranks
    sizes = [layer.reduced_numel for layer in layers]
    device, dtype = dense[0].device, master_dtype(dense[0].dtype)
    flat = torch.zeros(sum(sizes) + ranks.shard_count, device=device, dtype=dtype)
    *outs, norms = torch.split(flat, [*sizes, ranks.shard_count])
    for layer, out in zip(layers, outs, strict=True):
        layer.write_grads_into(out)
    clipped = context.max_grad_norm is not None
    lora = [x for layer in layers for x in layer.derived_tensors()] if clipped else []
    parts = [(local(grad), is_sharded(grad)) for grad in dense]
    parts += [(x.grad, is_sharded(x.param)) for x in lora if x.grad is not None]
    own, whole = ([grad for grad, sharded in parts if sharded is wanted] for wanted in (True, False))
    return norm_over_shards(own, whole, context.found_inf, flat, norms, ranks, partial(exact_norm, clipped=clipped))


def route(layers: Sequence[RoutedLayer], context: StepContext) -> Routing:
    """Take the step of all routed layers and return the decision.

    Args:
        layers: The M layers that have a gradient, at least one; all with the same E experts.
        context: Of this step. Scores are summed over its shards; all ranks take the leader's decision.
    """
    workspace = Workspace()
    evidence = _update_moments(layers, context, workspace)
    scores = context.score.scores(evidence)
    if scores.shape != evidence.lr.shape:
        raise MolfError(
            f"{type(context.score).__name__} returned scores {list(scores.shape)} for {len(layers)} modules with "
            f"{len(layers[0].experts)} experts: finish must return [M, E] = {list(evidence.lr.shape)}"
        )
    decision = choose(scores, context.top_k)
    chosen = context.ranks.broadcast_decision(decision, layers[0].group["params"][0].device)
    winners = iter([[i for i, won in enumerate(row) if won] for row in chosen.tolist()])
    for chunk in _chunks(layers):
        _move_winners(chunk, [next(winners) for _ in chunk], context, workspace)
    return Routing(tuple(layer.name for layer in layers), layers[0].experts, scores, chosen)


def _update_moments(layers: Sequence[RoutedLayer], context: StepContext, workspace: Workspace) -> Evidence:
    """Count the step, update all moments, and return what the score decides by."""
    shape = (len(layers), len(layers[0].experts))
    sizes = [[0] * shape[1] for _ in layers]
    sums: list[Tensor] = []
    owners: list[tuple[int, int]] = []
    sharded: list[bool] = []
    first = 0
    for chunk in _chunks(layers):
        for layer in chunk:
            layer.count_step()
        # Expert by expert: the weight's gradient is still in the cache when the LoRA gradients are computed from it.
        for e in range(shape[1]):
            tensors: list[TensorState] = []
            firsts: set[int] = set()
            for m, layer in enumerate(chunk, start=first):
                own = layer.tensors(e)
                firsts.add(len(tensors))
                tensors += own
                owners += [(m, e)] * len(own)
                sharded += [is_sharded(x.param) for x in own]
                sizes[m][e] = sum(x.param.numel() for x in own)
            betas, eps = chunk[0].group["betas"], chunk[0].group["eps"]
            sums += update_moments_and_score_(tensors, betas, eps, context.score, workspace, firsts)
        for layer in chunk:
            layer.drop_grads()
        first += len(chunk)
    # The step's only sync. Host tensors name their device, because the default device may be another one.
    parts = torch.stack([part.to(sums[0].device) for part in sums])
    on_host = context.ranks.sum_parts(parts, sharded).cpu().double()
    sums_by_expert = torch.zeros(*shape, on_host.shape[1], dtype=torch.float64, device="cpu")
    sums_by_expert.index_put_(torch.tensor(owners, device="cpu").unbind(1), on_host, accumulate=True)
    total, descent = sums_by_expert[..., 0], sums_by_expert[..., -1]
    lr = torch.tensor([layer.lrs for layer in layers], dtype=torch.float64, device="cpu")
    steps = torch.tensor([layer.step for layer in layers], dtype=torch.float64, device="cpu")
    n = torch.tensor(sizes, dtype=torch.float64, device="cpu")
    return Evidence(tuple(layer.name for layer in layers), total, n, lr, descent, steps)


def _move_winners(
    layers: Sequence[RoutedLayer], winners: Sequence[Sequence[int]], context: StepContext, workspace: Workspace
) -> None:
    work: dict[Rates, list[TensorState]] = {}
    for layer, won in zip(layers, winners, strict=True):
        for rates, tensor in layer.begin_update(won):
            work.setdefault(rates, []).append(tensor)
    for rates, tensors in work.items():
        adamw_update_(tensors, rates, workspace, context.noise)
    lost = [
        tensor
        for layer, won in zip(layers, winners, strict=True)
        for i in range(len(layer.experts))
        for tensor in layer.tensors(i)
        if i not in won and tensor.is_quantized
    ]
    requantize_moments_(lost, layers[0].group["betas"], layers[0].group["eps"], workspace)
    for layer in layers:
        layer.finish_update()


def _chunks(layers: Sequence[RoutedLayer]) -> Iterator[list[RoutedLayer]]:
    """Yield runs of layers that share launches; within a run ``betas`` and ``eps`` are equal."""
    chunk: list[RoutedLayer] = []
    taken = 0
    for layer in layers:
        budget = _CPU_CHUNK if layer.group["params"][0].device.type == "cpu" else _CHUNK
        same = chunk and all(chunk[0].group[key] == layer.group[key] for key in ("betas", "eps"))
        if chunk and (not same or taken + layer.numel > budget):
            yield chunk
            chunk, taken = [], 0
        chunk.append(layer)
        taken += layer.numel
    yield chunk


def _adamw(group: dict[str, Any], context: StepContext) -> None:
    """Take AdamW's step of an ordinary group; parameters may have missed steps, so they are batched by step count."""
    by_step: dict[float, list[TensorState]] = {}
    for p in group["params"]:
        if p.grad is not None:
            entries = context.state[p]
            entries["step"] += 1
            by_step.setdefault(float(entries["step"]), []).append(TensorState.of(p, entries))
    for step, tensors in by_step.items():
        rates = Rates(float(group["lr"]), group["weight_decay"], group["betas"], group["eps"], step)
        adamw_(tensors, rates, context.noise)
