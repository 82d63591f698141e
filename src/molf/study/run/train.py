"""A run from its configuration to its result: train, save a plain checkpoint, evaluate, record."""

import logging
import os
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from molf.errors import MolfError
from molf.integrations.checkpoint_folder import global_step, remove_checkpoints
from molf.integrations.merge import merge
from molf.study.config.run_config import RunConfig
from molf.study.config.trainer_config import build_train_config
from molf.study.config.unread import check_read
from molf.study.engine.evaluate import Evaluation, evaluate
from molf.study.engine.generation import end_tokens
from molf.study.engine.predictions import PREDICTIONS_BEFORE_FILE, write_predictions
from molf.study.engine.vllm_generation import VllmGenerator, require_vllm
from molf.study.faults.preemption import Preempted, StopRequest, stop_request
from molf.study.faults.run_lock import run_lock
from molf.study.faults.trained import Trained, find_trained, forget_trained, note_trained
from molf.study.methods.adapters import ADAPTERS_FOLDER, save_adapters
from molf.study.methods.recipe import Recipe
from molf.study.methods.trainable import lora_pairs, trained_base
from molf.study.results.history import write_history
from molf.study.results.result import Result, Training, read_result
from molf.study.results.tables import draw_log
from molf.study.run.job import Job, StudyTrainer, check_evaluation, job_recipe, load_job, make_trainer
from molf.study.run.models import load_model_and_tokenizer
from molf.study.run.process_group import all_wait, leave_process_group, true_on_all_ranks
from molf.study.run.record import Start, make_result, write_record
from molf.study.run.retention import BaseReading, measure, read_base
from molf.study.run.run_folder import check_folder, clear_folder, finished_result, report_full_disk, run_id
from molf.study.run.sharding import whole_model
from molf.study.sizing.parameters import base_count, count_parameters

_log = logging.getLogger(__name__)


def run(config: RunConfig) -> Result | None:
    """Carry out a run and leave everything about it in its folder.

    The folder becomes a plain ``transformers`` checkpoint (LoRA merged), with ``result.json``, ``predictions.jsonl.gz``,
    ``config.yaml``, a model card, and for MoLF the routing log and its picture. If ``$LOG_FILE`` is set, it gets a CSV row.

    Args:
        config: The run.

    Returns:
        The result, or None on all ranks but 0 of a distributed run.

    Raises:
        MolfError: A setting, the data, the model, the folder or the disk does not allow the run.
        Preempted: A signal asked the process to stop. In training, a checkpoint was saved first; after it, the model.
    """
    config = config.resolved()
    done = check_start(config)
    with run_lock(config.output_dir), report_full_disk(config.output_dir), stop_request() as stop:
        if done is not None:
            _log.warning("%s holds this run, finished: nothing is left to do", config.output_dir)
            if os.environ.get("RANK", "0") == "0" and not config.output.only_eval:
                _tidy(config)
            return done
        return _evaluate_only(config) if config.output.only_eval else _train_and_evaluate(config, stop)


def check_start(config: RunConfig) -> Result | None:
    """Check what can be checked before anything is loaded, and return the result of this very run if it is finished."""
    check_read(config)
    if (done := finished_result(config)) is None:
        check_folder(config)
        if config.task.generation_backend == "vllm":
            require_vllm()
    return done


def _train_and_evaluate(config: RunConfig, stop: StopRequest) -> Result | None:
    start = Start()
    job = load_job(config)
    outcome = _train(job, stop)
    job = replace(job, model=outcome.model)  # frees what only the trainer needed: its optimizer, wrappers, shards
    stop.deferred = False
    if not true_on_all_ranks(stop.received is None):
        leave_process_group()
        signal = stop.received or "a signal to another process"
        raise Preempted(
            f"stopped by {signal} after {outcome.done}; start it again with --resume_from_checkpoint True to resume from there"
        )
    routed = outcome.main and config.method.routes  # drawn before the evaluation, which may take long
    routing = draw_log(config.output_dir, config.run_name) if routed else None
    after = _evaluate_on_ranks(job, outcome.main, outcome.device, str(config.output_dir))
    if outcome.trained is None or after is None or not outcome.main:
        return None
    retention = measure(job, outcome.model, outcome.device, outcome.base)
    result = make_result(job, start, after, outcome.trained, retention, routing)
    write_record(config, result, after)
    _tidy(config)
    return result


def _tidy(config: RunConfig) -> None:
    """Remove what a finished run does not need, also if an earlier start was killed here."""
    forget_trained(config)
    if config.output.clean_ckpt_at_end:
        remove_checkpoints(config.output_dir)


@dataclass(frozen=True)
class _Outcome:
    """What training leaves on a rank once the trainer is gone."""

    main: bool  # whether this is rank 0
    device: torch.device
    done: str  # how far training came, in words
    trained: Trained | None  # None if it was stopped
    model: Any  # plain and trained; None on ranks that do not have it
    base: BaseReading | None  # what the base model said, on rank 0


def _train(job: Job, stop: StopRequest) -> _Outcome:
    config = job.config
    recipe = job_recipe(job)
    own = [_own_settings(model_config) for model_config in _configs(job.model)]  # the trainer changes some for good
    trainer = make_trainer(job, recipe, stop)
    main, device, sharded = trainer.is_world_process_zero(), trainer.args.device, trainer.is_fsdp_enabled
    base = read_base(job, trainer)
    if (trained := find_trained(config, main)) is not None:
        here = main or (not sharded and (config.output_dir / "config.json").is_file())
        return _Outcome(main, device, "training", trained, _load_saved(config) if here else None, base)
    checkpoint = trainer.find_checkpoint(config.resume_from)
    if main:
        run_id(config.output_dir)  # fixed while the result of a replaced run is still there
        forget_trained(config)
    if main and checkpoint is None:
        clear_folder(config.output_dir, aside=not config.resume_from)
    before = _evaluate_before(job, trainer) if config.task.eval_before else None
    if main and before is not None:
        write_predictions(config.output_dir / PREDICTIONS_BEFORE_FILE, before.predictions)
    stop.deferred = True  # until the trained model is on disk
    training = _fit(trainer, job, recipe, checkpoint)
    done = f"step {training.steps} of {trainer.state.max_steps}"
    if stop.received is not None and training.steps < trainer.state.max_steps:
        return _Outcome(main, device, done, None, None, base)
    trained = Trained(training, before.metrics if before else None)
    model: Any = whole_model(trainer, config, recipe) if sharded else trainer.accelerator.unwrap_model(trainer.model)
    with all_wait():
        if model is not None:
            if main and recipe.experts is not None and not trained_base(model):
                save_adapters(
                    model, config.output_dir / ADAPTERS_FOLDER
                )  # while they can still be exported as one adapter
            model = merge(model)
            for model_config, settings in zip(_configs(model), own, strict=True):
                model_config.update(settings)
        if main:
            save_checkpoint(model, job.tokenizer, config.output_dir)
            write_history(config.output_dir, trainer.state)
            note_trained(config, trained)
    return _Outcome(main, device, done, trained, model, base)


def _configs(model: Any) -> list[Any]:
    return [model.config, model.config.get_text_config()]


def _own_settings(model_config: Any) -> dict[str, Any]:
    """Return the model's settings that TRL changes for its training."""
    changed = ("use_cache", "output_router_logits", "router_aux_loss_coef")
    return {name: getattr(model_config, name) for name in changed if hasattr(model_config, name)}


def save_checkpoint(model: Any, tokenizer: Any, folder: Path) -> None:
    """Save a checkpoint that plain ``from_pretrained`` loads."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _load_saved(config: RunConfig) -> Any:
    source = replace(config.model, model_name_or_path=str(config.output_dir))
    return load_model_and_tokenizer(source, bool(config.train.get("trust_remote_code", False)))[0]


def _fit(trainer: StudyTrainer, job: Job, recipe: Recipe, checkpoint: Path | None) -> Training:
    parameters = count_parameters(trainer.model, lora_pairs(trainer.model, job.config.method) if recipe.merged else 0)
    base = base_count(parameters)
    if trainer.is_world_process_zero():
        for warning in trainer.warnings:
            _log.warning(warning)
    since = 0 if checkpoint is None else global_step(checkpoint)  # which may be gone after the training
    outcome = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if outcome.global_step == since and (earlier := _measured(trainer.args.output_dir)) and earlier.steps == since:
        return earlier
    seconds = float(outcome.metrics["train_runtime"])
    tokens = _tokens(trainer.state.log_history, since)
    return Training(
        steps=outcome.global_step,
        seconds=seconds,
        loss=outcome.training_loss,
        tokens=tokens,
        tokens_per_second=tokens / seconds if tokens and seconds else None,
        parameters=base.total,
        trainable_parameters=base.trainable,
        lora_parameters=parameters["LoRA"].trainable,
        dropped_examples=trainer.cut.dropped,
        truncated_examples=trainer.cut.truncated,
        processes=trainer.args.world_size,
        best_step=trainer.state.best_global_step if trainer.args.load_best_model_at_end else None,
        validation_loss=_validation_loss(trainer),
    )


def _measured(folder: str) -> Training | None:
    """Return the measurements of the finished training in a folder: a start that takes no step has none of its own."""
    with suppress(MolfError):
        return read_result(Path(folder)).training
    return None


def _tokens(log_history: list[dict[str, Any]], since: int) -> int | None:
    """Return how many tokens this start trained on: TRL counts from 0 at every start, and a checkpoint brings its old log.

    An evaluation logs the same counter under a name of its own, and after it nothing else does until the next step.
    """
    names = ("num_tokens", "eval_num_tokens")
    counts = [entry[name] for entry in log_history for name in names if name in entry and entry["step"] > since]
    return int(max(counts)) if counts else None


def _validation_loss(trainer: StudyTrainer) -> float | None:
    """Return the loss on the held-out rows: the best one if its weights are kept, else the last one."""
    if trainer.args.load_best_model_at_end:
        best: float | None = trainer.state.best_metric
        return best
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return losses[-1] if losses else None


def _evaluate_only(config: RunConfig) -> Result | None:
    start = Start()
    job = load_job(config)
    args = build_train_config(config.train)
    main, device = args.process_index == 0, args.device
    check_evaluation(job)
    evaluation = _evaluate_on_ranks(job, main, device, job.source)
    if evaluation is None or not main:
        return None
    result = make_result(job, start, evaluation)
    write_record(config, result, evaluation)
    return result


def _evaluate_before(job: Job, trainer: StudyTrainer) -> Evaluation | None:
    """Evaluate the model before training on all ranks; the Trainer shards it, or moves it to its device, later."""
    evaluation = None
    with all_wait():
        if _ranks_share(job) or trainer.is_world_process_zero():
            place = trainer.model.device
            evaluation = _evaluate(job, trainer.model.to(trainer.args.device), job.source, shard=_ranks_share(job))
            trainer.model.to(place)
    return evaluation


def _evaluate_on_ranks(job: Job, main: bool, device: torch.device, source: str) -> Evaluation | None:
    """Evaluate on all ranks if all have the model, otherwise on rank 0 alone (None elsewhere), and leave the group."""
    shard = true_on_all_ranks(job.model is not None and _ranks_share(job))
    if not shard:
        leave_process_group()
    if not (shard or main):
        return None
    evaluation = _evaluate(job, job.model.to(device), source, shard)
    leave_process_group()
    return evaluation


def _ranks_share(job: Job) -> bool:
    """Say whether ranks can share an evaluation: vLLM does not run inside another process group."""
    return job.config.task.generation_backend == "transformers"


def _evaluate(job: Job, model: Any, source: str, shard: bool) -> Evaluation:
    """Evaluate a model that is also saved as ``source``, a folder or a Hub id."""
    config = job.config
    progress = not config.train.get("disable_tqdm", False)
    generate = None
    if config.task.generation_backend == "vllm":
        generate = VllmGenerator(source, job.tokenizer, end_tokens(model, job.tokenizer), config.model.dtype, progress)
    return evaluate(
        model,
        job.tokenizer,
        job.task,
        job.eval_rows,
        batch_tokens=config.task.eval_batch_tokens,
        progress=progress,
        generate=generate,
        shard=shard,
    )
