"""The tables of a plan on the device, and its launches. Made once, and again when something has moved."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from molf.kernels import tables
from molf.kernels.layout import Layout
from molf.kernels.moments import sum_per_expert, update_moments
from molf.kernels.pairs import move_pairs
from molf.kernels.plan import Entry, StepPlan
from molf.kernels.quantized import WARPS, code_tables, requantize, score_quantized
from molf.kernels.tables import ALIGNMENT, CHUNK, TILE, Launch, blocks_of, to_device
from molf.kernels.winners import FLOAT, move_winners

__all__ = ["Chunk", "Launches"]

# How many of the code tables a kernel reads.
_CODE_TABLES = {score_quantized: 1, requantize: 3}

# Elements of operands, and of products beside bf16 weights, that exist at once: 256 MB, or one layer's.
_AT_ONCE = 1 << 26


# The constants that a kernel is compiled for because of a tensor, the tensor's row, and the place of its first partial sum.
_Work = tuple[dict[str, Any], int, int]


class Chunk(NamedTuple):
    """Effective weights whose operands exist at once.

    Attributes:
        weights: The weights themselves, by their rows.
        pairs: Launches of ``move_pairs``, which write the operands.
        operands: Where X, Y and, of bf16 weights, ``X Y`` lie; to float32 weights it is added in place.
        late: Launches of bf16 weights, which read the products.
    """

    weights: dict[int, Tensor]
    pairs: list[Launch]
    operands: Layout
    late: list[Launch]


class Launches:
    """The tables and launches of a plan.

    Args:
        plan: The tensors.
        grads: The addresses of the gradients of its owned entries.
        device: The model's.

    Attributes:
        slots: How many partial sums ``moments`` write.
        sums: A launch over all experts, with the places of their partial sums.
    """

    def __init__(self, plan: StepPlan, grads: Sequence[int], device: torch.device):
        self._device, self._plan, self._entries = device, plan, plan.entries
        self._rows = [_row_of(entry) for entry in plan.entries]
        # Gradients of pairs are aligned in their buffer.
        self._grads = [address % ALIGNMENT == 0 for address in grads] + [True] * len(plan.gradients.offsets)
        self.moments, self.slots, self.sums = self._phase1()
        # Weights are all float32 or all bf16.
        self._late = set() if any(plan.entries[i].storage == FLOAT for i in plan.effective) else set(plan.effective)
        self.early = self._phase2(sorted(set(range(plan.owned)) - self._late), product=False)
        self.chunks = [self._chunk(*own) for own in self._cut()]
        self.rows = to_device(self._rows, torch.int64, device).view(-1, tables.ROW.value)
        self._sources = to_device([self._sources_of(i) for i in range(len(plan.entries))], torch.int64, device)
        self._scales = to_device([entry.scale for entry in plan.entries], torch.float32, device)

    def still_aligned(self, grads: Sequence[int]) -> bool:
        """Return whether gradients at other addresses are aligned where they were."""
        # A generator would cost calls.
        return True not in [aligned and x % ALIGNMENT != 0 for x, aligned in zip(grads, self._grads, strict=False)]

    def moves(self, won: Sequence[Tensor], corrections: Tensor, rates: Tensor) -> Tensor:
        """Return the table of what a step does with each tensor.

        Args:
            won: Which experts won, in pieces.
            corrections: ``1 - b1^t`` and ``1 - b2^t`` of every count, ``[counts, 2]``.
            rates: Learning rates of all entries, then their products with the weight decays, ``[2 S]`` float32.
        """
        return torch.cat([*won, corrections.float().view(-1), rates, self._scales]).take(self._sources)

    def _sources_of(self, i: int) -> list[int]:
        """Return where the columns of a row of ``moves`` come from, in the order of the latter's arguments."""
        count, entry = len(self._entries), self._entries[i]
        weight = entry.weight % count  # any row, where there is none
        corrections = self._plan.experts + 2 * entry.layer
        rates = self._plan.experts + 2 * len(self._plan.counts)
        own = [entry.expert, rates + i, rates + count + i, corrections, corrections + 1, rates + 2 * count + i]
        return [*own, self._entries[weight].expert, rates + count + weight]

    def _phase1(self) -> tuple[list[Launch], int, Launch]:
        """Return the launches that update moments, how many partial sums they write, and the launch that adds these."""
        experts, slot = self._plan.routed, 0
        found: list[_Work] = []
        counts = [0] * experts
        for i in sorted(range(len(self._entries)), key=lambda i: self._entries[i].expert):
            entry = self._entries[i]
            if entry.expert >= experts and entry.tensor.is_quantized:
                continue  # has no score, and phase 2 updates its moments
            found.append(({"HINT": self._hint(i, True), "BF16": entry.storage != FLOAT}, i, slot))
            slot += self._blocks(i)
            if entry.expert < experts:
                counts[entry.expert] += self._blocks(i)
        bounds = [(0, last - own, last) for own, last in zip(counts, accumulate(counts), strict=True)]
        table = to_device(bounds, torch.int64, self._device).view(-1, 3)
        return self._launches((update_moments, score_quantized), found), slot, Launch(sum_per_expert, [table], {})

    def _phase2(self, rows: Iterable[int], product: bool) -> list[Launch]:
        """Return the launches that move parameters, ``PRODUCT`` where a product is added."""
        found = []
        for i in rows:
            entry = self._entries[i]
            hint = self._hint(i, entry.tensor.is_quantized)
            found.append(({"HINT": hint, "STORAGE": entry.storage, "PRODUCT": product}, i, 0))
        return self._launches((move_winners, requantize), found)

    def _hint(self, i: int, reads_grad: bool, more: Iterable[int] = ()) -> int:
        """Return the elements of a vector load if a tensor (and ``more`` offsets) allow one, else 1: 16 bytes of the smallest."""
        row, x = self._rows[i], self._entries[i].tensor
        size, itemsize = (row[_COLUMNS], 1) if x.is_quantized else (row[_SIZE], x.param.itemsize)
        elements, addresses = ALIGNMENT // itemsize, all(address % ALIGNMENT == 0 for address in row[:_SIZE])
        aligned = addresses and (self._grads[i] or not reads_grad) and all(n % elements == 0 for n in (size, *more))
        return elements if aligned else 1

    def _blocks(self, i: int) -> int:
        """Return how many programs a tensor takes."""
        absmax = self._entries[i].tensor.exp_avg_absmax
        size, step = (self._rows[i][_SIZE], CHUNK) if absmax is None else (absmax.numel(), TILE)
        return -(-size // int(step.value))

    def _launches(self, kernels: Sequence[Any], found: Iterable[_Work]) -> list[Launch]:
        """Return a launch for all tensors of the same constants; the second kernel is for 8-bit moments."""
        kinds: dict[Any, list[tuple[int, int, int]]] = {}
        for constants, i, slot in found:
            key = (self._entries[i].tensor.is_quantized, *constants.items())
            kinds.setdefault(key, []).append((i, self._blocks(i), slot))
        made = []
        for (quantized, *constants), own in kinds.items():
            kernel, options = kernels[quantized], {"num_warps": WARPS} if quantized else {}
            codes = code_tables(self._device)[: _CODE_TABLES[kernel]] if quantized else ()
            blocks = to_device(blocks_of(own, (TILE if quantized else CHUNK).value), torch.int64, self._device)
            made.append(Launch(kernel, [*codes, blocks], dict(constants) | options))
        return made

    def _cut(self) -> list[tuple[dict[int, Tensor], Layout]]:
        """Place the operands of the effective weights, and the products of bf16 ones, in buffers that exist in turn."""
        rows = range(self._plan.owned, len(self._entries), 2)
        placed: list[tuple[dict[int, Tensor], Layout]] = []
        for number, own in groupby(rows, lambda a: self._entries[a].weight):
            pairs, param = list(own), self._entries[number].tensor.param.detach()
            (n_out, n_in), width = param.shape, 2 * sum(len(self._entries[a].tensor.param) for a in pairs)
            size = width * (n_out + n_in) + n_out * n_in * bool(self._late)
            if not placed or placed[-1][1].numel + size > _AT_ONCE:
                placed.append(({}, Layout(self._device)))
            weights, operands = placed[-1]
            weights[number] = param
            x, y = operands.place((number, "X"), (n_out, width)), operands.place((number, "Y"), (width, n_in))
            if self._late:
                self._rows[number][_OFFSET] = operands.place((number, "XY"), (n_out, n_in))
            for a in pairs:
                r = len(self._entries[a].tensor.param)
                self._rows[a][_COLUMNS], self._rows[a][_OFFSET:_GRAD] = r * n_in, [y, y + r * n_in, r * n_in, 0]
                self._rows[a + 1][_OFFSET:_GRAD] = [x, x + r, width, 1]
                x, y = x + 2 * r, y + 2 * r * n_in
        return placed

    def _chunk(self, weights: dict[int, Tensor], operands: Layout) -> Chunk:
        """Return the launches of effective weights whose operands have their places."""
        found: list[_Work] = []
        for i in range(self._plan.owned, len(self._entries)):
            if self._entries[i].weight in weights:
                places = self._rows[i][_COLUMNS], *self._rows[i][_OFFSET:_IS_B]
                found.append(({"HINT": self._hint(i, False, places)}, i, 0))
        late = self._phase2(weights if self._late else [], product=True)
        return Chunk(weights, self._launches([move_pairs], found), operands, late)


_SIZE, _COLUMNS, _OFFSET, _IS_B, _GRAD = (
    int(column.value) for column in (tables.SIZE, tables.COLUMNS, tables.OFFSET, tables.IS_B, tables.GRAD)
)


def _row_of(entry: Entry) -> list[int]:
    """Return a row of ``rows``, but for what the merged form's chunks put in."""
    x, param = entry.tensor, entry.tensor.param
    tensors = (param, x.exp_avg, x.exp_avg_sq, x.low, x.exp_avg_absmax, x.exp_avg_sq_absmax)
    columns = param.numel() // max(1, len(param)) if param.ndim else 1
    sizes = (param.numel(), columns, entry.stream, int(entry.counted), int(entry.effective and entry.counted))
    return [*(0 if one is None else one.data_ptr() for one in tensors), *sizes, 0, 0, 0, 0, 0]
