"""The user's view of the experts: ``optimizer.experts[module][expert]``.

Views look their tensors up in the optimizer at every access, so they stay right after loading, moving or sharding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from molf.groups import expert_names
from molf.merged import Pair, base_weight, fold_, pairs
from molf.precision import load, master_dtype, store

if TYPE_CHECKING:
    from molf.optimizer import MoLF

__all__ = ["Experts", "FftExpert", "LoraExpert"]


class _Expert:
    def __init__(self, optimizer: MoLF, module: str, name: str):
        self._optimizer, self.module, self.name = optimizer, module, name

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.module!r}, {self.name!r})"

    @property
    def _group(self) -> dict[str, Any]:
        return self._optimizer.routed_group(self.module)

    def _pairs(self) -> list[Pair]:
        return pairs(self._group, self._optimizer.state)

    def _effective(self) -> tuple[Tensor, Tensor | None]:
        weight = self._group["params"][0]
        return weight.detach(), self._optimizer.state[weight].get("low")

    def _store(self, value: Tensor, p: Tensor) -> None:
        store(value, p.detach(), self._optimizer.state[p].get("low"), self._optimizer.noise())

    def _checked(self, name: str, value: Tensor, like: Tensor) -> Tensor:
        if value.shape != like.shape:
            raise ValueError(f"{self.module} {name} has shape {list(value.shape)}, it must be {list(like.shape)}")
        return value.detach().to(like.device, master_dtype(like.dtype))


class FftExpert(_Expert):
    """The full-rank expert of a layer: ``W [out, in]`` and its bias ``[out]``."""

    @property
    def weight(self) -> Tensor:
        """``W = W_eff - sum_i s_i B_i A_i``, computed at each access (in float32 for bf16 weights)."""
        return base_weight(load(*self._effective()), self._pairs())

    @property
    def bias(self) -> Tensor | None:
        """The live bias of the layer, None where it has none that trains."""
        params = self._group["params"]
        return params[1].detach() if len(params) > 1 else None

    @torch.no_grad()
    def assign(self, *, weight: Tensor | None = None, bias: Tensor | None = None) -> None:
        """Set ``W`` or the bias; the effective weight follows.

        Raises:
            ValueError: If a shape differs, or the layer has no bias that trains.
        """
        params, own = self._group["params"], self.weight
        if bias is not None and len(params) < 2:
            raise ValueError(f"{self.module} has no bias that trains")
        weight = self._checked("weight", own if weight is None else weight, own)
        if bias is not None:
            value = self._checked("bias", bias, params[1])
            master = load(params[1].detach(), self._optimizer.state[params[1]].get("low"))
            self._store(master.copy_(value), params[1])
        effective = load(*self._effective())
        self._store(effective.add_(weight - own), params[0])


class LoraExpert(_Expert):
    """A low-rank expert of a layer: ``A [r, in]``, ``B [out, r]`` and ``scale``."""

    def _pair(self) -> Pair:
        return self._pairs()[expert_names(self._group["ranks"]).index(self.name) - 1]

    @property
    def A(self) -> Tensor:  # noqa: N802 - the paper's letter
        """The live down-projection ``[r, in]``. Change it through ``assign``."""
        return self._pair().A

    @property
    def B(self) -> Tensor:  # noqa: N802 - the paper's letter
        """The live up-projection ``[out, r]``. Change it through ``assign``."""
        return self._pair().B

    @property
    def scale(self) -> float:
        """The scale ``s`` of the product ``B A``."""
        return self._pair().scale

    @torch.no_grad()
    def assign(self, *, A: Tensor | None = None, B: Tensor | None = None) -> None:  # noqa: N803 - the paper's letters
        """Set A, B or both; the effective weight follows, ``W`` stays.

        Raises:
            ValueError: If a shape differs.
        """
        pair = self._pair()
        before = Pair(pair.A.clone(), pair.B.clone(), pair.scale)
        A = self._checked(f"{self.name}.A", pair.A if A is None else A, pair.A)
        B = self._checked(f"{self.name}.B", pair.B if B is None else B, pair.B)
        pair.A.copy_(A)
        pair.B.copy_(B)
        effective = load(*self._effective())
        fold_(effective, before, pair)
        self._store(effective, self._group["params"][0])


class Experts(Mapping[str, "dict[str, FftExpert | LoraExpert]"]):
    """All experts by module name and expert name."""

    def __init__(self, optimizer: MoLF):
        self._optimizer = optimizer

    def __getitem__(self, module: str) -> dict[str, Any]:
        group = self._optimizer.routed_group(module)
        return {
            name: (FftExpert if name == "fft" else LoraExpert)(self._optimizer, module, name)
            for name in expert_names(group["ranks"])
        }

    def __iter__(self) -> Iterator[str]:
        return (group["module"] for group in self._optimizer.param_groups if "module" in group)

    def __len__(self) -> int:
        return sum(1 for _ in self)
