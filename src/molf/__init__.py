"""MoLF: fine-tune with full fine-tuning and LoRA as experts of every layer, and let the optimizer choose at every step.

optimizer = molf.MoLF(model, ranks=(32,), lr=5e-5)                    # any PyTorch loop
molf.use_in(trainer, ranks=(32,)).train()                             # any trainer of transformers or TRL
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from molf.integrations.lora_experts import add_lora_experts
    from molf.integrations.merge import merge
    from molf.integrations.routing_log import RoutingLog
    from molf.integrations.trainer import trainer_optimizer
    from molf.integrations.use_in import use_in
    from molf.optimizer import MoLF
    from molf.routing import Routing
    from molf.scores import Score
    from molf.setup.param_groups import param_groups

__version__ = "0.2.0"
__all__ = [
    "MoLF",
    "Routing",
    "RoutingLog",
    "Score",
    "__version__",
    "add_lora_experts",
    "merge",
    "param_groups",
    "trainer_optimizer",
    "use_in",
]

# Public names are imported at first use, so that `molf --help` needs no torch and the optimizer no transformers.
_HOMES = {
    "MoLF": "molf.optimizer",
    "Routing": "molf.routing",
    "RoutingLog": "molf.integrations.routing_log",
    "Score": "molf.scores",
    "add_lora_experts": "molf.integrations.lora_experts",
    "merge": "molf.integrations.merge",
    "param_groups": "molf.setup.param_groups",
    "trainer_optimizer": "molf.integrations.trainer",
    "use_in": "molf.integrations.use_in",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'molf' has no attribute {name!r}")
    try:
        home = importlib.import_module(_HOMES[name])
    except ModuleNotFoundError as error:
        message = f"molf.{name} needs {error.name}; install what trains real models: pip install 'molf[train]'"
        raise ModuleNotFoundError(message, name=error.name) from error
    return getattr(home, name)


def __dir__() -> list[str]:
    return sorted(__all__)
