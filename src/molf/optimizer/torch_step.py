"""The step by PyTorch's kernels: prepare the gradients, score all experts, decide, move the winners.

Letters: M routed matrices, E experts. A layer has one matrix, or a stack of them. Layers, and parts of stacks, are processed in
chunks, so that temporaries (LoRA gradients, float32 copies) stay bounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from molf.layers.base import RoutedLayer, level_gradients
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
from molf.numerics.gradients import exact_norm, norm_over_shards
from molf.routing import Outcome, Routing, choose
from molf.scores import Evidence, scores_of

__all__ = ["prepare_gradients", "route", "torch_step"]

# Weight elements whose layers share launches. On a CPU a layer, or several small ones, should stay in the cache.
_CHUNK, _CPU_CHUNK = 1 << 26, 1 << 17
# The same for a part of a stack on a CPU: many small matrices gain more from few calls than from the cache.
_CPU_STACK = 1 << 19


def torch_step(layers: Sequence[RoutedLayer], ordinary: Sequence[dict[str, Any]], context: StepContext) -> Outcome:
    """Take the step, or skip it whole if a gradient is not finite.

    Args:
        layers: The M routed layers that have gradients, all with the same experts.
        ordinary: Groups of parameters that take plain AdamW.
        context: Of this step.
    """
    kept = level_gradients(layers)
    dense = [p.grad for group in ordinary for p in group["params"] if p.grad is not None]
    dense += [grad for layer in layers for grad in layer.gradients()]
    norm = prepare_gradients(dense, kept, layers, context)
    if context.found_inf or not norm.isfinite():
        return Outcome(None, norm, taken=False)
    routing = route(layers, context) if layers else None
    for group in ordinary:
        _adamw(group, context)
    return Outcome(routing, norm, taken=True)


def prepare_gradients(
    dense: Sequence[Tensor], kept: Sequence[Tensor], layers: Sequence[RoutedLayer], context: StepContext
) -> Tensor:
    """Unscale and clip the gradients in place, and return their norm in between, 0-dim.

    The norm is not finite if a gradient is not, or if it is not clipped and its square is not. Clipping counts the gradients
    of all experts, ``dW``, ``dA`` and ``dB``: in the merged form nobody outside can see the LoRA ones. Without clipping the
    norm is that of the dense gradients.

    Args:
        dense: The gradients of parameters.
        kept: Gradients that backward left where ``dense`` has copies in other units; they follow.
        layers: The routed layers; with shards, their gradients of A are summed over the ranks here.
        context: Of this step.
    """
    if not dense:
        return torch.zeros((), dtype=torch.float32)
    parts, max_norm = [local(grad) for grad in dense], context.max_grad_norm
    if context.grad_scale is not None:
        _scale_([*parts, *kept], context.grad_scale.double().reciprocal())
    sharded = context.ranks.shards is not None
    norm = _reduce_over_shards(dense, layers, context) if sharded else exact_norm(parts, max_norm is not None)
    if max_norm is None or not norm.isfinite():
        return norm
    lora = [x.grad for layer in layers for x in layer.derived_tensors() if x.grad is not None]
    if not sharded:
        norm = exact_norm([*parts, *lora], clipped=True)
    _scale_([*parts, *kept, *lora], (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _scale_(gradients: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply gradients, which may lie on several devices, by a 0-dim factor, in place."""
    for device in {grad.device for grad in gradients}:
        torch._foreach_mul_([grad for grad in gradients if grad.device == device], factor.to(device))


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
    lora = [(layer, x) for layer in layers for x in layer.derived_tensors()] if clipped else []
    parts = [(local(grad), is_sharded(grad)) for grad in dense]
    parts += [(x.grad, layer.is_sharded(x)) for layer, x in lora if x.grad is not None]
    own, whole = ([grad for grad, sharded in parts if sharded is wanted] for wanted in (True, False))
    return norm_over_shards(own, whole, context.found_inf, flat, norms, ranks, partial(exact_norm, clipped=clipped))


def route(layers: Sequence[RoutedLayer], context: StepContext) -> Routing:
    """Take the step of all routed layers and return the decision.

    Args:
        layers: The M layers that have a gradient, at least one; all with the same E experts.
        context: Of this step. Scores are summed over its shards; all ranks take the leader's decision.
    """
    workspace = Workspace()
    for layer in layers:
        layer.count_step()
    parts = [part for layer in layers for part in layer.parts(_budget(layer, _CPU_STACK))]
    evidence = _update_moments(parts, context, workspace)
    scores = scores_of(context.score, evidence)
    decision = choose(scores, context.top_k)
    chosen = context.ranks.broadcast_decision(decision, layers[0].group["params"][0].device)
    rows = iter(torch.split(chosen, [len(part.modules) for part in parts]))
    for chunk in _chunks(parts):
        _move_winners(chunk, [next(rows) for _ in chunk], context, workspace)
    return Routing(evidence.modules, layers[0].experts, scores, chosen)


def _update_moments(layers: Sequence[RoutedLayer], context: StepContext, workspace: Workspace) -> Evidence:
    """Update all moments, and return what the score decides by."""
    experts = range(len(layers[0].experts))
    modules = tuple(name for layer in layers for name in layer.modules)
    counts = torch.tensor([len(layer.modules) for layer in layers], device="cpu")
    starts = counts.cumsum(0) - counts
    sizes = [[0] * len(experts) for _ in layers]
    sums: list[Tensor] = []
    owners: list[tuple[int, int, bool]] = []  # layer, expert and whether the sums are those of a shard
    done = 0
    for chunk in _chunks(layers):
        # Expert by expert: the weight's gradient is still in the cache when the LoRA gradients are computed from it.
        for e in experts:
            tensors: list[TensorState] = []
            firsts: set[int] = set()
            for i, layer in enumerate(chunk, start=done):
                own = layer.tensors(e)
                firsts.add(len(tensors))
                tensors += own
                owners += [(i, e, layer.is_sharded(x)) for x in own]
                sizes[i][e] = layer.numel_of(own)
            betas, eps = chunk[0].group["betas"], chunk[0].group["eps"]
            sums += update_moments_and_score_(tensors, betas, eps, context.score, workspace, firsts)
        for layer in chunk:
            layer.drop_grads()
        done += len(chunk)
    sums = [layers[i].sums_of_all(part) for part, (i, _, _) in zip(sums, owners, strict=True)]
    # The step's only sync. Host tensors name their device, because the default device may be another one.
    table = torch.tensor(owners, device="cpu")
    lengths = counts[table[:, 0]]
    table = table.repeat_interleave(lengths, dim=0)
    parts = torch.cat([part.to(sums[0].device) for part in sums])
    on_host = context.ranks.sum_parts(parts, table[:, 2].bool()).cpu().double()
    total = torch.zeros(len(modules), len(experts), on_host.shape[1], dtype=torch.float64, device="cpu")
    within = torch.arange(len(table), device="cpu") - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    rows = starts[table[:, 0]] + within
    total.index_put_((rows, table[:, 1]), on_host, accumulate=True)

    def by_module(values: Sequence[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device="cpu").repeat_interleave(counts, dim=0)

    lr, steps, n = by_module([x.score_lrs for x in layers]), by_module([x.step for x in layers]), by_module(sizes)
    return Evidence(modules, total[..., 0], n, lr, total[..., -1], steps)


def _move_winners(
    layers: Sequence[RoutedLayer], chosen: Sequence[Tensor], context: StepContext, workspace: Workspace
) -> None:
    """Move the winners of a chunk; ``chosen`` has the decision ``[matrices, E]`` of every layer, on the host."""
    work: dict[Rates, list[TensorState]] = {}
    for layer, own in zip(layers, chosen, strict=True):
        for rates, tensor in layer.begin_update(own):
            work.setdefault(rates, []).append(tensor)
    for rates, tensors in work.items():
        adamw_update_(tensors, rates, workspace, context.noise)
    lost = [tensor for layer, own in zip(layers, chosen, strict=True) for tensor in layer.quantized_losers(own)]
    requantize_moments_(lost, layers[0].group["betas"], layers[0].group["eps"], workspace)
    for layer in layers:
        layer.finish_update()


def _chunks(layers: Sequence[RoutedLayer]) -> Iterator[list[RoutedLayer]]:
    """Yield runs of layers that share launches; within a run ``betas`` and ``eps`` are equal."""
    chunk: list[RoutedLayer] = []
    taken = 0
    for layer in layers:
        budget = _budget(layer, _CPU_CHUNK)
        same = chunk and all(chunk[0].group[key] == layer.group[key] for key in ("betas", "eps"))
        if chunk and (not same or taken + layer.numel > budget):
            yield chunk
            chunk, taken = [], 0
        chunk.append(layer)
        taken += layer.numel
    yield chunk


def _budget(layer: RoutedLayer, on_cpu: int) -> int:
    return on_cpu if layer.group["params"][0].device.type == "cpu" else _CHUNK


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
