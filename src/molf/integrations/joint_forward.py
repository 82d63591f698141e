"""All LoRA experts of a layer in one pass.

PEFT runs active adapters one after the other, each with its own matmuls and a sum over the layer's output. In training,
``JointLinear`` computes ``x W^T + drop(x) [A_1; A_2]^T [s_1 B_1, s_2 B_2]^T`` instead, with one dropout mask for all experts. The
parameters stay PEFT's, so saving, loading, merging and exporting work as before.
"""

from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn.functional import linear

from molf.numerics.distributed import is_sharded


class JointLinear(lora.Linear):  # type: ignore[misc]
    """PEFT's LoRA layer, with one pass for all active adapters in training."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the output of PEFT's layer."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        plain = not (self.disable_adapters or self.merged or self.lora_variant or kwargs)
        plain = plain and not any(self.lora_bias[name] for name in names)
        rates = {getattr(self.lora_dropout[name], "p", 0.0) for name in names}
        # Adapters that FSDP shards one by one are whole only while their own modules run.
        plain = plain and not any(is_sharded(self.lora_A[n].weight) or is_sharded(self.lora_B[n].weight) for n in names)
        # Without gradients, e.g. in generation, concatenating the pairs costs more than it saves.
        if not (plain and len(names) > 1 and len(rates) == 1 and torch.is_grad_enabled()):
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        result = self.base_layer(x, *args)
        A = torch.cat([self.lora_A[name].weight for name in names])
        B = torch.cat([self.lora_B[name].weight * self.scaling[name] for name in names], dim=1)
        inner = linear(self.lora_dropout[names[0]](self._cast_input_dtype(x, A.dtype)), A)
        total: Tensor = (result + linear(inner, B)).to(result.dtype)
        return total


def join_experts(model: nn.Module) -> None:
    """Turn all plain LoRA layers of a PEFT model into ``JointLinear``, except over quantised bases and Conv1D."""
    for module in model.modules():
        if type(module) is lora.Linear and isinstance(module.base_layer, nn.Linear):
            module.__class__ = JointLinear
