"""EVA's initialisation: A spans the directions in which the training data varies most at each layer."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils.data import DataLoader

from molf.errors import MolfError

REDISTRIBUTION = 2.0
"""A layer's rank is at most this multiple of the mean rank, EVA's published setting."""

BATCH_TOKENS = 1024
"""Tokens of a batch of the decomposition, if the data has that many and the rank needs no more."""

MAX_BATCHES = 2000
"""Directions that have not converged after this many batches never will."""


def add_eva_adapter(model: nn.Module, arguments: Mapping[str, Any]) -> PeftModel:
    """Add the adapter that ``initialise_eva`` initialises.

    All tokens count, not only labels: answers alone often have fewer tokens than there are directions to find. With rsLoRA the
    scale already follows each layer's rank, so PEFT's adjustment of alpha, meant for alpha / r, is off.
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
        raise MolfError(
            f"lora_rank={rank} with method eva exceeds the inputs of a layer, {narrowest}; set lora_rank <= {narrowest}"
        )
    settings.rho = min(REDISTRIBUTION, narrowest / rank)
    return adapted


def initialise_eva(
    model: PeftModel,
    rows: Sequence[dict[str, Any]],
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
    seed: int,
) -> None:
    """Initialise the adapter from tokenised training rows, in an order by the seed, and give each layer its rank."""
    config = model.peft_config["default"]
    lengths = [len(row["input_ids"]) for row in rows]
    needed = round(config.r * config.eva_config.rho)  # a batch yields at most one direction per token
    if sum(lengths) < needed:
        raise MolfError(
            f"method eva with lora_rank={config.r} needs at least {needed} tokens of training data, but there are "
            f"{sum(lengths)}; lower lora_rank or use more data"
        )
    groups = _groups(lengths, min(sum(lengths), max(needed, BATCH_TOKENS)), seed)

    def model_inputs(batch: list[dict[str, Any]]) -> dict[str, Any]:
        return {name: value for name, value in collate(batch).items() if name in ("input_ids", "attention_mask")}

    done = count(1)

    def forward(model: nn.Module, inputs: dict[str, Any]) -> None:
        # PEFT repeats the data until the directions converge.
        if next(done) > MAX_BATCHES:
            raise MolfError(
                f"EVA's directions have not converged after {MAX_BATCHES} batches of training data; lower lora_rank or use "
                "more data"
            )
        model(**inputs)

    batches: Any = DataLoader(rows, batch_sampler=groups, collate_fn=model_inputs)  # type: ignore[arg-type]
    # Every process of a distributed run sees the same batches, so there is nothing to gather.
    initialize_lora_eva_weights(
        model, batches, forward_fn=forward, gather_distributed_inputs=False, show_progress_bar=False
    )


def _groups(lengths: Sequence[int], tokens: int, seed: int) -> list[list[int]]:
    """Group rows at random into batches of at least ``tokens`` tokens; there must be that many in total."""
    groups: list[list[int]] = []
    size = tokens
    for row in torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist():
        if size >= tokens:
            groups.append([])
            size = 0
        groups[-1].append(row)
        size += lengths[row]
    if size < tokens:
        rest = groups.pop()
        groups[-1] += rest
    return groups
