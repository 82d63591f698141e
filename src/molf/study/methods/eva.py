"""EVA's start: A spans the directions in which the training data varies most at each layer."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils.data import DataLoader

REDISTRIBUTION = 2.0
"""A layer gets at most this many times the mean rank, EVA's published setting."""

BATCH_TOKENS = 1024
"""Tokens of a step of the decomposition, where the data has as many and the rank does not need more."""

MAX_BATCHES = 2000
"""The directions have long settled by then, or never will."""


def add_eva_adapter(model: nn.Module, arguments: Mapping[str, Any]) -> PeftModel:
    """Give a model the adapter that ``initialise_eva`` needs.

    All tokens count, prompts too: answers alone are often fewer than the directions to be found. Where the scale follows each
    layer's own rank (rsLoRA), PEFT's adjustment of alpha, which is meant for alpha / r, would be one too many.

    Args:
        model: A plain model; it is changed in place.
        arguments: Arguments of ``peft.LoraConfig``.

    Raises:
        ValueError: The rank exceeds the inputs of a layer.
    """
    settings = EvaConfig(
        rho=REDISTRIBUTION, use_label_mask=False, adjust_scaling_factors=not arguments.get("use_rslora", False)
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "lora with eva initialization used with low_cpu_mem_usage=False")
        adapted = get_peft_model(model, LoraConfig(**arguments, eva_config=settings))
    rank = int(arguments["r"])
    narrowest = min(module.in_features for module in adapted.modules() if isinstance(module, LoraLayer))
    if rank > narrowest:
        raise ValueError(
            f"lora_rank={rank} with method eva exceeds the inputs of a layer, {narrowest}; give at most that"
        )
    settings.rho = min(REDISTRIBUTION, narrowest / rank)
    return adapted


def initialise_eva(
    model: PeftModel,
    rows: Sequence[dict[str, Any]],
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
    seed: int,
) -> None:
    """Compute EVA's start from training data and give the layers their ranks.

    Args:
        model: What ``add_eva_adapter`` returned.
        rows: Tokenised training rows with ``input_ids``.
        collate: Makes a batch of rows.
        seed: Decides the order of the rows.

    Raises:
        ValueError: There is too little data for the rank.
    """
    config = model.peft_config["default"]
    lengths = [len(row["input_ids"]) for row in rows]
    needed = round(config.r * config.eva_config.rho)  # a step finds no more directions than it has tokens
    if sum(lengths) < needed:
        raise ValueError(
            f"method eva needs at least {needed} tokens of training data for its rank, but there are {sum(lengths)}: lower "
            "lora_rank or use more data"
        )
    groups = _groups(lengths, min(sum(lengths), max(needed, BATCH_TOKENS)), seed)

    def model_inputs(batch: list[dict[str, Any]]) -> dict[str, Any]:
        return {name: value for name, value in collate(batch).items() if name in ("input_ids", "attention_mask")}

    batches: Any = DataLoader(rows, batch_sampler=groups, collate_fn=model_inputs)  # type: ignore[arg-type]
    # Every process of a distributed run sees the same batches, so there is nothing to gather.
    initialize_lora_eva_weights(
        model, batches, forward_fn=_bounded_forward(), gather_distributed_inputs=False, show_progress_bar=False
    )


def _groups(lengths: Sequence[int], tokens: int, seed: int) -> list[list[int]]:
    """Group rows at random so that each group has at least ``tokens`` tokens, which all together have."""
    groups: list[list[int]] = [[]]
    for row in torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist():
        if _tokens(lengths, groups[-1]) >= tokens:
            groups.append([])
        groups[-1].append(row)
    if _tokens(lengths, groups[-1]) < tokens:
        rest = groups.pop()
        groups[-1] += rest
    return groups


def _tokens(lengths: Sequence[int], group: Sequence[int]) -> int:
    return sum(lengths[row] for row in group)


def _bounded_forward() -> Callable[[nn.Module, dict[str, Any]], None]:
    """Return a forward pass that gives up, since PEFT goes round the data until the directions settle."""
    batches = iter(range(MAX_BATCHES))

    def forward(model: nn.Module, inputs: dict[str, Any]) -> None:
        if next(batches, None) is None:
            raise ValueError(
                f"EVA's directions have not settled after {MAX_BATCHES} batches of training data: lower lora_rank or use "
                "more data"
            )
        model(**inputs)

    return forward
