"""Tables on the device that a launch over many tensors reads: pointers and blocks of work.

A table is copied to the device only when it changes. Gradients are new tensors at most steps, but allocators reuse memory, so
most steps copy nothing. If gradients stay in place no step copies, and a CUDA graph can capture it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Rate", "Tables", "launch"]

# Fuse multiply and add in all kernels, whatever the default of the Triton release.
_OPTIONS = {"enable_fp_fusion": True}


def launch(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    """Launch a kernel with a number of programs; a rank without rows has none."""
    if programs:
        kernel[(programs,)](*args, **constants, **_OPTIONS)


class Rate(NamedTuple):
    """A learning rate ``ratio * lr`` with a tensor ``lr`` of one element on the device."""

    lr: Tensor
    ratio: float


class Tables:
    """Tables of one device by name, cached with their inputs.

    Args:
        device: Where the kernels run.

    Attributes:
        buffer: Memory of the current step. Tensors inside are addressed relative to its start, so that their tables stay valid.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.buffer = torch.empty(0, device=device)
        self._kept: dict[str, tuple[Hashable, Tensor]] = {}
        self._captured: dict[int, Tensor] = {}

    def pointers(self, name: str, tensors: Sequence[Tensor]) -> Tensor:
        """Return the addresses of tensors, int64; copied again if one has changed.

        Raises:
            ValueError: If a tensor is not contiguous or lies on another device.
        """
        for x in tensors:
            if not x.is_contiguous() or x.device != self.device:
                raise ValueError(
                    f"a fused step needs contiguous tensors on {self.device}, but one of {name} has strides {x.stride()} "
                    f"on {x.device}: use fused=False"
                )
        base = self.buffer.data_ptr()
        inside = tuple(base <= x.data_ptr() < base + self.buffer.nbytes for x in tensors)
        addresses = tuple(x.data_ptr() - base * here for x, here in zip(tensors, inside, strict=True))
        table = self.numbers(name, addresses, torch.int64)
        if not any(inside):
            return table
        return torch.add(table, self.numbers(f"{name}.inside", inside, torch.int64), alpha=base)

    def numbers(self, name: str, values: tuple[int, ...] | tuple[float, ...], dtype: torch.dtype) -> Tensor:
        """Return numbers on the device; copied again if one has changed."""
        return self.made(name, (dtype, values), lambda: torch.tensor(values, dtype=dtype, device="cpu"))

    def rates(self, name: str, rates: Sequence[float | Rate], dtype: torch.dtype = torch.float32) -> Tensor:
        """Return learning rates on the device; tensor rates are read at every call."""
        fixed = self.numbers(name, tuple(rate.ratio if isinstance(rate, Rate) else rate for rate in rates), dtype)
        if not any(isinstance(rate, Rate) for rate in rates):
            return fixed
        one = torch.ones((), dtype=dtype, device=self.device)
        live = torch.stack([rate.lr.view(()) if isinstance(rate, Rate) else one for rate in rates])
        return live.to(dtype) * fixed

    def made(self, name: str, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """Return the table that ``make`` builds on the host, on the device; built again if ``key`` has changed.

        Raises:
            RuntimeError: If it has changed while a CUDA graph is being captured.
        """
        capturing = is_capturing(self.device)
        found = self._kept.get(name)
        if found is None or found[0] != key:
            if capturing:
                raise RuntimeError(
                    f"{name} has changed since the last step, which a CUDA graph cannot follow: before capturing, take two "
                    "steps with the gradients in the tensors that will hold them at every replay, and let rates that "
                    "change be tensors on the device"
                )
            table = make()
            if self.device.type == "cuda":
                # A copy from pinned memory needs no sync; PyTorch keeps the host table alive until it is done.
                table = table.pin_memory().to(self.device, non_blocking=True)
            found = self._kept[name] = (key, table)
        if capturing:  # the graph reads this very table at every replay, even after another has replaced it here
            self._captured[found[1].data_ptr()] = found[1]
        return found[1]

    def blocks(self, name: str, sizes: tuple[int, ...], block: int) -> Tensor:
        """Cut flat tensors into blocks: ``[N, 2]`` int64, the tensor's number and the block's first element."""

        def make() -> Tensor:
            rows = [(i, start) for i, size in enumerate(sizes) for start in range(0, size, block)]
            return torch.tensor(rows, dtype=torch.int64, device="cpu").view(-1, 2)

        return self.made(name, (sizes, block), make)

    def tiles(self, name: str, shapes: tuple[tuple[int, int], ...], tile: tuple[int, int]) -> Tensor:
        """Cut matrices into tiles: ``[N, 3]`` int32, the matrix's number, first row and first column."""

        def make() -> Tensor:
            rows = [
                (i, row, column)
                for i, (height, width) in enumerate(shapes)
                for row in range(0, height, tile[0])
                for column in range(0, width, tile[1])
            ]
            return torch.tensor(rows, dtype=torch.int32, device="cpu").view(-1, 3)

        return self.made(name, (shapes, tile), make)


def is_capturing(device: torch.device) -> bool:
    """Return whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
