"""The user's view of the experts: ``optimizer.experts[module][expert]``.

Views look their tensors up at every access, so they stay valid after loading, moving or sharding. Of a sharded model they return
gathered copies: every rank has to read, and to assign, the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from molf.errors import MolfError
from molf.layers.base import LoraPair, Matrix
from molf.numerics.bf16 import master_dtype
from molf.numerics.distributed import full

__all__ = ["Experts", "FftExpert", "LoraExpert"]

MatrixOf = Callable[[str], Matrix]
"""Returns where the experts of a module are held now; raises KeyError for one that is not routed."""


class _Expert:
    def __init__(self, matrix_of: MatrixOf, module: str, name: str):
        self._matrix_of, self.module, self.name = matrix_of, module, name

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.module!r}, {self.name!r})"

    @property
    def _matrix(self) -> Matrix:
        return self._matrix_of(self.module)

    def _checked(self, name: str, value: Tensor, like: Tensor) -> Tensor:
        if value.shape != like.shape:
            raise MolfError(f"{self.module} {name} has shape {list(value.shape)}, it must be {list(like.shape)}")
        return value.detach().to(like.device, master_dtype(like.dtype))


class FftExpert(_Expert):
    """The full-rank expert of a layer: ``W [out, in]`` and its bias ``[out]``."""

    @property
    def weight(self) -> Tensor:
        """``W`` without the LoRA parts; in the merged form ``W_eff - sum_i s_i B_i A_i``, computed at each access."""
        return full(self._matrix.base_weight())

    @property
    def bias(self) -> Tensor | None:
        """The live bias of the layer, None if it has none that trains."""
        base = self._matrix.base
        return full(base[1].detach()) if len(base) > 1 else None

    @torch.no_grad()
    def assign(self, *, weight: Tensor | None = None, bias: Tensor | None = None) -> None:
        """Set ``W``, the bias, or both; an effective weight follows. After an error nothing has changed.

        Raises:
            MolfError: If a shape differs, or the layer has no bias that trains.
        """
        matrix = self._matrix
        if bias is not None and len(matrix.base) < 2:
            raise MolfError(f"{self.module} has no bias that trains")
        new_weight = None if weight is None else self._checked("weight", weight, matrix.base[0])
        new_bias = None if bias is None else self._checked("bias", bias, matrix.base[1])
        if new_weight is not None:
            matrix.set_base_weight(new_weight)
        if new_bias is not None:
            matrix.set_bias(new_bias)


class LoraExpert(_Expert):
    """A low-rank expert of a layer: ``A [r, in]``, ``B [out, r]`` and ``scale``."""

    def _pair(self, matrix: Matrix) -> tuple[int, LoraPair]:
        i = [name for name in matrix.experts if name != "fft"].index(self.name)
        return i, matrix.pairs[i]

    @property
    def A(self) -> Tensor:  # noqa: N802 - the paper's letter
        """The live down-projection ``[r, in]``. Change it through ``assign``."""
        return full(self._pair(self._matrix)[1].A)

    @property
    def B(self) -> Tensor:  # noqa: N802 - the paper's letter
        """The live up-projection ``[out, r]``. Change it through ``assign``."""
        return full(self._pair(self._matrix)[1].B)

    @property
    def scale(self) -> float:
        """The scale ``s`` of the product ``B A``."""
        return self._pair(self._matrix)[1].scale

    @torch.no_grad()
    def assign(self, *, A: Tensor | None = None, B: Tensor | None = None) -> None:  # noqa: N803 - the paper's letters
        """Set A, B or both; an effective weight follows and ``W`` stays. After an error nothing has changed.

        Raises:
            MolfError: If a shape differs.
        """
        matrix = self._matrix
        i, pair = self._pair(matrix)
        new_A = None if A is None else self._checked(f"{self.name}.A", A, pair.A)
        new_B = None if B is None else self._checked(f"{self.name}.B", B, pair.B)
        matrix.set_pair(i, new_A, new_B)


class Experts(Mapping[str, "dict[str, FftExpert | LoraExpert]"]):
    """All experts by module name and expert name.

    Args:
        modules: Returns the names of the routed modules.
        matrix_of: Returns where the experts of one of them are held.
    """

    def __init__(self, modules: Callable[[], list[str]], matrix_of: MatrixOf):
        self._modules, self._matrix_of = modules, matrix_of

    def __getitem__(self, module: str) -> dict[str, Any]:
        return {
            name: (FftExpert if name == "fft" else LoraExpert)(self._matrix_of, module, name)
            for name in self._matrix_of(module).experts
        }

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules())

    def __len__(self) -> int:
        return len(self._modules())
