"""A run from its configuration to its result: train, leave a plain checkpoint, evaluate, write everything down."""

import logging
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from molf.files import atomic_write
from molf.integrations.checkpoint_folder import remove_checkpoints
from molf.integrations.routing_log import FILE_NAME as ROUTING_FILE
from molf.study.config.run_config import RunConfig
from molf.study.engine.evaluate import Evaluation, evaluate
from molf.study.engine.generation import end_tokens
from molf.study.engine.predictions import PREDICTIONS_FILE, write_predictions
from molf.study.engine.vllm_generation import VllmGenerator, require_vllm
from molf.study.faults.preemption import Preempted, StopRequest, stop_request
from molf.study.faults.run_lock import run_lock
from molf.study.faults.trained import Trained, find_trained, forget_trained, load_trained, note_trained
from molf.study.methods.adapters import ADAPTERS_FOLDER, save_adapters
from molf.study.methods.recipe import Recipe
from molf.study.methods.trainable import routed_layers, trained_base
from molf.study.results.csv_log import append_csv
from molf.study.results.environment import device_name, library_versions, peak_memory_bytes, source_commit
from molf.study.results.result import Result, Training, write_result
from molf.study.results.routing import read_routing
from molf.study.results.tables import draw_routing
from molf.study.run.card import model_card
from molf.study.run.job import Job, job_recipe, load_job, make_trainer, training_settings
from molf.study.run.process_group import all_wait, leave_process_group
from molf.study.run.run_folder import (
    CARD_FILE,
    CONFIG_FILE,
    PICTURE_FILE,
    RUN_ID_FILE,
    check_folder,
    clear_folder,
    run_id,
)
from molf.study.run.sharding import whole_model
from molf.study.run.training_data import cut_targets
from molf.study.sizing.sizes import measure

_log = logging.getLogger(__name__)


def run(config: RunConfig) -> Result | None:
    """Carry out a run and leave everything about it in its folder.

    The folder becomes a plain ``transformers`` checkpoint (LoRA merged), with ``result.json``, ``predictions.jsonl.gz``,
    ``config.yaml``, a model card, and for MoLF the routing log and its picture. ``$LOG_FILE`` gets a CSV row where it is set.

    Args:
        config: The run.

    Returns:
        The result, or None on all but the main process of a distributed run.

    Raises:
        ValueError: The settings do not make a run; or the folder holds one, finished or not, that is neither to be replaced nor
            to be gone on with; or another run works in it.
        OSError: Data or model cannot be had, or a file not be written.
        Preempted: The process was asked to stop. In training, the step was finished and a checkpoint saved; after it, the model.
    """
    config = config.resolved()
    check_folder(config)
    with run_lock(config.output_dir), stop_request() as stop:
        return _run(config, stop)


def _run(config: RunConfig, stop: StopRequest) -> Result | None:
    started = time.perf_counter()
    if config.task.generation_backend == "vllm":
        require_vllm()
    if config.output.only_eval:
        return _evaluate_only(config, started)
    job = load_job(config)
    outcome = _train(job, stop)
    job = replace(job, model=outcome.model)  # nothing holds the trainer, its optimizer or shards any more
    leave_process_group()
    stop.deferred = False
    if stop.received is not None:
        raise Preempted(
            f"stopped by {stop.received} after {outcome.done}; start it again with --resume_from_checkpoint True to go on "
            "from there"
        )
    if outcome.trained is None or job.model is None:
        return None
    after = _evaluate(job, job.model.to(outcome.device), str(config.output_dir))
    result = _result(job, started, after, outcome.trained)
    _write_all(job, result, after)
    forget_trained(config)
    if config.output.clean_ckpt_at_end:
        remove_checkpoints(config.output_dir)
    return result


@dataclass(frozen=True)
class _Outcome:
    """What is left of training when the trainer is gone.

    Attributes:
        device: Of this process.
        done: How far it came, in words.
        trained: What is known of it; None if it was stopped.
        model: The plain model, which is saved; None where another process evaluates it.
    """

    device: torch.device
    done: str
    trained: Trained | None
    model: Any


def _train(job: Job, stop: StopRequest) -> _Outcome:
    config = job.config
    recipe = job_recipe(job)
    use_cache = job.model.config.use_cache  # the trainer switches it off for good
    trainer = make_trainer(job, recipe, stop)
    main, device = trainer.is_world_process_zero(), trainer.args.device
    if (trained := find_trained(config, main)) is not None:
        return _Outcome(device, "training", trained, load_trained(config) if main else None)
    checkpoint = trainer.find_checkpoint(config.resume_from)
    if main:
        run_id(config.output_dir)  # settled while the result is there of what is replaced
        forget_trained(config)
    if main and checkpoint is None:
        clear_folder(config.output_dir)
    before = _evaluate_before(job, trainer) if config.task.eval_before else None
    stop.deferred = True  # until the trained model is on the disk
    training = _fit(trainer, job, recipe, checkpoint)
    done = f"step {training.steps} of {trainer.state.max_steps}"
    if stop.received is not None and training.steps < trainer.state.max_steps:
        return _Outcome(device, done, None, None)
    trained = Trained(training, before.metrics if before else None)
    sharded = trainer.is_fsdp_enabled
    model = whole_model(trainer, config, recipe) if sharded else trainer.accelerator.unwrap_model(trainer.model)
    with all_wait():
        if main:
            model = _plain_model(model, recipe, config.output_dir)
            model.config.use_cache = use_cache
            save_checkpoint(model, job.tokenizer, config.output_dir)
            note_trained(config, trained)
    return _Outcome(device, done, trained, model if main else None)


def save_checkpoint(model: Any, tokenizer: Any, folder: Path) -> None:
    """Save a checkpoint that plain ``from_pretrained`` loads."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _fit(trainer: Any, job: Job, recipe: Recipe, checkpoint: Path | None) -> Training:
    layers = routed_layers(trainer.model, job.config.method).values() if recipe.merged else ()
    method = job.config.method
    sizes = measure(trainer.model, layers, method.ranks or (), method.optim_bits, method.optimizer_in_backward)
    cut = cut_targets(job.tokenizer, job.examples, trainer.args)
    if trainer.is_world_process_zero():
        for warning in cut.warnings():
            _log.warning(warning)
    outcome = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    counts = [entry["num_tokens"] for entry in trainer.state.log_history if "num_tokens" in entry]
    seconds = float(outcome.metrics["train_runtime"])
    tokens = int(max(counts)) if counts else None
    return Training(
        steps=outcome.global_step,
        seconds=seconds,
        loss=outcome.training_loss,
        tokens=tokens,
        tokens_per_second=tokens / seconds if tokens and seconds else None,
        parameters=sizes.parameters,
        trainable_parameters=sizes.trainable,
        lora_parameters=sizes.lora,
        dropped_examples=cut.dropped,
        truncated_examples=cut.truncated,
        processes=trainer.args.world_size,
    )


def _plain_model(model: Any, recipe: Recipe, folder: Path) -> Any:
    """Return the trained model with its adapters merged into the weights.

    MoLF-Efficient's experts are saved first, as they can still be exported as one adapter then. Where more was trained than
    experts, they would not be what was trained.
    """
    if recipe.experts is not None and not trained_base(model):
        save_adapters(model, folder / ADAPTERS_FOLDER)
    return model.merge_and_unload() if recipe.adapted else model


def _evaluate_only(config: RunConfig, started: float) -> Result | None:
    job = load_job(config)
    args = training_settings(job)
    main, device = args.process_index == 0, args.device
    leave_process_group()
    if not main:
        return None
    evaluation = _evaluate(job, job.model.to(device), job.source)
    result = _result(job, started, evaluation)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    write_predictions(config.output_dir / PREDICTIONS_FILE, evaluation.predictions)
    _record(config, result)
    return result


def _evaluate_before(job: Job, trainer: Any) -> Evaluation | None:
    """Evaluate what is to be trained on the first process; the Trainer leaves it on the CPU until it is sharded."""
    evaluation = None
    with all_wait():
        if trainer.is_world_process_zero():
            place = trainer.model.device
            evaluation = _evaluate(job, trainer.model.to(trainer.args.device), job.source)
            trainer.model.to(place)
    return evaluation


def _evaluate(job: Job, model: Any, source: str) -> Evaluation:
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
    )


def _result(job: Job, started: float, after: Evaluation, trained: Trained | None = None) -> Result:
    log = job.config.output_dir / ROUTING_FILE
    routed = trained is not None and job.config.method.routes and log.exists() and log.stat().st_size > 0
    return Result(
        config=job.config.to_dict(),
        headline=job.task.headline,
        metrics=after.metrics,
        metrics_before=trained.metrics_before if trained else None,
        data_origin=job.split.origin,
        device=device_name(),
        versions=library_versions(),
        commit=source_commit(),
        seconds=time.perf_counter() - started,
        peak_memory_bytes=peak_memory_bytes(),
        training=trained.training if trained else None,
        routing=read_routing(log).shares() if routed else None,
        run_id=run_id(job.config.output_dir),
    )


def _write_all(job: Job, result: Result, evaluation: Evaluation) -> None:
    folder = job.config.output_dir
    write_predictions(folder / PREDICTIONS_FILE, evaluation.predictions)
    if result.routing is not None:
        draw_routing(read_routing(folder / ROUTING_FILE), folder / PICTURE_FILE, title=job.config.run_name)
    with atomic_write(folder / CARD_FILE) as partial:
        partial.write_text(model_card(result), encoding="utf-8")
    _record(job.config, result)


def _record(config: RunConfig, result: Result) -> None:
    """Write settings and result; the result comes last, because it says that the run is finished.

    A run that is killed between its row and its result replaces that row when it is started again.
    """
    with atomic_write(config.output_dir / CONFIG_FILE) as partial:
        partial.write_text(yaml.safe_dump(result.config, sort_keys=False, allow_unicode=True), encoding="utf-8")
    if log_file := os.environ.get("LOG_FILE"):
        append_csv(Path(log_file), result.row(), key="run_id")
    write_result(config.output_dir, result)
    (config.output_dir / RUN_ID_FILE).unlink()
