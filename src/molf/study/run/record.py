"""The record of a finished run: its result, and the files that are written from it."""

import time
from dataclasses import dataclass, field

import yaml

from molf.files import atomic_write
from molf.study.config.run_config import RunConfig
from molf.study.engine.evaluate import Evaluation
from molf.study.engine.predictions import PREDICTIONS_FILE, write_predictions
from molf.study.faults.trained import Trained
from molf.study.results.environment import device_name, library_versions, peak_memory_bytes, source_commit
from molf.study.results.gather import append_csv, log_file
from molf.study.results.result import Result, write_result
from molf.study.results.routing import RoutingSummary
from molf.study.run.card import model_card
from molf.study.run.job import Job
from molf.study.run.run_folder import CARD_FILE, CONFIG_FILE, RUN_ID_FILE, report_full_disk, run_id
from molf.tasks.retention import Retention


@dataclass(frozen=True)
class Start:
    """The time and the commit of the source at the start of a run; the source may change while it goes on."""

    time: float = field(default_factory=time.perf_counter)
    commit: str | None = field(default_factory=lambda: source_commit())


def make_result(
    job: Job,
    start: Start,
    evaluation: Evaluation,
    trained: Trained | None = None,
    retention: Retention | None = None,
    routing: RoutingSummary | None = None,
) -> Result:
    """Put the result of a run together."""
    return Result(
        config=job.config.to_dict(),
        headline=job.task.headline,
        metrics=evaluation.metrics,
        metrics_before=trained.metrics_before if trained else None,
        data_origin=job.split.origin,
        device=device_name(),
        versions=library_versions(),
        commit=start.commit,
        seconds=time.perf_counter() - start.time,
        peak_memory_bytes=peak_memory_bytes(),
        training=trained.training if trained else None,
        routing=routing.shares if routing else None,
        retention=retention,
        run_id=run_id(job.config.output_dir),
    )


def write_record(config: RunConfig, result: Result, evaluation: Evaluation) -> None:
    """Write all files of a finished run; the result comes last, because it marks the run as finished.

    A run that is killed between its row in ``$LOG_FILE`` and its result replaces that row when it is started again.
    """
    folder = config.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    write_predictions(folder / PREDICTIONS_FILE, evaluation.predictions)
    if result.training is not None:
        with atomic_write(folder / CARD_FILE) as partial:
            partial.write_text(model_card(result), encoding="utf-8")
    with atomic_write(folder / CONFIG_FILE) as partial:
        partial.write_text(yaml.safe_dump(result.config, sort_keys=False, allow_unicode=True), encoding="utf-8")
    if (log := log_file()) is not None:
        with report_full_disk(log):  # which may be another disk than the run's
            append_csv(log, result.row(), key="run_id")
    write_result(folder, result)
    (folder / RUN_ID_FILE).unlink()
