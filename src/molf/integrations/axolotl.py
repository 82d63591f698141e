"""MoLF in axolotl, as a plugin: two entries of its YAML file.

plugins: [molf.integrations.axolotl.MoLFPlugin]
molf: {ranks: [32]}
"""

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, field_validator

from molf.errors import MolfError
from molf.integrations.use_in import check_names, use_in
from molf.optimizer import MoLF


class MoLFArgs(BaseModel):
    """The plugin's entry in axolotl's configuration.

    Attributes:
        molf: Keyword arguments of ``molf.MoLF``. What it does not say comes from axolotl's own entries (``learning_rate``,
            ``weight_decay``, ``adam_beta1``, ``max_grad_norm`` and so on).
    """

    molf: dict[str, Any] | None = None

    @field_validator("molf")
    @classmethod
    def refuse_unknown(cls, options: dict[str, Any] | None) -> dict[str, Any] | None:
        """Refuse an option that MoLF does not have before model and data are loaded."""
        try:
            check_names(options or {})
        except TypeError as error:  # which pydantic would let through as a fault of the program
            raise ValueError(f"molf: {error}") from error
        return options


class MoLFPlugin(BasePlugin):  # type: ignore[misc]
    """Makes MoLF the optimizer of axolotl's trainers."""

    def get_input_args(self) -> str:
        """Return the name of the class that describes the plugin's entries."""
        return f"{MoLFArgs.__module__}.{MoLFArgs.__name__}"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Have the trainer build MoLF.

        Raises:
            MolfError: The configuration asks for an adapter, or ``molf.use_in`` refuses the trainer.
        """
        if cfg.adapter:
            raise MolfError(
                f"adapter: {cfg.adapter} trains one LoRA on a frozen base, which leaves MoLF nothing to choose between: remove "
                "the entry, and MoLF routes every layer between full fine-tuning and LoRA"
            )
        use_in(trainer, **(cfg.molf or {}))

    def create_optimizer(self, cfg: Any, trainer: Any) -> MoLF:
        """Return MoLF where axolotl asks plugins for the optimizer; 0.19 never does, and asks the trainer."""
        factory, options = trainer.optimizer_cls_and_kwargs
        optimizer: MoLF = factory()(trainer.model, **options)
        return optimizer
