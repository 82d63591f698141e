"""The tables of a plan on the device, and its launches. Made once, and again when something has moved."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from molf.kernels import tables
from molf.kernels.layout import Layout
from molf.kernels.plan import Entry, StepPlan
from molf.kernels.quantized import WARPS
from molf.kernels.tables import ALIGNMENT, CHUNK, CODES, GRADIENTS, TILE, Launch, blocks_of, to_device
from molf.kernels.winners import FLOAT

__all__ = ["Chunk", "Launches"]

# Elements of operands, and of products beside bf16 weights, that exist at once: 256 MB, or one layer's.
_AT_ONCE = 1 << 26


class Chunk(NamedTuple):
    """Effective weights whose operands exist at once.

    Attributes:
        weights: The weights themselves.
        pairs: Launches of ``move_pairs``, which write the operands.
        operands: Where X and Y of the weights lie, in turn.
        products: Where ``X Y`` of bf16 weights lies; empty for float32 ones, to which it is added in place.
        late: Launches of bf16 weights, which read the products.
    """

    weights: list[Tensor]
    pairs: list[Launch]
    operands: Layout
    products: Layout
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
        late = {i for i in plan.effective if plan.entries[i].storage != FLOAT}
        self.early = self._phase2([i for i in range(plan.owned) if i not in late], product=False)
        self.chunks = [self._chunk(layers) for layers in self._cut(late)]
        self.rows = to_device(self._rows, torch.int64, device)
        self._sources = to_device([self._sources_of(i) for i in range(len(plan.entries))], torch.int64, device)
        self._scales = to_device([entry.scale for entry in plan.entries], torch.float32, device)

    def still_aligned(self, grads: Sequence[int]) -> bool:
        """Return whether gradients at other addresses are aligned where they were."""
        for address, aligned in zip(grads, self._grads, strict=False):  # noqa: SIM110 - a generator would cost calls
            if aligned and address & (ALIGNMENT - 1):
                return False
        return True

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
        experts, found, slot = self._plan.routed, [], 0
        bounds = [[0, 0, 0] for _ in range(experts)]
        for i in sorted(range(len(self._entries)), key=lambda i: self._entries[i].expert):
            entry = self._entries[i]
            if entry.expert >= experts and entry.tensor.is_quantized:
                continue  # has no score, and phase 2 updates its moments
            found.append(({**self._kind(i, min(4, entry.grad.itemsize), True), "GRAD": GRADIENTS[entry.grad]}, i, slot))
            count = self._blocks(i)
            if entry.expert < experts:
                own = bounds[entry.expert]
                own[1:] = own[1] if own[2] else slot, slot + count
            slot += count
        return self._launches(found), slot, Launch(to_device(bounds, torch.int64, self._device).view(-1, 3), {})

    def _phase2(self, rows: Iterable[int], product: bool) -> list[Launch]:
        """Return the launches that move parameters, ``PRODUCT`` where a product is added."""
        found = []
        for i in rows:
            entry = self._entries[i]
            kind = self._kind(i, entry.tensor.param.element_size(), entry.tensor.is_quantized)
            if entry.tensor.is_quantized:
                kind["GRAD"] = GRADIENTS[entry.grad]
            found.append(({**kind, "STORAGE": entry.storage, "PRODUCT": product}, i, 0))
        return self._launches(found)

    def _kind(self, i: int, itemsize: int, reads_grad: bool) -> dict[str, Any]:
        """Return the constants that kernels are compiled for because of a tensor's moments and alignment."""
        row = self._rows[i]
        if not self._entries[i].tensor.is_quantized:
            return {"HINT": self._hint(i, [row[_SIZE]], itemsize, reads_grad)}
        return {"HINT": self._hint(i, [row[_COLUMNS]], 1, reads_grad), "num_warps": WARPS}

    def _hint(self, i: int, multiples: Iterable[int], itemsize: int, reads_grad: bool) -> int:
        """Return the elements of a vector load if a tensor allows one, else 1: of 16 bytes of its smallest elements."""
        elements = ALIGNMENT // itemsize
        addresses = all(address % ALIGNMENT == 0 for address in self._rows[i][:_SIZE])
        aligned = addresses and (self._grads[i] or not reads_grad) and all(n % elements == 0 for n in multiples)
        return elements if aligned else 1

    def _blocks(self, i: int) -> int:
        """Return how many programs a tensor takes."""
        size, columns = self._rows[i][_SIZE], max(1, self._rows[i][_COLUMNS])
        if self._entries[i].tensor.is_quantized:
            return -(-(size // columns * -(-columns // int(CODES.value))) // int(TILE.value))
        return -(-size // int(CHUNK.value))

    def _launches(self, found: Iterable[tuple[dict[str, Any], int, int]]) -> list[Launch]:
        """Return a launch for all tensors of the same constants; given with each is the place of its first partial sum."""
        kinds: dict[tuple[tuple[str, Any], ...], list[tuple[int, int, int]]] = {}
        for constants, i, slot in found:
            kinds.setdefault(tuple(constants.items()), []).append((i, self._blocks(i), slot))
        made = []
        for kind, own in kinds.items():
            quantized = ("num_warps", WARPS) in kind
            blocks = blocks_of(own, (TILE if quantized else CHUNK).value)
            made.append(Launch(to_device(blocks, torch.int64, self._device), dict(kind), quantized))
        return made

    def _cut(self, late: set[int]) -> list[list[int]]:
        """Cut the numbers of the effective weights into chunks; ``late`` ones need room for a product, too."""
        width = [0] * len(self._plan.effective)
        for pair in self._plan.pairs:
            width[pair.layer] += 2 * len(pair.A)
        chunks: list[list[int]] = []
        taken = _AT_ONCE
        for k, weight in enumerate(self._plan.effective):
            n_out, n_in = self._entries[weight].tensor.param.shape
            size = width[k] * (n_out + n_in) + n_out * n_in * (weight in late)
            if taken + size > _AT_ONCE:
                chunks.append([])
                taken = 0
            chunks[-1].append(k)
            taken += size
        return chunks

    def _chunk(self, layers: Sequence[int]) -> Chunk:
        """Place the operands and products of some effective weights."""
        plan, operands = self._plan, Layout(self._device)
        products = Layout(self._device, multiple=16)  # as wide as rows of codes are read
        weights, late, found = [], [], []
        for k in layers:
            weight = plan.effective[k]
            entry = self._entries[weight]
            n_out, n_in = entry.tensor.param.shape
            pairs = [(plan.owned + 2 * j, len(pair.A)) for j, pair in enumerate(plan.pairs) if pair.layer == k]
            width = 2 * sum(r for _, r in pairs)
            x, y = operands.place((n_out, width)), operands.place((width, n_in))
            weights.append(entry.tensor.param.detach())
            if entry.storage != FLOAT:
                self._rows[weight][_OFFSET] = products.place((n_out, n_in))
                late.append(weight)
            for a, r in pairs:
                for i, columns, first, second, stride in (
                    (a, r * n_in, y, y + r * n_in, r * n_in),
                    (a + 1, r, x, x + r, width),
                ):
                    self._rows[i][_COLUMNS] = columns
                    self._rows[i][_OFFSET:] = [first, second, stride, i - a]
                    hint = self._hint(i, (self._rows[i][_SIZE], columns, first, second, stride), 4, False)
                    found.append(({"HINT": hint}, i, 0))
                x, y = x + 2 * r, y + 2 * r * n_in
        return Chunk(weights, self._launches(found), operands, products, self._phase2(late, True))


_SIZE, _COLUMNS, _OFFSET = int(tables.SIZE.value), int(tables.COLUMNS.value), int(tables.OFFSET.value)


def _row_of(entry: Entry) -> list[int]:
    """Return a row of ``rows``, but for what the merged form's chunks put in."""
    x, param = entry.tensor, entry.tensor.param
    tensors = (param, x.exp_avg, x.exp_avg_sq, x.low, x.exp_avg_absmax, x.exp_avg_sq_absmax)
    columns = param.numel() // max(1, len(param)) if param.ndim else 1
    sizes = (param.numel(), columns, entry.stream, int(entry.counted), int(entry.effective and entry.counted))
    return [*(0 if one is None else one.data_ptr() for one in tensors), *sizes, 0, 0, 0, 0]
