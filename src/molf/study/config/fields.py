"""How a field of the configuration is declared: its default, its help on the command line, and what it shapes."""

from dataclasses import field
from typing import Any, Literal

ROUTED = ("molf", "molf_e")
ADAPTED = ("lora", "rslora", "dora", "adalora", "pissa", "eva", "lora_plus")
STATIC = "static"
ADDING_LORA = (*ROUTED, *ADAPTED)
"""Methods that share settings. The remaining one, fft, has neither LoRA nor routing."""

Level = Literal["nothing", "evaluation", "training", "checkpoint"]
"""What a setting shapes. Each level includes the ones after it:

- ``nothing``: where a run writes and what it shows.
- ``evaluation``: the metrics, but not the trained model.
- ``training``: the trained model. This is the default.
- ``checkpoint``: the form of a checkpoint and every step, so a run cannot resume from a checkpoint with another value.
  Other training settings, such as the number of epochs, may change between two starts of a run.
"""

SHAPES = "shapes"
"""Key of a field's metadata that holds its level."""


READ_BY = "read_by"
"""Key of a field's metadata that holds the methods that read it, if not all of them do."""


def setting(default: Any, help: str, shapes: Level = "training", read_by: tuple[str, ...] | None = None) -> Any:
    """Declare a field of a configuration dataclass.

    Args:
        default: The default; a list is copied for every configuration.
        help: What ``molf COMMAND --help`` says.
        shapes: What changes when this setting changes.
        read_by: The methods that read it; None for all of them.
    """
    metadata: dict[str, Any] = {"help": help, SHAPES: shapes} | ({READ_BY: read_by} if read_by else {})
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


_TRAINER: dict[Level, str] = {
    "nothing": """
        output_dir run_name resume_from_checkpoint disable_tqdm report_to
        logging_steps logging_strategy logging_first_step save_strategy save_steps save_total_limit
    """,
    "checkpoint": """
        learning_rate weight_decay lr_scheduler_type lr_scheduler_kwargs warmup_steps seed data_seed
        adam_beta1 adam_beta2 adam_epsilon max_grad_norm optim optim_args optim_target_modules
        label_smoothing_factor loss_type router_aux_loss_coef neftune_noise_alpha bf16 fp16
        eos_token max_length truncation_mode packing packing_strategy completion_only_loss assistant_only_loss
        shuffle_dataset dataloader_drop_last train_sampling_strategy ignore_data_skip auto_find_batch_size accelerator_config
    """,
}
TRAINER_LEVELS: dict[str, Level] = {name: level for level, names in _TRAINER.items() for name in names.split()}
"""What a field of TRL's ``SFTConfig`` shapes; the training if it is not listed."""

_OWN_OPTIMIZER = (*ROUTED, "lora_plus")
TRAINER_READ_BY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("optim", "optim_args", "optim_target_modules"),
        ("fft", *(method for method in ADAPTED if method not in _OWN_OPTIMIZER)),
    ),
    "weight_decay": ("fft", STATIC, *ROUTED),  # adapters have lora_weight_decay
}
"""The methods that read a field of TRL's ``SFTConfig``; all of them if it is not listed."""
