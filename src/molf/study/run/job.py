"""What a run works on (model, tokenizer, rows), and the trainer for its method."""

from dataclasses import dataclass, field, replace
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import TrainerCallback, set_seed
from trl import SFTTrainer

from molf.errors import MolfError
from molf.integrations.bundled import locate
from molf.integrations.routing_log import RoutingLog
from molf.integrations.whole_checkpoints import CheckpointPart, WholeCheckpoints
from molf.study.config.run_config import RunConfig, TaskConfig
from molf.study.config.trainer_config import TrainConfig, build_train_config, evaluates_in_training, trainer_errors
from molf.study.faults.preemption import StopRequest
from molf.study.faults.stop_at_step import StopAtStep
from molf.study.methods.adalora import AdaLoraAllocation
from molf.study.methods.adapters import add_adapters, optimizer_of
from molf.study.methods.checkpoint_parts import AdaLoraState, TrainedBase
from molf.study.methods.checkpoint_settings import CheckpointSettings, model_fingerprint
from molf.study.methods.eva import initialise_eva
from molf.study.methods.recipe import Recipe, method_recipe
from molf.study.methods.trainable import freeze_all_but_routed, rounded_steps, trained_base
from molf.study.run.model_limits import check_causal, check_evaluation_rows, check_training_rows
from molf.study.run.models import load_model_and_tokenizer, use_chat_template, use_end_token
from molf.study.run.process_group import from_rank_0
from molf.study.run.selection import load_split, validation_split
from molf.study.run.sharding import TrainedShards, check_processes, check_sharding
from molf.study.run.tracker_images import RoutingImages
from molf.study.run.training_data import CutTargets, tokenize_training_data
from molf.tasks import Row, Split, Task, get_task
from molf.tasks.custom import Custom
from molf.tasks.few_shot import with_examples
from molf.tasks.retention import background_texts


@dataclass(frozen=True)
class Job:
    """What a run works on."""

    config: RunConfig
    model: Any
    tokenizer: Any
    task: Task
    split: Split
    validation: list[Row] = field(default_factory=list)
    """The rows to evaluate on during training."""
    background: tuple[list[str], str] | None = None
    """Text to measure retention on and where it is from; None to leave that out."""

    @property
    def source(self) -> str:
        """Where the model was loaded from: a folder or a Hub id."""
        return locate(self.config.model.model_name_or_path)

    @property
    def examples(self) -> list[dict[str, Any]]:
        """The training examples, as ``SFTTrainer`` takes them."""
        return [self.task.example(row) for row in self.split.train]

    @property
    def eval_rows(self) -> list[dict[str, Any]]:
        """The rows to evaluate on."""
        return self.split.eval[: self.config.task.eval_limit]


def load_job(config: RunConfig) -> Job:
    """Load what a run works on."""
    validates = False
    if not config.output.only_eval:
        args = build_train_config(config.train)
        check_processes(args)
        validates = evaluates_in_training(args)
    if config.task.validation_limit is not None and not validates:
        raise MolfError(
            f"validation_limit={config.task.validation_limit} without evaluations during training: pass --eval_strategy steps or "
            "epoch too, or leave it out"
        )
    locate(config.model.model_name_or_path)  # fails before any data is fetched
    task = _task(config.task)
    seed = int(config.train["seed"])
    split = load_split(task, config.task, seed=seed)
    if config.task.few_shot:
        task, split = with_examples(task, split, config.task.few_shot, seed)
    split, validation = validation_split(split, config.task) if validates else (split, [])
    measured = config.task.retention and not config.output.only_eval
    background = background_texts(config.task.task, config.task.retention_path) if measured else None
    model, tokenizer = load_model_and_tokenizer(config.model, bool(config.train.get("trust_remote_code", False)))
    if not config.output.only_eval:
        _refuse_quantised(model, config)
    if template := config.train.get("chat_template_path"):
        use_chat_template(tokenizer, str(template))
    if token := config.train.get("eos_token"):
        use_end_token(tokenizer, str(token))
    return Job(config, model, tokenizer, task, split, validation, background)


def _refuse_quantised(model: Any, config: RunConfig) -> None:
    kind = getattr(model, "quantization_method", None)
    if kind is not None:
        raise MolfError(
            f"the weights of {config.model.model_name_or_path} are quantised ({getattr(kind, 'value', kind)}), but a run ends "
            "with a plain checkpoint, for which its adapters are merged into the weights: use the model's unquantised weights, "
            "or train its adapters in your own script (add_lora_experts, MoLF, export_peft)"
        )


def _task(config: TaskConfig) -> Task:
    task = get_task(config.task)
    if isinstance(task, Custom):
        return replace(
            task, eval_path=config.eval_path, eval_fraction=config.eval_fraction, train_split=config.train_split
        )
    for name in ("eval_path", "eval_fraction", "train_split"):
        if (value := getattr(config, name)) is not None:
            raise MolfError(f"{name}={value} is for the task custom; the task {task.name} has its own splits")
    return task


def job_recipe(job: Job) -> Recipe:
    """Return the recipe of a run's method for its model."""
    linears = [name for name, module in job.model.named_modules() if isinstance(module, nn.Linear)]
    return method_recipe(job.config.method, job.config.train, linears)


class StudyTrainer(WholeCheckpoints, SFTTrainer):  # type: ignore[misc]  # TRL is not typed
    """TRL's SFT trainer with complete checkpoints."""

    cut: CutTargets
    """What ``max_length`` cuts off the training data."""

    warnings: list[str]
    """What of the data is cut off, and of the steps rounded away, in words."""


def make_trainer(job: Job, recipe: Recipe, stop: StopRequest | None = None, **settings: Any) -> StudyTrainer:
    """Build the trainer for a method.

    Args:
        job: What to train; its model is changed in place (frozen weights, adapters).
        recipe: The method.
        stop: Stop the training when this says so.
        **settings: Trainer settings that override all others.
    """
    examples = job.examples
    if not examples:
        raise MolfError(f"the task {job.task.name} has no training rows in {job.split.origin}")
    conversations = "messages" in examples[0]
    args = build_train_config({"assistant_only_loss": conversations} | job.config.train | recipe.train | settings)
    if args.gradient_checkpointing and not job.model.supports_gradient_checkpointing:
        raise MolfError(
            f"{type(job.model).__name__} does not support gradient checkpointing, which runs use by default: pass "
            "--gradient_checkpointing False"
        )
    rows, cut = tokenize_training_data(job.tokenizer, examples, args)
    held_out = None
    if job.validation:
        held_out, _ = tokenize_training_data(job.tokenizer, [job.task.example(row) for row in job.validation], args)
    from_rank_0(lambda: _check_rows(job, rows, held_out, args))
    base, template = model_fingerprint(job.model), job.tokenizer.chat_template
    set_seed(args.seed)  # adapters start at random, and the trainer sets its seed later
    method = job.config.method
    if method.freeze_non_linear and not recipe.adapted:
        freeze_all_but_routed(job.model, method)
    model = add_adapters(job.model, recipe, freeze_rest=bool(method.freeze_non_linear))
    asked = args.assistant_only_loss
    if conversations:
        args.assistant_only_loss = False  # the labels say it already, and TRL would look for conversations
    args.chat_template_path = None  # the tokenizer has it; TRL would also add another one's tokens, with random weights
    callbacks: list[TrainerCallback] = [] if recipe.adalora is None else [AdaLoraAllocation()]
    callbacks += [] if stop is None else [StopAtStep(stop)]
    with trainer_errors():
        trainer = StudyTrainer(
            model=model,
            args=args,
            train_dataset=rows,
            eval_dataset=held_out,
            processing_class=job.tokenizer,
            callbacks=callbacks,
            optimizer_cls_and_kwargs=optimizer_of(recipe),
        )
    for kind, given, left in (
        ("training", examples, trainer.train_dataset),
        ("validation", job.validation, trainer.eval_dataset),
    ):
        if given and not len(left):
            raise MolfError(
                f"max_length={args.max_length} leaves no target of the {len(given)} {kind} rows: give a larger --max_length"
            )
    args.assistant_only_loss = asked
    trainer.cut = cut
    trainer.warnings = cut.warnings() + ([] if recipe.molf is not None else rounded_steps(trainer.model))
    check_sharding(trainer, recipe)
    own = CheckpointSettings(job.config, args, examples, sharded=trainer.is_fsdp_enabled, base=base, template=template)
    trainer.parts = [own, *_checkpoint_parts(recipe, trainer)]
    if recipe.molf is not None:
        log = RoutingLog(args.output_dir, method.routing_log_every, method.routing_log).attach(trainer)
        RoutingImages(log).attach(trainer)
    if recipe.lora is not None and recipe.lora.get("init_lora_weights") == "eva":
        initialise_eva(trainer.model, trainer.train_dataset, trainer.data_collator, seed=args.seed)
    return trainer


def _check_rows(job: Job, rows: Dataset, held_out: Dataset | None, args: TrainConfig) -> None:
    """Check that the model can take all rows, now rather than in some step or after the training."""
    check_evaluation(job)
    check_training_rows(job.model, job.tokenizer, rows, args)
    if held_out is not None:
        check_training_rows(job.model, job.tokenizer, held_out, args, kind="validation")


def check_evaluation(job: Job) -> None:
    """Check that the model can be evaluated on all rows."""
    check_causal(job.model)
    check_evaluation_rows(job.model, job.tokenizer, job.task, job.eval_rows)


def _checkpoint_parts(recipe: Recipe, trainer: StudyTrainer) -> list[CheckpointPart]:
    """Return the parts of the model that the Trainer does not save."""
    if recipe.adalora is not None:
        return [AdaLoraState()]
    if recipe.adapted and trainer.is_fsdp_enabled:
        return [TrainedShards()]
    return [TrainedBase()] if recipe.adapted and trained_base(trainer.model) else []
