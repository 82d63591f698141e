"""Recipes: a static allocation from the routing of a run, or of a short probe of a fresh model."""

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoConfig

from molf.errors import MolfError
from molf.integrations.loading import explained
from molf.integrations.lora_targets import find_targets
from molf.integrations.routing_lines import find_log
from molf.study.config.method_config import MethodConfig
from molf.study.config.run_config import RunConfig
from molf.study.methods.recipe_file import RecipeFile, check_recipe_folder, write_recipe
from molf.study.methods.static import parameters_of
from molf.study.results.result import folder_of, read_result
from molf.study.results.routing import RoutingSummary
from molf.study.results.routing_reader import read_routing
from molf.study.run.allocation import (
    Allocation,
    Evidence,
    Layer,
    Rule,
    allocate,
    by_kind,
    evidence_of,
    ranks_within,
    shuffled,
)
from molf.study.run.job import Job, StudyTrainer, job_recipe, load_job, make_trainer
from molf.study.sizing.blueprint import empty_model

_BY_ROUTING: tuple[Rule, ...] = ("routing", "random", "kind")  # the other rules do not read the winners
_PEFT = "base_model.model."  # what PEFT puts before the names of a model's layers


@dataclass(frozen=True)
class Request:
    """What recipe to make.

    Attributes:
        budget: Trainable parameters: a number, or a share of the model's such as ``10%``.
        rule: How to allocate them.
        draw: Seed of the random rule, and of the order of layers in which full fine-tuning won equally often.
    """

    budget: str = "10%"
    rule: Rule = "routing"
    draw: int = 0


def recipe_from_run(run: Path, request: Request, folder: Path) -> RecipeFile:
    """Write the recipe of a finished run into a folder, and return it.

    Raises:
        MolfError: The run is not finished, has no routing log or one that decided nothing, or its model cannot be read; the
            budget is none.
    """
    run = folder_of(run)
    result = read_result(run)
    if (log := find_log(run)) is None:
        raise MolfError(f"{run} has no routing log: make recipes from a run with method molf or molf_e")
    config = RunConfig.from_dict(result.config)
    with explained(f"cannot load the configuration of the model in {run}", str(run)):
        trust = bool(config.train.get("trust_remote_code", False))
        model = empty_model(AutoConfig.from_pretrained(run, trust_remote_code=trust))
    return _write(model, read_routing(log), config, request, folder, f"the routing of {run}")


def recipe_from_probe(config: RunConfig, steps: int, request: Request, folder: Path) -> RecipeFile:
    """Train a fresh model for some steps, write the recipe of this run into a folder, and return it; the model is not kept.

    Raises:
        MolfError: The method does not route, a setting does not allow the run, or the budget is none.
    """
    if not config.method.routes:
        raise MolfError(f"a probe with method {config.method.method}, which does not route: use molf or molf_e")
    if steps < 1:
        raise MolfError(f"probe_steps={steps} must be at least 1")
    check_recipe_folder(folder)  # before the training
    with tempfile.TemporaryDirectory() as scratch:
        job, trainer = _prepared(config, scratch, max_steps=steps)
        trainer.train()
        log = find_log(Path(scratch))
        assert log is not None, "RoutingLog has written it"
        model = empty_model(job.model.config)
        return _write(model, read_routing(log), config, request, folder, f"a probe of {steps} steps")


def _prepared(config: RunConfig, scratch: str, **settings: Any) -> tuple[Job, StudyTrainer]:
    """Return a job of a configuration and its trainer, which writes nothing but into a scratch folder."""
    method = replace(config.method, routing_log_every=1, routing_log="compact")
    task = replace(config.task, retention=False, retention_path=None, eval_before=False)
    quiet = {"output_dir": scratch, "save_strategy": "no", "report_to": "none", "push_to_hub": False}
    job = load_job(replace(config, method=method, task=task, train=config.train | quiet))
    return job, make_trainer(job, job_recipe(job), **settings)


def _write(
    model: nn.Module, routing: RoutingSummary, config: RunConfig, request: Request, folder: Path, source: str
) -> RecipeFile:
    if request.rule in _BY_ROUTING and not routing.bins.scores.any():
        raise MolfError(
            f"{source} decided nothing: every score is 0, as of gradients of zero, or in older logs where warm-ups start; take "
            "more steps, or --allocation uniform or eva"
        )
    evidence = {name.removeprefix(_PEFT): own for name, own in evidence_of(routing.by_module).items()}
    layers = layers_of(model, list(evidence))
    budget = parse_budget(request.budget, sum(p.numel() for p in model.parameters()))
    allocation = _allocation(evidence, layers, budget, config, request)
    seeded = f", draw {request.draw}" if request.rule == "random" else ""
    recipe = RecipeFile(
        allocation=request.rule + seeded,
        source=source,
        budget=budget,
        trainable=allocation.cost(layers),
        whole=list(allocation.whole),
        ranks=allocation.ranks,
    )
    write_recipe(folder, recipe, [name for name, _ in model.named_parameters()])
    return recipe


def _allocation(
    evidence: Mapping[str, Evidence], layers: Mapping[str, Layer], budget: int, config: RunConfig, request: Request
) -> Allocation:
    if request.rule == "uniform":
        return Allocation((), ranks_within(dict.fromkeys(evidence, 1.0), layers, budget))
    if request.rule == "eva":
        return Allocation((), ranks_within(_eva_ranks(config, layers, budget), layers, budget))
    if request.rule == "kind":
        evidence = by_kind(evidence)
    elif request.rule == "random":
        evidence = shuffled(evidence, request.draw)
    return allocate(evidence, layers, budget, request.draw)


def _eva_ranks(config: RunConfig, layers: Mapping[str, Layer], budget: int) -> dict[str, float]:
    """Return the ranks that EVA gives the layers from the run's training data, at the mean rank that the budget allows."""
    adapted = {name: layer for name, layer in layers.items() if layer.per_rank}
    narrowest = min(layer.most for layer in adapted.values())
    rank = min(narrowest, max(1, budget // sum(layer.per_rank for layer in adapted.values())))
    method = MethodConfig(method="eva", lora_rank=rank, target_modules=list(adapted), exclude_modules=[])
    with tempfile.TemporaryDirectory() as scratch:
        _, trainer = _prepared(replace(config, method=method), scratch)
        modules = {name.removeprefix(_PEFT): module for name, module in trainer.model.named_modules()}
    # EVA leaves layers out, too.
    return {name: modules[name].r["default"] if isinstance(modules.get(name), LoraLayer) else 0.0 for name in layers}


def layers_of(model: nn.Module, names: Sequence[str]) -> dict[str, Layer]:
    """Return what layers cost, by name; LoRA adapts linear layers, and no stacks of experts."""
    fit = set(find_targets(model, "all-linear", (), stacks=False).modules)
    found = {}
    for name, parameters in parameters_of(model, names).items():
        whole = sum(p.numel() for p in parameters)
        if name in fit:
            out, inputs = model.get_submodule(name).get_parameter("weight").shape
            found[name] = Layer(whole, out + inputs, max(1, out * inputs // (out + inputs)))
        else:
            found[name] = Layer(whole, 0, 0)
    return found


def parse_budget(text: str, total: int) -> int:
    """Return a budget in parameters, given as their number or as a share such as ``10%`` of all.

    Raises:
        MolfError: It is neither, or not between 1 and all parameters.
    """
    try:
        share = text.endswith("%")
        value = float(text.removesuffix("%")) * (total / 100 if share else 1)
        budget = math.floor(value)
    except (ValueError, OverflowError) as error:
        raise MolfError(f"budget={text} is neither a number of parameters nor a share such as 10%") from error
    if not 1 <= budget <= total:
        raise MolfError(f"budget={text} is {budget:,} parameters; choose between 1 and all {total:,} of the model")
    return budget
