"""Images of many models and requests, sampled together.

A `Batch` is one composition: which rows stand where, and every index that a step needs. It is
made anew when a request comes or goes; a step itself does no Python work per row.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from learngenes import mixed
from learngenes.config import DType, Kind, NetworkConfig
from learngenes.device import begin_step, compiled, compute_dtype, kept, padded, varying
from learngenes.dit import sinusoidal_timesteps
from learngenes.factors import Scales, materialise, stored
from learngenes.family import Family
from learngenes.mixed import BLOCK_KINDS
from learngenes.schedules import COLUMNS, Schedule

SPARE_RANKS = 8


@dataclass(frozen=True)
class Kernels:
    """The functions of `learngenes.mixed` that a step calls, as they are or compiled."""

    materialised_block: Callable[..., Tensor] = mixed.materialised_block
    factored_block: Callable[..., Tensor] = mixed.factored_block
    finish: Callable[..., tuple[Tensor, Tensor]] = mixed.finish

    @classmethod
    def compiled(cls, device: torch.device) -> "Kernels":
        return cls(
            compiled(mixed.materialised_block, device),
            compiled(mixed.factored_block, device),
            compiled(mixed.finish, device),
        )

    def warm_up(self, shared: "SharedWeights") -> None:
        """Compile whatever a batch of this family and dtype can call.

        torch.compile makes a kernel of its own for a size of one, so each is called with one
        model, row or image and with several (and for tensors that are the same one, so none are);
        all other sizes that vary are marked.
        """
        network, dtype = shared.network, shared.compute
        d, t = network.width, network.tokens
        picture = (network.in_channels, network.sample_size, network.sample_size)

        def zeros(*shape: int, dtype: torch.dtype = dtype, dims: tuple[int, ...] = (0,)) -> Tensor:
            return varying(torch.zeros(shape, dtype=dtype, device=shared.device), dims)

        for models, rows in ((1, 6), (3, 4), (3, 1)):
            self.materialised_block(
                zeros(models, rows, t, d, dims=(0, 1)),
                zeros(models, rows, 6 * d, dims=(0, 1)),
                tuple(zeros(models, n, m) for m, n in (kind.shape(d) for kind in BLOCK_KINDS)),
                zeros(models, 9 * d),
                shared.heads,
            )
        rows, rank = 6, min(5, network.rank)
        self.factored_block(
            zeros(rows, t, d),
            zeros(rows, 6 * d),
            shared.block_factors,
            zeros(rows, len(BLOCK_KINDS), rank, dims=(0, 2)),
            zeros(rows, 9 * d),
            shared.heads,
        )
        for images in (1, 3):
            self.finish(
                zeros(rows, t, d),
                varying(zeros(rows, 6 * d)[:, : 2 * d], (0,)),
                shared.final,
                shared.final_bias,
                zeros(images, *picture, dtype=torch.float32),
                zeros(images, *picture, dtype=torch.float32),
                zeros(images, len(COLUMNS), dtype=torch.float32),
                zeros(images, dtype=torch.float32),
                zeros(images, dtype=torch.long),
                zeros(images, dtype=torch.long),
            )


def nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


class SharedWeights:
    """What all models of a family that are stored in one dtype have in common.

    The rank matters for int8 alone, whose scales are those of one rank prefix. Its matrices are
    kept in what is computed in, like all others: they are shared by every model.
    """

    def __init__(self, family: Family, dtype: DType, rank: int | None = None) -> None:
        self.family, self.dtype = family, dtype
        self.network: NetworkConfig = family.manifest.network
        self.device = family.stem.positions.device
        self.compute = compute_dtype(dtype, self.device)
        self.factors = {kind: self._factors(kind, rank or self.network.rank) for kind in Kind}
        self.block_factors = tuple(self.factors[kind] for kind in BLOCK_KINDS)
        stem = family.stem
        self.heads = self.network.num_attention_heads
        self.positions = stem.positions
        self.patch = stem.patch.weight.flatten(1).T.to(self.compute).contiguous()  # (P, D)
        assert stem.patch.bias is not None
        self.patch_bias = stem.patch.bias.detach()
        self.final = stem.final.weight.T.to(self.compute).contiguous()  # (D, P)
        self.final_bias = stem.final.bias.detach()

    def _factors(self, kind: Kind, rank: int) -> tuple[Tensor, Tensor]:
        """V (n, r) and U^T (r, m); zero beyond `rank`, so that all have the same shape.

        A rank's prefix is never the whole: a compiled kernel would tell the two apart.
        """
        genes = self.family.genes
        u = stored(genes.u[kind].detach()[:, :rank], self.dtype, self.compute)
        vt = stored(genes.v[kind].detach()[:, :rank].T, self.dtype, self.compute)
        if self.dtype is DType.INT8:
            u, vt = u.dequantize(), vt.dequantize()
        beyond = (0, 0, 0, self.network.rank + SPARE_RANKS - rank)
        ut = F.pad(u.to(self.compute).T, beyond)
        return F.pad(vt.to(self.compute), beyond).T.contiguous(), ut.contiguous()

    @property
    def nbytes(self) -> int:
        own = (self.patch, self.final, *itertools.chain(*self.factors.values()))
        return nbytes(own)


class ModelWeights:
    """What one model owns: Sigma and biases; and W of each layer, once it is materialised."""

    def __init__(self, shared: SharedWeights, scales: Scales) -> None:
        self.shared = shared
        self.depth, self.rank = scales.depth, scales.rank
        tensors = {
            name: tensor.to(shared.device, shared.compute)
            for name, tensor in scales.stacked().items()
        }
        self.sigma = torch.stack([tensors[f"sigma.{kind}"] for kind in BLOCK_KINDS], dim=1)
        self.bias = torch.cat([tensors[f"bias.{kind}"] for kind in BLOCK_KINDS], dim=1)
        self.adaln_sigma = tensors[f"sigma.{Kind.ADALN}"]
        self.adaln_bias = tensors[f"bias.{Kind.ADALN}"]
        self.used_at = 0
        """For whoever has to choose which model is to go."""
        self.materialised: tuple[Tensor, ...] | None = None
        """W^T of each of BLOCK_KINDS, (L, n, m)."""

    @property
    def nbytes(self) -> int:
        return nbytes((self.sigma, self.bias, self.adaln_sigma, self.adaln_bias))

    @property
    def materialised_nbytes(self) -> int:
        d, element = self.shared.network.width, self.bias.element_size()
        return self.depth * element * sum(math.prod(kind.shape(d)) for kind in BLOCK_KINDS)

    def materialise(self) -> None:
        """Write every W out, as `serving_layers` does."""
        shared, genes = self.shared, self.shared.family.genes
        written = []
        for index, kind in enumerate(BLOCK_KINDS):
            u, v = (side[kind].detach()[:, : self.rank] for side in (genes.u, genes.v))
            layers = [
                stored(materialise(u, self._sigma(index)[layer], v), shared.dtype, shared.compute)
                for layer in range(self.depth)
            ]
            written.append(torch.stack([w.T.to(shared.compute) for w in layers]))
        self.materialised = tuple(written)

    def _sigma(self, index: int) -> Tensor:
        return self.sigma[:, index].float()

    def modulations(self, timesteps: Tensor, class_label: int) -> Tensor:
        """Of every step and layer in one product: (S, L + 1, 6D).

        V's side is the same for all layers. The last entry of a step is the final layer's, 2D.
        """
        shared, stem = self.shared, self.shared.family.stem
        times = stem.time_out(F.silu(stem.time_in(sinusoidal_timesteps(timesteps))))
        conditioning = F.silu(times + stem.classes.weight[class_label])  # (S, D)
        v, ut = (factor.float() for factor in shared.factors[Kind.ADALN])
        reduced = conditioning @ v[:, : self.rank]  # (S, r)
        scaled = reduced[:, None] * self.adaln_sigma.float()  # (S, L, r)
        layers = scaled @ ut[: self.rank] + self.adaln_bias.float()
        final = stem.final_modulation(conditioning)
        padded_final = F.pad(final, (0, layers.shape[2] - final.shape[1]))
        return torch.cat([layers, padded_final[:, None]], dim=1).to(shared.compute)


@dataclass(eq=False)
class Part:
    """Images that one request has in a batch, and where they stand."""

    model: ModelWeights
    schedule: Schedule
    coefficients_at: int
    """Of its first step, in the batch's table of coefficients."""
    conditional_at: list[int]
    """Of each image's first step, in the batch's table of modulations."""
    unconditional_at: int | None
    """None when there is no guidance."""
    guidance_scale: float
    x: Tensor
    """(I, C, H, W) float32."""
    previous: Tensor
    """x0 of the last step."""
    steps_before: int = 0
    batch: "Batch | None" = None
    """Which has its images now, and has run some more steps."""

    @property
    def done_steps(self) -> int:
        return self.steps_before + (self.batch.steps_run if self.batch else 0)

    @property
    def finished(self) -> bool:
        return self.done_steps == len(self.schedule)


@dataclass(frozen=True)
class Tables:
    """What a step looks up: of all schedules and modulations in use."""

    coefficients: Tensor
    """(…, 5) float32."""
    modulations: Tensor
    """(…, 6D)."""


Layer = Callable[[Tensor, Tensor], Tensor]
"""(tokens (N, T, D), modulation (N, 6D)) -> tokens."""


@dataclass(frozen=True)
class _Segment:
    """Rows that run through the same products, deepest first."""

    rows: int
    layers: list[tuple[int, int, Layer]]
    """Of each layer: rows that need it, rows it is run for, and the layer."""

    @classmethod
    def of(
        cls, depths: list[int], size: int, layer: Callable[[int, int], Layer], shared: SharedWeights
    ) -> "_Segment":
        """Slots of `size` rows each; `layer` makes the layer `index` for `count` slots."""
        layers = []
        for index in range(depths[0]):
            needed = sum(depth > index for depth in depths)
            count = needed
            while count < len(depths) and count * size < padded(needed * size, shared.device):
                count += 1
            layers.append((needed * size, count * size, layer(index, count)))
        return cls(len(depths) * size, layers)

    def run(self, h: Tensor, modulations: Tensor) -> list[Tensor]:
        """h: (rows, T, D); modulations: (L, rows, 6D) -> the rows again, in pieces."""
        ended: list[Tensor] = []
        left = self.rows
        for index, (needed, count, layer) in enumerate(self.layers):
            if needed < left:
                ended.append(h[needed:left])
                left = needed
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
        """`models` (they may repeat), deepest first, each at the place where its weights are."""
        models = sorted(models, key=lambda model: -model.depth)
        self._reserve(len(models), models[0].depth)
        placed = list(models)
        for _, run in itertools.groupby(range(len(models)), key=lambda i: models[i].depth):
            places = list(run)
            missing = Counter(models[i] for i in places)
            kept = []
            for i in places:
                held = self._held[i]
                if held is not None and missing[held] > 0:
                    missing[held] -= 1
                    placed[i] = held
                    kept.append(i)
            for i, model in zip(
                (i for i in places if i not in kept), missing.elements(), strict=True
            ):
                placed[i] = model
                self._put(i, model)
        return placed

    def layer(self, index: int, count: int) -> tuple[Tensor, ...]:
        """(count, n, m) of each kind."""
        return tuple(weight[index, :count] for weight in self._weights)

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
    """Of the present step."""
    model: ModelWeights
    conditional: bool


class Batch:
    """One composition of parts, all of models with the same SharedWeights.

    Parts keep their images here until `settle`.
    """

    _x: Tensor
    _previous: Tensor
    _image: Tensor
    """(N,) of each row."""
    _layer: Tensor
    """(L + 1, N) which of its model's modulations a row takes in each layer and the final one."""
    _modulation_at: Tensor
    """(N,) of its present step."""
    _modulation_stride: Tensor
    _coefficients_at: Tensor
    """(I,) of its present step."""
    _conditional: Tensor
    """(I,) the row of each image."""
    _unconditional: Tensor
    _guidance: Tensor

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
            rows += self._add_factored(group)
        if materialised:
            rows += self._add_materialised(materialised, stack)
        self._index(rows)
        for part in self.parts:
            part.batch = self

    @property
    def steps_left(self) -> int:
        """Until a part is finished."""
        return min(len(part.schedule) - part.done_steps for part in self.parts)

    def step(self) -> None:
        """One denoising step of every part. Nothing has changed if it raises."""
        kernels, shared, tables = self._kernels, self.shared, self._tables
        begin_step(shared.device)
        h = mixed.embed(
            self._x[self._image],
            shared.patch,
            shared.patch_bias,
            shared.positions,
            shared.network.patch_size,
        )
        modulations = tables.modulations[self._modulation_at + self._layer]  # (L + 1, N, 6D)
        pieces: list[Tensor] = []
        start = 0
        for segment in self._segments:
            end = start + segment.rows
            pieces += segment.run(h[start:end], modulations[:, start:end])
            start = end
        x, previous = kernels.finish(
            torch.cat(pieces) if len(pieces) > 1 else pieces[0],
            modulations[-1, :, : 2 * shared.network.width],
            shared.final,
            shared.final_bias,
            self._x,
            self._previous,
            tables.coefficients[self._coefficients_at],
            self._guidance,
            self._conditional,
            self._unconditional,
        )
        self._x, self._previous = kept(x), kept(previous)
        self._modulation_at += self._modulation_stride
        self._coefficients_at += 1
        self.steps_run += 1

    def settle(self) -> None:
        """Give the images back to their parts. The batch is of no use after it."""
        images = torch.split(self._x, self._sizes), torch.split(self._previous, self._sizes)
        for part, x, previous in zip(self.parts, *images, strict=True):
            part.x, part.previous = x, previous
            part.steps_before, part.batch = part.done_steps, None

    def predicted(self, part: Part) -> Tensor:
        """What the last step took the clean images of `part` to be: (I, C, H, W)."""
        return torch.split(self._previous, self._sizes)[self.parts.index(part)]

    def _rows(self) -> tuple[list[_Row], list[_Row]]:
        """Of models in factored and in materialised mode."""
        rows: tuple[list[_Row], list[_Row]] = [], []
        image = 0
        for part in self.parts:
            model = part.model
            chosen = rows[0] if model.materialised is None else rows[1]
            done = part.done_steps * (model.depth + 1)
            for at in part.conditional_at:
                chosen.append(_Row(image, at + done, model, True))
                if part.unconditional_at is not None:
                    chosen.append(_Row(image, part.unconditional_at + done, model, False))
                image += 1
        return rows

    def _of_one_width(self, rows: list[_Row]) -> list[list[_Row]]:
        """Factored rows that are run at one rank: all at the largest.

        To add products that are zero changes nothing, except in float32, where the order of a
        sum depends on its length: there each rank is run by itself.
        """
        if self.shared.compute != torch.float32:
            return [rows] if rows else []
        by_rank: dict[int, list[_Row]] = {}
        for row in rows:
            by_rank.setdefault(row.model.rank, []).append(row)
        return list(by_rank.values())

    def _add_factored(self, rows: list[_Row]) -> list[_Row]:
        shared, block = self.shared, self._kernels.factored_block
        rows.sort(key=lambda row: -row.model.depth)
        rows += [rows[-1]] * (padded(len(rows), shared.device) - len(rows))
        rank = max(row.model.rank for row in rows)
        factors = shared.block_factors
        bias, sigma = self._own([row.model for row in rows], rank)

        def layer(index: int, count: int) -> Layer:
            own = sigma[index, :count], bias[index, :count]
            return lambda h, modulation: block(h, modulation, factors, *own, shared.heads)

        self._segments.append(_Segment.of([row.model.depth for row in rows], 1, layer, shared))
        return rows

    def _add_materialised(self, rows: list[_Row], stack: Stack) -> list[_Row]:
        """Slots of as many rows as all models have a multiple of, each beside its W."""
        shared, block = self.shared, self._kernels.materialised_block
        of_model: dict[ModelWeights, list[_Row]] = {}
        for row in rows:
            of_model.setdefault(row.model, []).append(row)
        if len(of_model) == 1:
            rows += [rows[-1]] * (padded(len(rows), shared.device) - len(rows))
            size, slots = len(rows), [rows[0].model]
        else:
            size = math.gcd(*(len(rows) for rows in of_model.values()))
            wanted = [model for model, rows in of_model.items() for _ in range(len(rows) // size)]
            slots = stack.place(wanted)
            rows = [of_model[model].pop(0) for model in slots for _ in range(size)]
        bias, _ = self._own(slots, 0)

        def layer(index: int, count: int) -> Layer:
            own = bias[index, :count]
            if len(slots) > 1:
                weights = stack.layer(index, count)
            else:
                assert slots[0].materialised is not None
                weights = tuple(weight[index : index + 1] for weight in slots[0].materialised)

            def run(h: Tensor, modulation: Tensor) -> Tensor:
                by_slot = h.view(count, size, *h.shape[1:]), modulation.reshape(count, size, -1)
                return block(*by_slot, weights, own, shared.heads).flatten(0, 1)

            return run

        depths = [model.depth for model in slots]
        self._segments.append(_Segment.of(depths, size, layer, shared))
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
        return bias.transpose(0, 1)[:, index], sigma.transpose(0, 1)[:, index]

    def _index(self, rows: list[_Row]) -> None:
        """Where each row and image finds what it needs, as tensors."""

        def tensor(values: Iterable[float], dtype: torch.dtype = torch.long) -> Tensor:
            return torch.tensor(list(values), dtype=dtype).to(self.shared.device)

        self._sizes = [len(part.x) for part in self.parts]
        self._x = torch.cat([part.x for part in self.parts])
        self._previous = torch.cat([part.previous for part in self.parts])
        self._image = tensor(row.image for row in rows)
        self._modulation_at = tensor(row.modulation_at for row in rows)
        depths = tensor(row.model.depth for row in rows)
        self._modulation_stride = depths + 1
        layers = torch.arange(int(depths.max()) + 1, device=self.shared.device)
        self._layer = torch.minimum(layers[:, None], depths)  # the last is the final layer
        conditional: dict[int, int] = {}
        unconditional: dict[int, int] = {}
        for place, row in enumerate(rows):
            (conditional if row.conditional else unconditional).setdefault(row.image, place)
        images = range(len(self._x))
        self._conditional = tensor(conditional[i] for i in images)
        self._unconditional = tensor(unconditional.get(i, conditional[i]) for i in images)
        owner = [part for part in self.parts for _ in part.x]
        guidance = [p.guidance_scale if p.unconditional_at is not None else 1.0 for p in owner]
        self._guidance = tensor(guidance, torch.float32)
        self._coefficients_at = tensor(p.coefficients_at + p.done_steps for p in owner)
