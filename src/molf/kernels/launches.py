"""The tables of a plan on the device, and its launches. Made once, and again when something has moved."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from molf.kernels import tables
from molf.kernels.layout import Layout
from molf.kernels.moments import BLOCK, CHUNK, STRIP
from molf.kernels.plan import Entry, StepPlan
from molf.kernels.quantized import ROWS, WARPS
from molf.kernels.tables import ALIGNMENT, GRADIENTS, Launch, blocks_of, to_device
from molf.kernels.winners import FLOAT
from molf.numerics.quantization import BLOCK as CODES
from molf.numerics.quantization import block_count

__all__ = ["Chunk", "Launches"]

# Elements of operands, and of products beside bf16 weights, that exist at once: 256 MB, or one layer's.
_AT_ONCE = 1 << 26


class Chunk(NamedTuple):
    """Effective weights whose operands exist at once.

    Attributes:
        weights: The weights themselves.
        pairs: Launches of ``move_pairs``, which write the operands.
        operands: Where X and Y of all weights lie.
        X: Their numbers in ``operands``; ``Y`` likewise.
        products: Where ``X Y`` of bf16 weights lies; empty for float32 ones, to which it is added in place.
        late: Launches of bf16 weights, which read the products.
    """

    weights: list[Tensor]
    pairs: list[Launch]
    operands: Layout
    X: list[int]
    Y: list[int]
    products: Layout
    P: list[int]
    late: list[Launch]


class Launches:
    """The tables and launches of a plan.

    Args:
        plan: The tensors.
        grads: The addresses of the gradients of its owned entries.
        device: The model's.
    """

    def __init__(self, plan: StepPlan, grads: Sequence[int], device: torch.device):
        self._device, self._entries = device, plan.entries
        self._sizes = [self._sizes_of(entry) for entry in plan.entries]
        # Gradients of pairs are aligned in their buffer.
        self._grads = [address % ALIGNMENT == 0 for address in grads] + [True] * len(plan.gradients.offsets)
        owned = range(plan.owned)
        routed = [i for i, entry in enumerate(plan.entries) if not (entry.expert >= plan.routed and _quantized(entry))]
        self.moments, self.slots, bounds = self._phase1(routed, plan.routed)
        self.sums = Launch(to_device(bounds, device), {"STRIP": STRIP})
        late = {i for i in plan.effective if plan.entries[i].storage != FLOAT}
        self.early = self._phase2([i for i in owned if i not in late], product=False)
        self.chunks = self._chunks(plan)
        self.addresses = to_device(self._addresses(), device)
        self.sizes = to_device(torch.tensor(self._sizes, dtype=torch.int64, device="cpu").view(-1, _SIZES), device)
        factors = [[entry.decay, entry.scale] for entry in plan.entries]
        self.factors = to_device(torch.tensor(factors, dtype=torch.float32, device="cpu"), device)

    def still_aligned(self, grads: Sequence[int]) -> bool:
        """Return whether gradients at other addresses are aligned where they were."""
        for address, aligned in zip(grads, self._grads, strict=False):  # noqa: SIM110 - a generator would cost calls
            if aligned and address & (ALIGNMENT - 1):
                return False
        return True

    def _sizes_of(self, entry: Entry) -> list[int]:
        param, row = entry.tensor.param, [0] * _SIZES
        rows = len(param) if param.ndim else 1
        columns = param.numel() // max(1, rows)
        in_row = block_count(columns)
        normed = entry.effective and entry.counted
        own = (param.numel(), columns, entry.expert, entry.layer, entry.stream, entry.counted, normed, in_row)
        row[: len(own) + 1] = [*map(int, own), rows * in_row]
        row[_WEIGHT] = entry.weight
        return row

    def _addresses(self) -> Tensor:
        keys = ("param", "exp_avg", "exp_avg_sq", "low", "exp_avg_absmax", "exp_avg_sq_absmax")
        rows = [[getattr(entry.tensor, key) for key in keys] for entry in self._entries]
        addresses = [[0 if x is None else x.data_ptr() for x in row] for row in rows]
        return torch.tensor(addresses, dtype=torch.int64, device="cpu").view(-1, len(keys))

    def _hint(self, i: int, multiples: Iterable[int], itemsize: int, reads_grad: bool) -> int:
        """Return the elements of a vector load if a tensor allows one, else 1: of 16 bytes of its smallest elements."""
        elements, entry = ALIGNMENT // itemsize, self._entries[i]
        addresses = all(x.data_ptr() % ALIGNMENT == 0 for x in entry.tensors)
        aligned = addresses and (self._grads[i] or not reads_grad) and all(n % elements == 0 for n in multiples)
        return elements if aligned else 1

    def _phase1(self, rows: Sequence[int], experts: int) -> tuple[list[Launch], int, Tensor]:
        """Return the launches over tensors, the number of their partial sums, and between which those of each expert lie."""
        found: list[tuple[tuple[Any, ...], int, int, int]] = []
        bounds, slot = [[0, 0, 0] for _ in range(experts)], 0
        for i in sorted(rows, key=lambda i: self._entries[i].expert):
            entry = self._entries[i]
            count, kind = self._blocks(i), self._kind(i, min(4, entry.grad.itemsize), reads_grad=True)
            found.append(((*kind, entry.grad), i, count, slot))
            slot += count
            if entry.expert < experts:
                own = bounds[entry.expert]
                own[1:] = own[1] if own[2] else slot - count, slot
        table = torch.tensor(bounds, dtype=torch.int64, device="cpu").view(-1, 3)
        return [self._launch(own, GRAD=GRADIENTS[key[2]]) for key, own in _grouped(found)], slot, table

    def _phase2(self, rows: Sequence[int], product: bool) -> list[Launch]:
        """Return the launches that move parameters, ``PRODUCT`` where a product is added."""
        found = []
        for i in rows:
            entry = self._entries[i]
            itemsize, codes = entry.tensor.param.element_size(), _quantized(entry)
            kind = self._kind(i, itemsize, reads_grad=codes)
            found.append(((*kind, entry.grad if codes else None, entry.storage), i, self._blocks(i), 0))
        made = []
        for key, own in _grouped(found):
            grad = {} if key[2] is None else {"GRAD": GRADIENTS[key[2]]}
            made.append(self._launch(own, STORAGE=key[3], PRODUCT=product, **grad))
        return made

    def _kind(self, i: int, itemsize: int, reads_grad: bool) -> tuple[bool, int]:
        """Return whether a tensor has 8-bit moments, and its hint."""
        sizes, quantized = self._sizes[i], _quantized(self._entries[i])
        return quantized, self._hint(i, [sizes[1 if quantized else 0]], 1 if quantized else itemsize, reads_grad)

    def _blocks(self, i: int) -> int:
        if _quantized(self._entries[i]):
            return -(-self._sizes[i][_BLOCKS] // ROWS)
        return -(-self._sizes[i][0] // CHUNK)

    def _launch(self, found: Sequence[tuple[tuple[Any, ...], int, int, int]], **constants: Any) -> Launch:
        """Return one launch over tensors of one kind."""
        (quantized, hint, *_), _, _, _ = found[0]
        _, rows, counts, slots = zip(*found, strict=True)
        blocks = to_device(blocks_of(rows, counts, slots, ROWS if quantized else CHUNK), self._device)
        how = {"ROWS": ROWS, "BLOCK": CODES, "num_warps": WARPS} if quantized else {"CHUNK": CHUNK, "BLOCK": BLOCK}
        return Launch(blocks, {**how, "HINT": hint, **constants}, quantized)

    def _chunks(self, plan: StepPlan) -> list[Chunk]:
        """Cut the effective weights into chunks, and place their operands and products."""
        rows_of: list[list[int]] = [[] for _ in plan.effective]
        for j, pair in enumerate(plan.pairs):
            rows_of[pair.layer] += [plan.owned + 2 * j, plan.owned + 2 * j + 1]
        chunks, started, taken = [], 0, 0
        for k, weight in enumerate(plan.effective):
            entry = plan.entries[weight]
            n_out, n_in = entry.tensor.param.shape
            width = sum(plan.entries[i].tensor.param.shape[0] for i in rows_of[k][::2])
            size = 2 * width * (n_out + n_in) + (n_out * n_in if entry.storage != FLOAT else 0)
            if k > started and taken + size > _AT_ONCE:
                chunks.append(self._chunk(plan, range(started, k), rows_of))
                started, taken = k, 0
            taken += size
        if plan.effective:
            chunks.append(self._chunk(plan, range(started, len(plan.effective)), rows_of))
        return chunks

    def _chunk(self, plan: StepPlan, layers: range, rows_of: Sequence[Sequence[int]]) -> Chunk:
        operands, products = (
            Layout(self._device),
            Layout(self._device, multiple=16),
        )  # as wide as rows of codes are read
        late, found = [], []
        numbers: dict[str, list[int]] = {"X": [], "Y": [], "P": []}
        for k in layers:
            entry, rows = plan.entries[plan.effective[k]], rows_of[k]
            n_out, n_in = entry.tensor.param.shape
            ranks = [plan.entries[i].tensor.param.shape[0] for i in rows[::2]]
            width = 2 * sum(ranks)
            (x, x_at), (y, y_at) = operands.place((n_out, width)), operands.place((width, n_in))
            numbers["X"].append(x)
            numbers["Y"].append(y)
            if entry.storage != FLOAT:
                p, p_at = products.place((n_out, n_in))
                numbers["P"].append(p)
                late.append(plan.effective[k])
                self._sizes[late[-1]][_OFFSET] = p_at
            before = 0
            for a, b, r in zip(rows[::2], rows[1::2], ranks, strict=True):
                own = ((a, r * n_in, r * n_in, y_at + before * n_in, r * n_in), (b, r, width, x_at + before, r))
                for i, columns, stride, offset, next_one in own:
                    self._sizes[i][1] = columns
                    self._sizes[i][_OFFSET : _IS_B + 1] = [offset, offset + next_one, stride, int(i == b)]
                    hint = self._hint(i, (self._sizes[i][0], columns, stride, offset, offset + next_one), 4, False)
                    found.append(((False, hint), i, self._blocks(i), 0))
                before += 2 * r
        pairs = [self._launch(own) for _, own in _grouped(found)]
        weights = [plan.entries[plan.effective[k]].tensor.param.detach() for k in layers]
        return Chunk(
            weights, pairs, operands, numbers["X"], numbers["Y"], products, numbers["P"], self._phase2(late, True)
        )


_SIZES, _BLOCKS, _WEIGHT = int(tables.SIZES.value), int(tables.BLOCKS.value), int(tables.WEIGHT.value)
_OFFSET, _IS_B = int(tables.OFFSET.value), int(tables.IS_B.value)


def _quantized(entry: Entry) -> bool:
    return entry.tensor.is_quantized


def _grouped(found: list[tuple[tuple[Any, ...], int, int, int]]) -> Iterable[tuple[tuple[Any, ...], list[Any]]]:
    """Group tensors by their kind, in a fixed order."""
    ordered = sorted(found, key=lambda one: str(one[0]))
    return ((key, list(own)) for key, own in groupby(ordered, key=lambda one: one[0]))
