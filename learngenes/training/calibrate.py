"""Measure a family's quality table."""

import itertools
import operator
from collections.abc import Callable, Sequence

from learngenes.config import SHARED_MODES, DType, Mode, Size, SizeSpace, executable
from learngenes.family.family import Family
from learngenes.model.diffusion import heldout_loss, noise_process
from learngenes.model.factors import DenseLayers, Own, Scales
from learngenes.sizing.quality import QualityTable
from learngenes.training.pictures import OnPictures, PicturesConfig, measure_pictures
from learngenes.training.refine import Refined, RefinementConfig, refine
from learngenes.training.retrain import Retrained, RetrainingConfig, retrain
from learngenes.training.tuning import split_heldout

FLOAT = DType.FLOAT32
MOST_LAYER_SECONDS = 60.0
"""Most seconds in which layers are trained for one loss; a build takes as long by default."""
MOST_BETWEEN = 2
"""Most sizes with which the table's error is measured."""
OnSize = Callable[[int, int, Size, float, float], None]
"""Callback with (sizes done, in all, the size, its loss unretrained, its loss retrained)."""


def spread(values: Sequence[int], points: int) -> tuple[int, ...]:
    """At most `points` of `values`, evenly spaced, with both ends."""
    if len(values) <= points:
        return tuple(values)
    last = len(values) - 1
    return tuple(values[round(i * last / (points - 1))] for i in range(points))


def calibrate(
    family: Family,
    config: RetrainingConfig,
    points: int = 4,
    on_size: OnSize = lambda *_: None,
    pictures: PicturesConfig | None = None,
    on_pictures: OnPictures = lambda *_: None,
) -> QualityTable:
    """Losses over a grid of at most `points` depths and ranks, each size retrained, and what
    `pictures` of them are worth.

    Imported layers at as many depths, trained as long; nothing shared where nothing is fitted.
    """
    sizes, width = family.manifest.sizes, family.manifest.network.width
    depths, ranks = (spread(v, points) for v in (sizes.depths, sizes.ranks))
    shared = [
        [Size(depth=depth, rank=rank) for rank in ranks]
        for depth in depths
        if family.manifest.trained_steps or family.imported is None
    ]
    imported = [Size(depth=depth, rank=width) for depth in depths if family.imported is not None]
    losses: list[Retrained | Refined] = []

    def told(size: Size, result: Retrained | Refined) -> None:
        losses.append(result)
        of = sum(map(len, shared)) + len(imported)
        on_size(len(losses), of, size, result.initial_heldout_loss, result.heldout_loss)

    results: list[list[Retrained]] = []
    for row in shared:
        results.append([])
        for size in row:
            result = retrain(family, family.scales_of(size), config)
            results[-1].append(result)
            told(size, result)
    by_depth: dict[int, float] = {}
    for size in imported:
        refined = _trained_layers(family, family.own_of(size, Mode.DENSE, FLOAT), config)
        by_depth[size.depth] = refined.heldout_loss
        told(size, refined)
    ratios: dict[Mode, dict[DType, float]] = {mode: {} for mode in Mode}
    if results:
        corners = [results[-1][0].scales, results[-1][-1].scales]
        for mode in SHARED_MODES:
            ratios[mode] = loss_ratios(family, corners, config, mode)
    if family.imported is not None:
        full = family.full_own(Mode.DENSE)
        ratios[Mode.DENSE] = loss_ratios(family, [full], config, Mode.DENSE)
    written = ratios[Mode.MATERIALISED].items()
    table = QualityTable(
        depths=depths if results else (),
        ranks=ranks if results else (),
        unretrained=tuple(tuple(r.initial_heldout_loss for r in row) for row in results),
        retrained=tuple(tuple(r.heldout_loss for r in row) for row in results),
        dtype_loss_ratios=ratios[Mode.FACTORED],
        materialised_loss_ratios={d: ratio for d, ratio in written if d.bits is not None},
        imported=by_depth,
        imported_loss_ratios=ratios[Mode.DENSE],
        source=f"held-out denoising loss, {config.steps} steps of Sigma retraining",
    )
    if pictures is None or not results:
        return table
    models = dict(
        zip(itertools.chain(*shared), (r.scales for r in itertools.chain(*results)), strict=True)
    )
    between = {
        size: retrain(family, family.scales_of(size), config).scales
        for size in _between(sizes, table)
    }
    worth = measure_pictures(family, table, models, between, pictures, on_pictures)
    return table.model_copy(update={"pictures": worth})


def _between(sizes: SizeSpace, table: QualityTable) -> list[Size]:
    """Sizes between the grid's points, with which what is between them is judged."""
    depths, ranks = (
        spread([value for value in every if value not in known], MOST_BETWEEN)
        for every, known in ((sizes.depths, table.depths), (sizes.ranks, table.ranks))
    )
    if depths and not ranks:  # of a family that has one rank, say
        ranks = table.ranks[-1:] * len(depths)
    if ranks and not depths:
        depths = table.depths[-1:] * len(ranks)
    return [Size(depth=depth, rank=rank) for depth, rank in zip(depths, ranks, strict=False)]


def _trained_layers(
    family: Family, own: Own, config: RetrainingConfig, dtype: DType = FLOAT
) -> Refined:
    """Layers trained as in a build, but for as many steps as Sigma and a minute at most."""
    whole = own.depth == family.full_size.depth and dtype.bits is None
    seconds = min(config.max_seconds, MOST_LAYER_SECONDS)
    if whole or not seconds:
        loss = _heldout_loss(family, own, Mode.DENSE, dtype, config)
        assert isinstance(own, DenseLayers)
        return Refined(loss, loss, steps=0, seconds=0.0, stopped="steps", layers=own)
    brief = RefinementConfig(steps=config.steps, max_seconds=seconds, patience=config.patience)
    return refine(family, own, brief, mode=Mode.DENSE, dtype=dtype)


def _heldout_loss(
    family: Family, own: Own, mode: Mode, dtype: DType, config: RetrainingConfig
) -> float:
    _, held = split_heldout(family.limited_data, config.heldout_images)
    device = family.stem.positions.device
    images, labels = held.normalised().to(device), held.labels.to(device)
    process = noise_process(family.manifest.diffusion)
    return heldout_loss(family.assemble(own, mode, dtype), process, images, labels)


def loss_ratios(
    family: Family, models: Sequence[Own], config: RetrainingConfig, mode: Mode
) -> dict[DType, float]:
    """Worst ratio among `models` of each dtype's held-out loss to float32's, in a mode.

    In few bits a model has the Sigma that was healed for them, or is trained as it would be.
    """

    def healed(own: Own, dtype: DType) -> Own:
        if isinstance(own, DenseLayers):
            return _trained_layers(family, own, config, dtype).layers
        size = Size(depth=own.depth, rank=own.rank)
        if family.is_prepared(size, mode, dtype):
            return family.scales_of(size, mode, dtype)
        begun = Scales.from_stacked(own.stacked())
        return retrain(family, begun, config, mode=mode, dtype=dtype).scales

    def loss(own: Own, dtype: DType) -> float:
        served = healed(own, dtype) if dtype.needs_healing else own
        return _heldout_loss(family, served, mode, dtype, config)

    dtypes = [dtype for dtype in DType if executable(mode, dtype)]
    losses = {dtype: [loss(own, dtype) for own in models] for dtype in dtypes}
    exact = losses[FLOAT]
    return {dtype: max(map(operator.truediv, losses[dtype], exact)) for dtype in dtypes}
