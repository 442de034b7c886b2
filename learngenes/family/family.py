"""Families on disk: `family.json` with the SHA-256 of every file, and safetensors."""

import functools
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import torch
from pydantic import NonNegativeInt, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from learngenes.config import DiffusionConfig, DType, Frozen, Mode, NetworkConfig, Size, SizeSpace
from learngenes.data.labelled import LabelledImages
from learngenes.data.latents import LatentEncoder
from learngenes.files import write_file
from learngenes.model.dit import DiT, Stem
from learngenes.model.factors import CLASSES, DenseLayers, Learngenes, Own, Scales
from learngenes.model.sigma import interpolated, remaining, subset
from learngenes.sizing.quality import QualityTable

SCHEMA_VERSION = 3
READABLE_VERSIONS = (1, 2, SCHEMA_VERSION)
"""1 has Sigma of the full size alone, 2 nothing for few bits and nothing imported."""
MANIFEST = "family.json"
QUALITY = "quality.json"
PREVIEWS_FILE = "previews.png"
ENCODER = "encoder"
IMPORTED = "imported"
TENSOR_FILES = ("learngenes", "stem", "scales", "limited_data")
SCALES_NAME = re.compile(r"(?:(?P<how>[a-z]+\.[a-z0-9]+)\.)?(?P<depth>\d+)\.(?P<parameter>.+)")
FINGERPRINTED = ("learngenes.safetensors", "stem.safetensors")

Precision = tuple[Mode, DType]
"""Mode of a model in few bits, and their number."""


class FamilyError(ValueError):
    """A family cannot be loaded; the message names the file and the remedy."""


RANDOM = "random numbers"
"""Licence of weights that were drawn, not trained."""


class FamilyManifest(Frozen):
    schema_version: int
    name: str
    network: NetworkConfig
    diffusion: DiffusionConfig
    sizes: SizeSpace
    class_names: tuple[str, ...]
    licence: str
    trained_steps: int
    seed: int | None = None
    """Seed of everything random in the training; None in older families."""
    layer_order: tuple[NonNegativeInt, ...] = ()
    """Layers in the order in which they leave a smaller model; none in older families."""
    imported_order: tuple[NonNegativeInt, ...] = ()
    """The same of the imported network; none where there is none."""
    sha256: dict[str, str]


@dataclass(frozen=True)
class Family:
    """One trained set of learngenes, with its stem, Sigma of each depth, data, quality table."""

    manifest: FamilyManifest
    genes: Learngenes
    stem: Stem
    depths: Mapping[int, Scales]
    """Prepared Sigma by depth, that of the full size among them."""
    limited_data: LabelledImages
    """Images, or latents in a family of latents."""
    quality: QualityTable | None
    """None until `fineserve calibrate` has measured it."""
    encoder: LatentEncoder | None = None
    """Encoder of a family of latents; it stays on the CPU."""
    healed: Mapping[Precision, Mapping[int, Scales]] = field(default_factory=dict)
    """Sigma of each depth that was trained with the matrices in few bits."""
    imported: DenseLayers | None = None
    """Layers of the DiT that the family was made from, which share nothing."""

    @property
    def scales(self) -> Scales:
        """Sigma of the full size."""
        return self.depths[self.full_size.depth]

    @property
    def is_random(self) -> bool:
        """Whether it has the shapes of a network and random weights, for sizing alone."""
        return self.manifest.licence == RANDOM

    def is_prepared(
        self, size: Size, mode: Mode = Mode.FACTORED, dtype: DType = DType.FLOAT32
    ) -> bool:
        """Whether what a model begins with was trained for this, so that nothing is left to learn.

        Eight bits are as good as sixteen, fewer need a Sigma of their own.
        """
        if mode is Mode.DENSE:
            return size.depth == self.full_size.depth and not dtype.needs_healing
        depths = self.healed.get((mode, dtype), {}) if dtype.needs_healing else self.depths
        whole = size.rank == self.full_size.rank
        return whole and size.depth in depths and bool(self.manifest.layer_order)

    def own_of(self, size: Size, mode: Mode, dtype: DType) -> Own:
        """What a model begins with, of its own memory: Sigma, or layers of the imported DiT.

        Raises ValueError where no DiT was imported, and for what is larger than the full size.
        """
        if mode is not Mode.DENSE:
            return self.scales_of(size, mode, dtype)
        if self.imported is None:
            raise ValueError(
                f"the family {self.manifest.name} has no imported layers: mode dense is for "
                "families that `fineserve condense` has made; choose factored or materialised"
            )
        if size.depth > self.full_size.depth:
            raise ValueError(f"depth {size.depth} is more than the {self.full_size.depth} layers")
        kept = remaining(self.manifest.imported_order, size.depth)
        return self.imported.subset(kept).to(self.stem.positions.device)

    def full_own(self, mode: Mode) -> Own:
        """The largest model's own parameters, of which smaller ones learn."""
        if mode is not Mode.DENSE or self.imported is None:
            return self.scales
        return self.imported.to(self.stem.positions.device)

    def scales_of(
        self, size: Size, mode: Mode = Mode.FACTORED, dtype: DType = DType.FLOAT32
    ) -> Scales:
        """Sigma that a model begins with, of its own memory.

        What was prepared for its depth; else of the next larger prepared depth, without the layers
        that leave next; in older families interpolated. At a smaller rank the longest components
        are kept, which come first. In few bits what was healed for them, if anything was. Raises
        ValueError for what is larger than the full size.
        """
        order = self.manifest.layer_order
        if not order:
            return interpolated(self.scales, size)
        depths = self.healed.get((mode, dtype), self.depths)
        larger = [depth for depth in depths if depth >= size.depth]
        if not larger:
            raise ValueError(f"depth {size.depth} is more than the {self.full_size.depth} layers")
        nearest = min(larger)
        kept = remaining(order, nearest)
        layers = [kept.index(layer) for layer in remaining(order, size.depth)]
        return subset(depths[nearest], layers, size.rank)

    def assemble(self, own: Own, mode: Mode, dtype: DType = DType.FLOAT32) -> DiT:
        """A model ready to sample, from this family and the model's own parameters."""
        return DiT(self.stem_of(own), self.genes, own, mode, dtype)

    def stem_of(self, own: Own) -> Stem:
        """This family's stem, with the class embeddings of `own` where it has any."""
        return self.stem if own.classes is None else self.stem.with_classes(own.classes)

    def for_task(self, scales: Scales, num_classes: int) -> Scales:
        """`scales` for `num_classes` other classes; each embedding starts as the null class."""
        null = self.stem.classes.weight.detach()[-1]
        stacked = {**scales.stacked(), CLASSES: null.repeat(num_classes + 1, 1)}
        return Scales.from_stacked(stacked)

    def encoded(
        self, images: LabelledImages, on_part: Callable[[], object] = lambda: None
    ) -> LabelledImages:
        """Images as this family's network sees them: latents in a family of latents."""
        if self.encoder is None:
            return images
        return self.encoder.encoded(images, self.stem.positions.device, on_part)

    def to(self, device: torch.device) -> "Family":
        """Move the networks in place; data and imported layers stay where they are."""
        healed = (own for depths in self.healed.values() for own in depths.values())
        for module in (self.genes, self.stem, *self.depths.values(), *healed):
            module.to(device)
        return self

    @functools.cached_property
    def fingerprint(self) -> str:
        """Digest of the weights that a model's Sigma was made for."""
        return "-".join(self.manifest.sha256[file] for file in FINGERPRINTED)

    def made(self, own: Own, fingerprint: str) -> bool:
        """Whether `own` goes with this family, when it was made for one of that fingerprint."""
        if isinstance(own, Scales):
            return fingerprint == self.fingerprint
        return fingerprint.endswith(f"-{self.manifest.sha256[FINGERPRINTED[-1]]}")

    @property
    def encoder_fingerprint(self) -> str | None:
        """Digest of the encoder; None in a family of images."""
        autoencoder = self.manifest.network.autoencoder
        if autoencoder is None:
            return None
        weights = self.manifest.sha256[f"{ENCODER}.safetensors"]
        return hashlib.sha256(f"{weights} {autoencoder!r}".encode()).hexdigest()[:16]

    @property
    def full_size(self) -> Size:
        return self.manifest.network.full_size


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_family(
    directory: Path,
    manifest: dict[str, object],
    genes: Learngenes,
    stem: Stem,
    depths: Mapping[int, Scales],
    limited_data: LabelledImages,
    encoder: LatentEncoder | None = None,
    healed: Mapping[Precision, Mapping[int, Scales]] = MappingProxyType({}),
    imported: DenseLayers | None = None,
) -> FamilyManifest:
    """Write a family. `manifest` holds FamilyManifest's fields but the version and the hashes.

    Files already in `directory` (configuration, training log, sample grid) are hashed too; what was
    measured or sampled of a family that was there before is removed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for stale in (QUALITY, PREVIEWS_FILE):
        (directory / stale).unlink(missing_ok=True)
    tensors: dict[str, dict[str, Tensor]] = {
        "learngenes": genes.state_dict(),
        "stem": stem.state_dict(),
        "scales": _named(depths),
        "limited_data": {"images": limited_data.images, "labels": limited_data.labels},
    }
    for (mode, dtype), owns in healed.items():
        tensors["scales"] |= _named(owns, f"{mode}.{dtype}.")
    if encoder is not None:
        tensors[ENCODER] = encoder.state_dict()
    if imported is not None:
        tensors[IMPORTED] = imported.stacked()
    for name, group in tensors.items():
        contiguous = {key: tensor.contiguous().cpu() for key, tensor in group.items()}
        save_file(contiguous, directory / f"{name}.safetensors")
    sha256 = {
        path.name: file_sha256(path)
        for path in sorted(directory.iterdir())
        if path.name != MANIFEST and path.is_file()
    }
    complete = FamilyManifest.model_validate(
        {**manifest, "schema_version": SCHEMA_VERSION, "sha256": sha256}
    )
    _write_manifest(directory, complete)
    return complete


def load_family(directory: Path) -> Family:
    """Read and verify a family. Raises FamilyError."""
    manifest = read_manifest(directory)
    _check_hashes(directory, manifest)
    latent = manifest.network.autoencoder is not None
    files = [*TENSOR_FILES, *[ENCODER] * latent, *[IMPORTED] * bool(manifest.imported_order)]
    if missing := {f"{name}.safetensors" for name in files} - manifest.sha256.keys():
        raise FamilyError(f"{directory / MANIFEST} lists no hash for {', '.join(sorted(missing))}")
    tensors = {name: _read_tensors(directory / f"{name}.safetensors") for name in files}
    encoder = LatentEncoder(manifest.network) if latent else None
    with torch.device("meta"):  # the files' own memory is used, nothing is drawn or copied
        genes = Learngenes(manifest.network)
    stem = Stem(manifest.network)
    try:
        genes.load_state_dict(tensors["learngenes"], assign=True)
        stem.load_state_dict(tensors["stem"])
        depths, healed = _scales(tensors["scales"], manifest)
        if encoder is not None:
            encoder.load_state_dict(tensors[ENCODER])
        imported = DenseLayers.from_stacked(tensors[IMPORTED]) if IMPORTED in tensors else None
        data = tensors["limited_data"]
        limited = LabelledImages(data["images"], data["labels"], manifest.class_names)
    except (RuntimeError, KeyError) as error:
        raise FamilyError(f"{directory}: tensors do not fit {MANIFEST}: {error}") from error
    all_healed = (own for owns in healed.values() for own in owns.values())
    for module in (genes, stem, *depths.values(), *all_healed):
        module.requires_grad_(False)
    quality = read_quality(directory, manifest)
    return Family(manifest, genes, stem.eval(), depths, limited, quality, encoder, healed, imported)


def _named(depths: Mapping[int, Scales], prefix: str = "") -> dict[str, Tensor]:
    """Sigma of each depth, by name on disk."""
    return {
        f"{prefix}{depth}.{name}": tensor
        for depth, scales in depths.items()
        for name, tensor in scales.stacked().items()
    }


def _scales(
    tensors: Mapping[str, Tensor], manifest: FamilyManifest
) -> tuple[dict[int, Scales], dict[Precision, dict[int, Scales]]]:
    """Prepared Sigma by depth, and healed ones. Raises KeyError when a tensor is missing."""
    if manifest.schema_version == 1:  # of the full size alone
        return {manifest.network.depth: Scales.from_stacked(tensors)}, {}
    stacked: dict[tuple[str, int], dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        if (parts := SCALES_NAME.fullmatch(name)) is None:
            raise KeyError(f"scales have a tensor {name!r}")
        stacked[parts["how"] or "", int(parts["depth"])][parts["parameter"]] = tensor
    depths: dict[int, Scales] = {}
    healed: dict[Precision, dict[int, Scales]] = defaultdict(dict)
    for (how, depth), own in sorted(stacked.items()):
        if how:
            mode, dtype = how.split(".")
            healed[Mode(mode), DType(dtype)][depth] = Scales.from_stacked(own)
        else:
            depths[depth] = Scales.from_stacked(own)
    if manifest.network.depth not in depths:
        raise KeyError(f"no Sigma for depth {manifest.network.depth}")
    return depths, dict(healed)


def read_manifest(directory: Path) -> FamilyManifest:
    path = directory / MANIFEST
    if not path.is_file():
        raise FamilyError(f"{directory} is not a family: {MANIFEST} is missing")
    try:
        raw = json.loads(path.read_text())
    except ValueError as error:
        raise FamilyError(f"{path} is not JSON ({error}); restore it from its source") from error
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version not in READABLE_VERSIONS:
        raise FamilyError(
            f"{path} has schema_version {version!r}, this release reads "
            f"{' and '.join(map(str, READABLE_VERSIONS))}; train or fetch the family again"
        )
    if version == 1:
        raw.pop("form", None)
    try:
        return FamilyManifest.model_validate(raw)
    except ValidationError as error:
        raise FamilyError(f"{path} is not valid: {error}") from error


def read_quality(directory: Path, manifest: FamilyManifest) -> QualityTable | None:
    """A family's quality table, if it has been calibrated. Raises FamilyError."""
    if QUALITY not in manifest.sha256:
        return None
    try:
        return QualityTable.model_validate_json((directory / QUALITY).read_bytes())
    except (OSError, ValidationError) as error:
        raise FamilyError(
            f"{directory / QUALITY} is not valid: {error}; run `fineserve calibrate {directory}`"
        ) from error


def write_quality(directory: Path, table: QualityTable) -> None:
    """Store a quality table in a family, and its hash in the manifest."""
    manifest = read_manifest(directory)
    write_file(directory / QUALITY, f"{table.model_dump_json(indent=2)}\n".encode())
    sha256 = {**manifest.sha256, QUALITY: file_sha256(directory / QUALITY)}
    _write_manifest(directory, manifest.model_copy(update={"sha256": sha256}))


def _write_manifest(directory: Path, manifest: FamilyManifest) -> None:
    write_file(directory / MANIFEST, f"{manifest.model_dump_json(indent=2)}\n".encode())


def _check_hashes(directory: Path, manifest: FamilyManifest) -> None:
    for name, expected in manifest.sha256.items():
        if Path(name).name != name:
            raise FamilyError(f"{directory / MANIFEST} names a file outside the family: {name!r}")
        path = directory / name
        if not path.is_file():
            raise FamilyError(f"{path} is missing; restore it from the family's source")
        if (actual := file_sha256(path)) != expected:
            raise FamilyError(
                f"{path} is corrupt: SHA-256 is {actual[:12]}…, {MANIFEST} says "
                f"{expected[:12]}…; restore it from the family's source"
            )


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise FamilyError(f"{path} is not a safetensors file: {error}") from error
    return tensors
