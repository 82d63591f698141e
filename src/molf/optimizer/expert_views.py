"""The user's view of the experts: ``optimizer.experts[module][expert]``.

Views look their tensors up in the optimizer at every access, so they stay right after loading, moving or sharding. Of a sharded
model they give copies of the whole tensors, gathered from all ranks: every rank has to ask, and to set, the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from molf.layers.base import RoutedLayer
from molf.layers.build import init_group
from molf.layers.forms import FORMS
from molf.numerics.bf16 import master_dtype
from molf.numerics.distributed import full
from molf.optimizer.step import noise_of

if TYPE_CHECKING:
    from molf.optimizer import MoLF

__all__ = ["Experts", "FftExpert", "LoraExpert"]


class _Expert:
    def __init__(self, optimizer: MoLF, module: str, name: str):
        self._optimizer, self.module, self.name = optimizer, module, name

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.module!r}, {self.name!r})"

    def _layer(self) -> RoutedLayer:
        return _routed_layer(self._optimizer, self.module)

    def _checked(self, name: str, value: Tensor, like: Tensor) -> Tensor:
        if value.shape != like.shape:
            raise ValueError(f"{self.module} {name} has shape {list(value.shape)}, it must be {list(like.shape)}")
        return value.detach().to(like.device, master_dtype(like.dtype))


class FftExpert(_Expert):
    """The full-rank expert of a layer: ``W [out, in]`` and its bias ``[out]``."""

    @property
    def weight(self) -> Tensor:
        """``W`` without the LoRA parts; in the merged form ``W_eff - sum_i s_i B_i A_i``, computed at each access."""
        return full(self._layer().base_weight())

    @property
    def bias(self) -> Tensor | None:
        """The live bias of the layer, None where it has none that trains."""
        base = self._layer().base
        return full(base[1].detach()) if len(base) > 1 else None

    @torch.no_grad()
    def assign(self, *, weight: Tensor | None = None, bias: Tensor | None = None) -> None:
        """Set ``W`` or the bias, or both or neither if something is wrong; an effective weight follows.

        Raises:
            ValueError: If a shape differs, or the layer has no bias that trains.
        """
        layer = self._layer()
        if bias is not None and len(layer.base) < 2:
            raise ValueError(f"{self.module} has no bias that trains")
        new_weight = None if weight is None else self._checked("weight", weight, layer.base[0])
        new_bias = None if bias is None else self._checked("bias", bias, layer.base[1])
        if new_weight is not None:
            layer.set_base_weight(new_weight)
        if new_bias is not None:
            layer.set_bias(new_bias)


class LoraExpert(_Expert):
    """A low-rank expert of a layer: ``A [r, in]``, ``B [out, r]`` and ``scale``."""

    def _index(self, layer: RoutedLayer) -> int:
        return [name for name in layer.experts if name != "fft"].index(self.name)

    @property
    def A(self) -> Tensor:  # noqa: N802 - the paper's letter
        """The live down-projection ``[r, in]``. Change it through ``assign``."""
        layer = self._layer()
        return full(layer.pairs[self._index(layer)].A)

    @property
    def B(self) -> Tensor:  # noqa: N802 - the paper's letter
        """The live up-projection ``[out, r]``. Change it through ``assign``."""
        layer = self._layer()
        return full(layer.pairs[self._index(layer)].B)

    @property
    def scale(self) -> float:
        """The scale ``s`` of the product ``B A``."""
        layer = self._layer()
        return layer.pairs[self._index(layer)].scale

    @torch.no_grad()
    def assign(self, *, A: Tensor | None = None, B: Tensor | None = None) -> None:  # noqa: N803 - the paper's letters
        """Set A, B or both, or neither if something is wrong; an effective weight follows, ``W`` stays.

        Raises:
            ValueError: If a shape differs.
        """
        layer = self._layer()
        i = self._index(layer)
        pair = layer.pairs[i]
        new_A = self._checked(f"{self.name}.A", full(pair.A) if A is None else A, pair.A)
        new_B = self._checked(f"{self.name}.B", full(pair.B) if B is None else B, pair.B)
        layer.set_pair(i, new_A, new_B)


class Experts(Mapping[str, "dict[str, FftExpert | LoraExpert]"]):
    """All experts by module name and expert name."""

    def __init__(self, optimizer: MoLF):
        self._optimizer = optimizer

    def __getitem__(self, module: str) -> dict[str, Any]:
        layer = _routed_layer(self._optimizer, module)
        return {
            name: (FftExpert if name == "fft" else LoraExpert)(self._optimizer, module, name) for name in layer.experts
        }

    def __iter__(self) -> Iterator[str]:
        return (group["module"] for group in self._optimizer.param_groups if "module" in group)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _routed_layer(optimizer: MoLF, module: str) -> RoutedLayer:
    """Return the routed layer of that name as it is now, its state in place.

    Raises:
        KeyError: If no such module is routed.
    """
    for group in optimizer.param_groups:
        if group.get("module") == module:
            init_group(group, optimizer.state, optimizer.bf16_update == "split", optimizer.optim_bits)
            return FORMS[group["form"]](group, optimizer.state, noise_of(optimizer, optimizer.ranks()))
    names = list(Experts(optimizer))
    raise KeyError(f"{module!r} is not routed; the {len(names)} routed modules are {names[0]}, ..., {names[-1]}")
