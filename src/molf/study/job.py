"""The parts of a run put together: model, tokenizer, rows, and the trainer that the method calls for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from torch import nn
from trl import SFTTrainer

from molf.discovery import routed_linears
from molf.integrations.routing_log import RoutingLog
from molf.integrations.trainer import trainer_optimizer
from molf.study.config import MethodConfig, RunConfig
from molf.study.models import load_model_and_tokenizer
from molf.study.recipe import Recipe, method_recipe
from molf.study.train_config import TrainConfig, build_train_config
from molf.tasks import Split, Task, get_task


@dataclass(frozen=True)
class Job:
    """What a run works on.

    Attributes:
        config: The resolved settings.
        model: The loaded model.
        tokenizer: Its tokenizer.
        task: The benchmark.
        split: Its rows.
    """

    config: RunConfig
    model: Any
    tokenizer: Any
    task: Task
    split: Split

    @property
    def eval_rows(self) -> list[dict[str, Any]]:
        """The rows to evaluate on."""
        return self.split.eval[: self.config.task.eval_limit]


def load_job(config: RunConfig) -> Job:
    """Load what a run works on.

    Raises:
        ValueError: The task, its data or the model is not to be had as named.
        OSError: Data or model cannot be read or fetched.
    """
    task = get_task(config.task.task)
    split = task.load(
        config.task.data_path, sample=config.task.sample, limit=config.task.limit, seed=int(config.train["seed"])
    )
    model, tokenizer = load_model_and_tokenizer(config.model, bool(config.train.get("trust_remote_code", False)))
    return Job(config, model, tokenizer, task, split)


def job_recipe(job: Job) -> Recipe:
    """Spell out the method of a run for its model."""
    linears = [name for name, module in job.model.named_modules() if isinstance(module, nn.Linear)]
    return method_recipe(job.config.method, job.config.train, linears)


def make_trainer(job: Job, recipe: Recipe, **settings: Any) -> SFTTrainer:
    """Make the stock SFT trainer that carries the method out.

    Args:
        job: What to train; its model is changed (frozen parts, adapters).
        recipe: The method.
        **settings: Trainer settings that win over all others.

    Raises:
        ValueError: A setting is unknown, or there is nothing to train.
    """
    args = build_train_config(job.config.train | recipe.train | settings)
    examples = [job.task.example(row) for row in job.split.train]
    if not examples:
        raise ValueError(f"the task {job.task.name} has no training rows in {job.split.origin}; nothing can be trained")
    if job.config.method.freeze_non_linear and recipe.lora is None:
        freeze_all_but_routed(job.model, job.config.method)
    trainer = SFTTrainer(
        model=job.model,
        args=args,
        train_dataset=Dataset.from_list(examples),
        processing_class=job.tokenizer,
        peft_config=None if recipe.lora is None else LoraConfig(**recipe.lora),
        optimizer_cls_and_kwargs=None if recipe.molf is None else trainer_optimizer(**recipe.molf),
    )
    if recipe.molf is not None:
        RoutingLog(args.output_dir).attach(trainer)
    return trainer


def training_settings(job: Job) -> TrainConfig:
    """Return the trainer's settings of a run that does not train."""
    return build_train_config(job.config.train)


def routed_layers(model: nn.Module, method: MethodConfig) -> dict[str, nn.Linear]:
    """Return the layers that MoLF routes, by name."""
    targets: str | Sequence[str] = method.target_modules
    return routed_linears(
        model, "all-linear" if method.target_modules == ["all-linear"] else targets, method.exclude_modules
    )


def freeze_all_but_routed(model: nn.Module, method: MethodConfig) -> None:
    """Leave nothing trainable but the weights of the routed layers: no norm, no embedding, no bias."""
    routed = {id(layer.weight) for layer in routed_layers(model, method).values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in routed)
