"""The configuration of a run: dataclasses, and one flat form of them for YAML and JSON.

Every field name is a command-line flag and a key of a ``--config`` file. Nothing here imports torch.
"""

import difflib
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from molf.errors import MolfError
from molf.study.config.fields import setting
from molf.study.config.method_config import MethodConfig

PUBLISHED_RECIPE: dict[str, Any] = {
    "learning_rate": 5e-5,
    "weight_decay": 0.1,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 4,
    "num_train_epochs": 2.0,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "max_grad_norm": 1.0,
    "seed": 42,
    "report_to": "none",
    "save_strategy": "no",
}
"""The trainer's settings in the published recipe; the settings of a run override them."""

DEMO: dict[str, Any] = {
    "model_name_or_path": "bundled:smollm2-135m",
    "task": "fact",
    "sample": True,
    "limit": 64,
    "method": "molf",
    "ranks": [32],
    "learning_rate": 2e-4,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 5,
    "gradient_checkpointing": False,
    "logging_steps": 4,
    "eval_before": True,
    "output_dir": "runs/demo",
    "overwrite": True,
}
"""Settings of ``molf demo``: a small pretrained model learns counterfactual facts in minutes, without a GPU or a network."""

_LONGEST = 200  # bytes of a folder's name; file systems take 255, and the names of files beside it are longer

SECRETS = frozenset({"hub_token"})
"""Settings that are never written to a file."""


@dataclass
class ModelConfig:
    """Which model to train or evaluate, and how to load it."""

    _argument_group_name: ClassVar[str] = "model"

    model_name_or_path: str | None = setting(
        None, "Hub id, folder, or bundled:smollm2-135m / bundled:gemma-3-270m. Required."
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = setting(
        "float32",
        "Data type of the weights in memory; float32 with bf16 autocast is the stable choice.",
        shapes="checkpoint",
    )
    attn_implementation: str | None = setting(
        None,
        "Attention kernel, e.g. sdpa, eager, flash_attention_2; the model's own if unset.",
        shapes="checkpoint",
    )


@dataclass
class TaskConfig:
    """Which benchmark to train and evaluate on."""

    _argument_group_name: ClassVar[str] = "task"

    task: str = setting("fact", "Benchmark: fact, med or sql; or custom, your own data.")
    data_path: str | None = setting(
        None,
        "Your copy of the task's data, a file or folder; its public source if unset. For task custom your data: a "
        "file, a folder or a Hub id (ID@REVISION).",
    )
    eval_path: str | None = setting(
        None, "Task custom: what to evaluate on, as data_path or as the name of a split of it."
    )
    eval_fraction: float | None = setting(
        None, "Task custom: share of the rows to hold out and evaluate on; 0.1 if there is no other evaluation data."
    )
    train_split: str | None = setting(
        None, "Task custom: name of the split of data_path to train on, if it is not called train."
    )
    sample: bool = setting(False, "Use the small sample inside the package instead of the full data.")
    limit: int | None = setting(None, "Use at most this many rows of each split.")
    few_shot: int = setting(0, "Begin every prompt with this many training rows as examples, chosen by the seed.")
    selection_limit: int | None = setting(
        None,
        "Choose settings: evaluate on this many training rows, which are held out, and not on the evaluation rows.",
    )
    validation_limit: int | None = setting(
        None,
        "With eval_strategy: hold out this many training rows, a tenth by default, to evaluate on during training; with "
        "selection_limit those rows are used.",
    )
    eval_limit: int | None = setting(None, "Evaluate at most this many rows.", shapes="evaluation")
    eval_batch_tokens: int = setting(
        4096, "Maximum number of tokens in an evaluation batch, padding included.", shapes="evaluation"
    )
    generation_backend: Literal["transformers", "vllm"] = setting(
        "transformers", "Generates the text in evaluations; vllm needs pip install 'molf[vllm]'.", shapes="evaluation"
    )
    eval_before: bool = setting(False, "Also evaluate the model before training.")
    retention: bool = setting(
        True, "Measure what the model forgets: the rise of its loss on other text, and how far its answers move (KL)."
    )
    retention_path: str | None = setting(
        None,
        "Text to measure retention on: records with text, or with prompt and completion; other tasks' samples if unset.",
    )

    def __post_init__(self) -> None:
        for name in ("limit", "selection_limit", "validation_limit", "eval_limit", "eval_batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise MolfError(f"{name}={value} must be at least 1")
        if self.validation_limit is not None and self.selection_limit is not None:
            raise MolfError(
                f"validation_limit={self.validation_limit} with selection_limit={self.selection_limit}, whose rows are also "
                "evaluated on during training: leave one of them out"
            )
        if self.retention_path is not None and not self.retention:
            raise MolfError(f"retention_path={self.retention_path!r} with retention off: leave one of them out")
        if self.few_shot < 0:
            raise MolfError(f"few_shot={self.few_shot} must not be negative")


@dataclass
class OutputConfig:
    """Where a run writes, and what it does besides training."""

    _argument_group_name: ClassVar[str] = "run"

    output_root: str = setting(
        "runs", "Parent of the run's folder, which is named after the run; output_dir overrides both.", shapes="nothing"
    )
    overwrite: bool = setting(False, "Replace the run in output_dir, finished or not.", shapes="nothing")
    clean_ckpt_at_end: bool = setting(False, "Delete the checkpoint-N folders once the run is done.", shapes="nothing")
    only_eval: bool = setting(False, "Evaluate the model without training it.")
    dry_run: bool = setting(
        False, "Show the resolved settings, one tokenised example and the memory estimate, and stop.", shapes="nothing"
    )


SECTIONS: dict[str, Any] = {"model": ModelConfig, "task": TaskConfig, "method": MethodConfig, "output": OutputConfig}
"""The dataclasses of ``RunConfig`` by attribute; any other name is a setting of the trainer."""


@dataclass
class RunConfig:
    """Everything that defines a run.

    Attributes:
        model: The model.
        task: The benchmark.
        method: How the weights are updated.
        output: Where results go.
        train: The trainer's settings by name (the fields of ``TrainConfig``); the published recipe fills in the rest.
        files: The files that the settings were read from.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    train: dict[str, Any] = field(default_factory=dict)
    files: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        chosen: dict[str, Any] = {}
        if self.train.get("load_best_model_at_end"):  # which needs checkpoints to choose from
            chosen["save_strategy"] = self.train.get("eval_strategy", "no")
        self.train = PUBLISHED_RECIPE | chosen | self.train

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "RunConfig":
        """Build a configuration from flat settings; a name that is in no section is a setting of the trainer."""
        rest = dict(settings)
        sections = {
            section: kind(**{f.name: rest.pop(f.name) for f in fields(kind) if f.name in rest})
            for section, kind in SECTIONS.items()
        }
        return cls(**sections, train=rest)

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as one flat mapping of plain values, the inverse of ``from_dict``."""
        flat: dict[str, Any] = {}
        for section in SECTIONS:
            flat |= asdict(getattr(self, section))
        return flat | {name: value for name, value in self.train.items() if name not in SECRETS}

    @property
    def output_dir(self) -> Path:
        """The run's folder: ``output_dir`` if set, else ``output_root/run_name``.

        Raises:
            MolfError: ``output_dir`` is not set, and the run's name cannot be that of a folder.
        """
        if chosen := self.train.get("output_dir"):
            return Path(chosen).expanduser()
        return Path(self.output.output_root).expanduser() / folder_name(self.run_name, "run_name")

    @property
    def run_name(self) -> str:
        """The given ``run_name``, or one built from the settings that usually differ between runs."""
        if given := self.train.get("run_name"):
            return str(given)
        model = Path((self.model.model_name_or_path or "model").rsplit(":", 1)[-1]).name
        parts = ["eval" if self.output.only_eval else self.method.method, model, self.task.task]
        if self.task.limit is not None:
            parts.append(f"n{self.task.limit}")
        if not self.output.only_eval:
            parts += self._rate_labels()
        return "-".join([*parts, f"s{self.train['seed']}"])

    @property
    def resume_from(self) -> str | bool:
        """The checkpoint to resume from; True for the last one, False for none. A flag may give these as words."""
        given = self.train.get("resume_from_checkpoint") or False
        words: dict[str, bool] = {"true": True, "false": False}
        return words.get(str(given).lower(), given)

    def _rate_labels(self) -> list[str]:
        method, rate = self.method, self.train["learning_rate"]
        lora_rate = rate if method.lora_learning_rate is None else method.lora_learning_rate
        schedule = str(self.train["lr_scheduler_type"])
        if method.method == "fft":
            return [f"lr{rate:g}", schedule]
        if method.allocation:
            return [Path(method.allocation).parent.name, f"lr{rate:g}", f"lora{lora_rate:g}", schedule]
        if not method.routes:
            return [f"r{method.lora_rank}", f"lr{lora_rate:g}", schedule]
        lora = [] if method.match_lora_rate else [f"lora{lora_rate:g}"]
        rates = lora if lora and method.method == "molf_e" else [f"lr{rate:g}", *lora]
        top_k = [f"k{method.top_k}"] if method.top_k != 1 else []
        dropout = [f"drop{method.lora_dropout:g}"] if method.lora_dropout else []
        return [f"r{'_'.join(map(str, method.ranks or []))}", str(method.score), *top_k, *dropout, *rates, schedule]

    def resolved(self) -> "RunConfig":
        """Return the same configuration with ``output_dir`` and ``run_name`` filled in."""
        names = {"output_dir": str(self.output_dir), "run_name": self.run_name}
        return replace(self, train=self.train | names)


def folder_name(name: str, what: str) -> str:
    """Return a name that becomes that of a folder, unless the folder would be another or a hidden one.

    Args:
        name: The name.
        what: What it names, for the error message.

    Raises:
        MolfError: It is empty, too long, begins with a dot, or has a slash or a character that does not print.
    """
    if not name or name.startswith(".") or "/" in name or not name.isprintable() or len(os.fsencode(name)) > _LONGEST:
        raise MolfError(
            f"{what}={name!r} cannot name a folder: give up to {_LONGEST} printable characters without '/', the first one no '.'"
        )
    return name


# What the optimizer and PEFT call settings of a run.
_OPTIMIZER_NAMES = {
    "lr": "learning_rate",
    "lora_lr": "lora_learning_rate",
    "eps": "adam_epsilon",
    "betas": "adam_beta1",
    "lora_r": "lora_rank",
}


def suggestion(name: str, known: Collection[str]) -> str:
    """Return the end of an error message that suggests the closest known name, or nothing if none is close."""
    same = _OPTIMIZER_NAMES.get(name)
    close = [same] if same in known else difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
