"""One model in a directory of its own, which `load_model` reads without any server.

`model.json` (with the SHA-256 of every file), `own.safetensors`, and unless the model is to be
put on its family again, `stem.safetensors` and the prefix of U and V that its rank needs.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import PositiveInt
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from learngenes.config import DiffusionConfig, DType, Frozen, Mode, NetworkConfig
from learngenes.family.family import Family, file_sha256
from learngenes.model.dit import DiT, Stem
from learngenes.model.factors import Learngenes, Own, Scales, own_from_stacked

SCHEMA_VERSION = 1
MANIFEST = "model.json"
CPU = torch.device("cpu")
OWN, STEM, GENES = "own.safetensors", "stem.safetensors", "learngenes.safetensors"


class ModelError(ValueError):
    """A directory cannot be loaded as a model; the message says why."""


class ModelManifest(Frozen):
    schema_version: int
    family: str
    family_fingerprint: str
    network: NetworkConfig
    """The family's network, with the rank of the U and V that are here."""
    diffusion: DiffusionConfig
    depth: PositiveInt
    mode: Mode
    dtype: DType
    class_names: tuple[str, ...]
    licence: str
    sha256: dict[str, str]


@dataclass(frozen=True)
class Model:
    """A network to sample from, by `learngenes.model.sampling.sample(model.network, …)`."""

    manifest: ModelManifest
    network: DiT


def save_model(
    directory: Path,
    family: Family,
    own: Own,
    mode: Mode,
    dtype: DType,
    class_names: Sequence[str],
    *,
    whole: bool,
) -> None:
    """Write a model; a `whole` one carries what it needs of its family."""
    network = family.manifest.network
    files: dict[str, Mapping[str, Tensor]] = {OWN: own.stacked()}
    if isinstance(own, Scales):
        network = network.model_copy(update={"rank": own.rank})
    if whole:
        files[STEM] = family.stem.state_dict()
        if isinstance(own, Scales):
            genes = family.genes.state_dict()
            files[GENES] = {name: factor[:, : own.rank] for name, factor in genes.items()}
    directory.mkdir(parents=True, exist_ok=True)
    for name, tensors in files.items():
        save_file({k: t.detach().contiguous().cpu() for k, t in tensors.items()}, directory / name)
    manifest = ModelManifest(
        schema_version=SCHEMA_VERSION,
        family=family.manifest.name,
        family_fingerprint=family.fingerprint,
        network=network,
        diffusion=family.manifest.diffusion,
        depth=own.depth,
        mode=mode,
        dtype=dtype,
        class_names=tuple(class_names),
        licence=family.manifest.licence,
        sha256={name: file_sha256(directory / name) for name in files},
    )
    (directory / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")


def load_model(
    directory: str | Path, family: Family | None = None, device: torch.device = CPU
) -> Model:
    """Read and verify what `save_model` wrote; `family` is needed where it is not whole.

    On `device`, or where the family is. Raises ModelError.
    """
    directory = Path(directory)
    manifest = _read_manifest(directory)
    tensors = {name: _read(directory, name, digest) for name, digest in manifest.sha256.items()}
    own = _own(directory, tensors[OWN])
    if STEM not in tensors:
        if family is None or not family.made(own, manifest.family_fingerprint):
            raise ModelError(
                f"{directory} is what is a model's own alone: load the family {manifest.family} "
                f"(learngenes {manifest.family_fingerprint[:12]}) and give it, or export the model "
                "as `native`, with all it needs"
            )
        stem, genes = family.stem, family.genes
    try:
        if STEM in tensors:
            stem = Stem(manifest.network)
            stem.load_state_dict(tensors[STEM])
            with torch.device("meta"):  # of a refined model there are none
                genes = Learngenes(manifest.network)
            if isinstance(own, Scales):
                genes.load_state_dict(tensors[GENES], assign=True)
                genes.to(device)
            stem.to(device).requires_grad_(False)
        if own.classes is not None:
            stem = stem.with_classes(own.classes.to(stem.positions.device))
        own = own.to(stem.positions.device)
        return Model(manifest, DiT(stem, genes, own, manifest.mode, manifest.dtype))
    except (KeyError, RuntimeError, ValueError) as error:
        raise ModelError(f"{directory}: tensors do not fit {MANIFEST}: {error}") from error


def _own(directory: Path, tensors: Mapping[str, Tensor]) -> Own:
    try:
        return own_from_stacked(tensors)
    except KeyError as error:
        raise ModelError(f"{directory / OWN} is not a model's: {error}") from error


def _read_manifest(directory: Path) -> ModelManifest:
    try:
        raw = json.loads((directory / MANIFEST).read_bytes())
        version = raw["schema_version"]
        if version == SCHEMA_VERSION:
            return ModelManifest.model_validate(raw)
    except (OSError, TypeError, KeyError, ValueError) as error:  # JSON's and pydantic's, too
        raise ModelError(f"{directory} is not a model: {MANIFEST}: {error}") from error
    raise ModelError(
        f"{directory / MANIFEST} has schema_version {version!r}, this release reads "
        f"{SCHEMA_VERSION}; export the model again"
    )


def _read(directory: Path, name: str, digest: str) -> dict[str, Tensor]:
    path = directory / name
    if name not in (OWN, STEM, GENES):
        raise ModelError(f"{directory / MANIFEST} names a file that no model has: {name!r}")
    try:
        if file_sha256(path) != digest:
            raise ModelError(f"{path} is corrupt: its SHA-256 is not the one in {MANIFEST}")
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    return tensors
