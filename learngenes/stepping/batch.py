"""Images of many models and requests, sampled together.

A `Batch` is one composition: which rows stand where, and every index that a step needs. It is
made anew when a request comes or goes; a step itself does no Python work per row.
"""

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from learngenes.device import WholeStep
from learngenes.stepping.arithmetic import BLOCK_KINDS
from learngenes.stepping.kernels import Kernels
from learngenes.stepping.lanes import shares
from learngenes.stepping.schedules import Schedule
from learngenes.stepping.weights import ModelWeights, SharedWeights, nbytes


@dataclass(eq=False)
class Part:
    """Images that one request has in a batch, and where they stand."""

    model: ModelWeights
    schedule: Schedule
    coefficients_at: int
    """Place of its first step in the table of coefficients."""
    conditional_at: list[int]
    """Place of each image's first step in the table of modulations."""
    guided: range
    """Steps that are guided."""
    guide: ModelWeights
    """Model that guides: a smaller one, or this one without a class."""
    guide_at: list[int]
    """Place of each image's first step of the guide's; none without guidance."""
    guidance_scale: float
    x: Tensor
    """Noisy images (I, C, H, W), float32."""
    previous: Tensor
    """Clean images x0 that the last step predicted."""
    steps_before: int = 0
    batch: "Batch | None" = None
    """Batch that holds the images now and has run further steps."""

    @property
    def done_steps(self) -> int:
        return self.steps_before + (self.batch.steps_run if self.batch else 0)

    @property
    def finished(self) -> bool:
        return self.done_steps == len(self.schedule)

    @property
    def is_guided(self) -> bool:
        """Whether the next step is guided."""
        return self.done_steps in self.guided

    @property
    def steps_alike(self) -> int:
        """Number of steps until guidance begins or ends, or until the last one."""
        done, ends = self.done_steps, (self.guided.start, self.guided.stop, len(self.schedule))
        return min((end - done for end in ends if end > done), default=0)


@dataclass(frozen=True)
class Tables:
    """Tables that a step looks up: those of all schedules and modulations in use."""

    coefficients: Tensor
    """Coefficients of schedulers (…, 5), float32."""
    modulations: Tensor
    """adaLN modulations (…, 6D)."""


RunLayer = Callable[[Tensor, Tensor], Tensor]
"""Layer bound to its rows: (tokens (N, T, D), modulation (N, 6D)) -> tokens."""


@dataclass(frozen=True)
class _Segment:
    """Rows of a batch that run through the same products, deepest first."""

    at: slice
    layers: list[tuple[int, RunLayer]]
    """For each layer: rows that need it, and the layer."""

    @classmethod
    def of(
        cls,
        start: int,
        depths: list[int],
        size: int,
        layer: Callable[[int, int], RunLayer],
    ) -> "_Segment":
        """Slots of `size` rows from `start` on; `layer` makes layer `index` for `count` slots."""
        layers = []
        for index in range(depths[0]):
            count = sum(depth > index for depth in depths)
            layers.append((count * size, layer(index, count)))
        return cls(slice(start, start + len(depths) * size), layers)

    def run(self, h: Tensor, modulations: Tensor) -> list[Tensor]:
        """Run the layers on h (N, T, D) and modulations (L, N, 6D); returns its rows in pieces."""
        h, modulations = h[self.at], modulations[:, self.at]
        ended: list[Tensor] = []
        left = len(h)
        for index, (count, layer) in enumerate(self.layers):
            if count < left:
                ended.append(h[count:left])
                left = count
            h = layer(h[:count], modulations[index, :count])
        return [h[:left], *reversed(ended)]


class Stack:
    """W of several models, one after the other, so that one batched product takes them all.

    Models keep their place from one batch to the next where they can: to put one there costs
    a copy of its weights.
    """

    def __init__(self, shared: SharedWeights) -> None:
        self._shared = shared
        self._held: list[ModelWeights | None] = []
        self._weights: tuple[Tensor, ...] = ()

    @property
    def nbytes(self) -> int:
        return nbytes(self._weights)

    def place(self, models: Sequence[ModelWeights]) -> list[ModelWeights]:
        """Place `models` (they may repeat), deepest first; returns them by place."""
        models = sorted(models, key=lambda model: -model.depth)
        self._reserve(len(models), models[0].depth)
        placed = list(models)
        for _, run in itertools.groupby(range(len(models)), key=lambda i: models[i].depth):
            places = list(run)
            missing = Counter(models[i] for i in places)
            left = []
            for i in places:
                held = self._held[i]
                if held is not None and missing[held] > 0:
                    missing[held] -= 1
                    placed[i] = held
                else:
                    left.append(i)
            for i, model in zip(left, missing.elements(), strict=True):
                placed[i] = model
                self._put(i, model)
        return placed

    def layer(self, index: int, start: int, count: int) -> tuple[Tensor, ...]:
        """W^T (count, n, m) of each kind, from place `start` on."""
        return tuple(weight[index, start : start + count] for weight in self._weights)

    def clear(self) -> None:
        self._held, self._weights = [], ()

    def _put(self, place: int, model: ModelWeights) -> None:
        assert model.materialised is not None
        for stack, weight in zip(self._weights, model.materialised, strict=True):
            stack[: model.depth, place] = weight
        self._held[place] = model

    def _reserve(self, count: int, depth: int) -> None:
        if self._weights and count <= len(self._held) and depth <= len(self._weights[0]):
            return
        count = 1 << (count - 1).bit_length()
        depth = max(depth, self._shared.family.manifest.sizes.depths[-1])
        d, shared = self._shared.network.width, self._shared
        self._held = [None] * count
        self._weights = tuple(
            torch.zeros(depth, count, n, m, dtype=shared.compute, device=shared.device)
            for m, n in (kind.shape(d) for kind in BLOCK_KINDS)
        )


class _Row(NamedTuple):
    image: int
    modulation_at: int
    """Place of the present step's modulation."""
    model: ModelWeights
    conditional: bool


class Batch:
    """Composition of parts that have the same SharedWeights; holds their images until `settle`."""

    def __init__(
        self, parts: Sequence[Part], tables: Tables, stack: Stack, kernels: Kernels
    ) -> None:
        self.parts = list(parts)
        self.shared = parts[0].model.shared
        self.steps_run = 0
        self._tables, self._kernels = tables, kernels
        self._segments: list[_Segment] = []
        rows: list[_Row] = []
        factored, materialised = self._rows()
        for group in self._of_one_width(factored):
            rows += self._add_factored(len(rows), group)
        if materialised:
            rows += self._add_materialised(len(rows), materialised, stack)
        self._index(rows)
        self._whole_step = WholeStep(self._advance, self.shared.device)
        self._guided = [part.is_guided for part in self.parts]
        for part in self.parts:
            part.batch = self

    def _index(self, rows: list[_Row]) -> None:
        """Make the index tensors, by which N rows and I images find what they need."""

        def tensor(values: Iterable[float], dtype: torch.dtype = torch.long) -> Tensor:
            return torch.tensor(list(values), dtype=dtype).to(self.shared.device)

        self._sizes = [len(part.x) for part in self.parts]
        self._x = torch.cat([part.x for part in self.parts])
        self._previous = torch.cat([part.previous for part in self.parts])
        self._image = tensor(row.image for row in rows)  # (N,)
        self._modulation_at = tensor(row.modulation_at for row in rows)  # of the present step, (N,)
        depths = tensor(row.model.depth for row in rows)
        self._modulation_stride = depths + 1
        layers = torch.arange(int(depths.max()) + 1, device=self.shared.device)
        self._layer = torch.minimum(layers[:, None], depths)  # (L + 1, N), the final layer last
        conditional: dict[int, int] = {}
        unconditional: dict[int, int] = {}
        for place, row in enumerate(rows):
            (conditional if row.conditional else unconditional).setdefault(row.image, place)
        images = range(len(self._x))
        self._conditional = tensor(conditional[i] for i in images)  # row of each image, (I,)
        self._unconditional = tensor(unconditional.get(i, conditional[i]) for i in images)
        owner = [part for part in self.parts for _ in part.x]
        guidance = [part.guidance_scale if part.is_guided else 1.0 for part in owner]
        self._guidance = tensor(guidance, torch.float32)
        self._coefficients_at = tensor(p.coefficients_at + p.done_steps for p in owner)

    @property
    def steps_left(self) -> int:
        """Number of steps until a part is finished, or is guided otherwise."""
        return min(part.steps_alike for part in self.parts)

    @property
    def is_over(self) -> bool:
        """Whether a part is finished, or is to be guided otherwise: it needs another batch."""
        return any(part.finished for part in self.parts) or self._guided != [
            part.is_guided for part in self.parts
        ]

    def step(self) -> None:
        """Run one denoising step of every part; nothing has changed if it raises."""
        self._whole_step()
        self.steps_run += 1

    def _advance(self) -> None:
        """Make the images those of the next step, in place."""
        kernels, shared, tables = self._kernels, self.shared, self._tables
        h = kernels.embed(self._x[self._image], *shared.embedder)
        modulations = tables.modulations[self._modulation_at + self._layer]  # (L + 1, N, 6D)
        runs = [functools.partial(segment.run, h, modulations) for segment in self._segments]
        pieces = list(itertools.chain(*kernels.lanes.run(runs)))
        x, previous = kernels.finish(
            torch.cat(pieces) if len(pieces) > 1 else pieces[0],
            modulations[-1, :, : 2 * shared.network.width],
            *shared.final,
            self._x,
            self._previous,
            tables.coefficients[self._coefficients_at],
            self._guidance,
            self._conditional,
            self._unconditional,
        )
        self._x.copy_(x)
        self._previous.copy_(previous)
        self._modulation_at += self._modulation_stride
        self._coefficients_at += 1

    def settle(self) -> None:
        """Give the images back to their parts; the batch is of no use afterwards."""
        images = torch.split(self._x, self._sizes), torch.split(self._previous, self._sizes)
        for part, x, previous in zip(self.parts, *images, strict=True):
            part.x, part.previous = x, previous
            part.steps_before, part.batch = part.done_steps, None

    def predicted(self, part: Part) -> Tensor:
        """Clean images (I, C, H, W) of `part` that the last step predicted; until the next one."""
        return torch.split(self._previous, self._sizes)[self.parts.index(part)]

    def _rows(self) -> tuple[list[_Row], list[_Row]]:
        rows: tuple[list[_Row], list[_Row]] = [], []
        image = 0
        for part in self.parts:
            guiding = part.guide_at if part.is_guided else [None] * len(part.conditional_at)
            for at, guide_at in zip(part.conditional_at, guiding, strict=True):
                for model, first, conditional in (
                    (part.model, at, True),
                    (part.guide, guide_at, False),
                ):
                    if first is not None:
                        chosen = rows[0] if model.materialised is None else rows[1]
                        now = first + part.done_steps * (model.depth + 1)
                        chosen.append(_Row(image, now, model, conditional))
                image += 1
        return rows

    def _of_one_width(self, rows: list[_Row]) -> list[list[_Row]]:
        """Groups of factored rows that run at one rank: usually all, at the largest.

        To add products that are zero changes nothing, except in float32, where the order of a
        sum depends on its length: there each rank is run by itself.
        """
        if self.shared.compute != torch.float32:
            return [rows] if rows else []
        by_rank: dict[int, list[_Row]] = {}
        for row in rows:
            by_rank.setdefault(row.model.rank, []).append(row)
        return list(by_rank.values())

    def _add_factored(self, start: int, rows: list[_Row]) -> list[_Row]:
        shared, block = self.shared, self._kernels.factored_block
        rows.sort(key=lambda row: -row.model.depth)
        rank = max(row.model.rank for row in rows)
        factors = shared.block_factors
        bias, sigma = self._own([row.model for row in rows], rank)

        def layer(index: int, at: int, count: int) -> RunLayer:
            own = sigma[index, at : at + count], bias[index, at : at + count]
            return lambda h, modulation: block(h, modulation, factors, *own, shared.heads)

        self._add_segments(start, [row.model.depth for row in rows], 1, layer)
        return rows

    def _add_segments(
        self, start: int, depths: list[int], size: int, layer: Callable[[int, int, int], RunLayer]
    ) -> None:
        """Add a segment per lane; `layer` makes layer `index` for `count` slots from one on."""
        for share in shares(depths, self._kernels.lanes.count):

            def of_share(index: int, count: int, at: int = share.start) -> RunLayer:
                return layer(index, at, count)

            first = start + share.start * size
            self._segments.append(_Segment.of(first, depths[share], size, of_share))

    def _add_materialised(self, start: int, rows: list[_Row], stack: Stack) -> list[_Row]:
        """Add slots whose number of rows divides that of every model, each with its model's W."""
        shared, block = self.shared, self._kernels.materialised_block
        of_model: dict[ModelWeights, list[_Row]] = {}
        for row in rows:
            of_model.setdefault(row.model, []).append(row)
        if len(of_model) == 1:
            size, slots = 1, [row.model for row in rows]
        else:
            size = math.gcd(*(len(rows) for rows in of_model.values()))
            wanted = [model for model, rows in of_model.items() for _ in range(len(rows) // size)]
            slots = stack.place(wanted)
            rows = [of_model[model].pop(0) for model in slots for _ in range(size)]
        one = slots[0].materialised if len(of_model) == 1 else None
        bias, _ = self._own(slots if one is None else slots[:1], 0)

        def layer(index: int, at: int, count: int) -> RunLayer:
            if one is None:
                weights, models, own = stack.layer(index, at, count), count, bias[index, at:]
            else:  # all rows of the share beside the same W
                weights, models, own = tuple(w[index : index + 1] for w in one), 1, bias[index]

            def run(h: Tensor, modulation: Tensor) -> Tensor:
                each = len(h) // models
                by_model = h.view(models, each, *h.shape[1:]), modulation.reshape(models, each, -1)
                return block(*by_model, weights, own[:models], shared.heads).flatten(0, 1)

            return run

        self._add_segments(start, [model.depth for model in slots], size, layer)
        return rows

    def _own(self, owners: list[ModelWeights], rank: int) -> tuple[Tensor, Tensor]:
        """Biases (L, N, 9D) and Sigma up to `rank` (L, N, 4, rank) of N owners' layers."""
        models = list(dict.fromkeys(owners))
        depth = max(model.depth for model in models)
        like = models[0].bias
        bias = like.new_zeros(len(models), depth, like.shape[1])
        sigma = like.new_zeros(len(models), depth, len(BLOCK_KINDS), rank)
        for i, model in enumerate(models):
            bias[i, : model.depth] = model.bias
            if rank:
                sigma[i, : model.depth, :, : model.rank] = model.sigma
        place = {model: i for i, model in enumerate(models)}
        index = torch.tensor([place[model] for model in owners], device=like.device)

        def of_owners(values: Tensor) -> Tensor:
            # contiguous: to one owner's slice with other strides no compiled kernel would apply
            return values.transpose(0, 1)[:, index].contiguous()

        return of_owners(bias), of_owners(sigma)
