"""Artifacts that workers read from the store: images of data sets, parameters of models."""

import dataclasses
from collections.abc import Callable

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from learngenes.data.labelled import LabelledImages
from learngenes.family.family import Family
from learngenes.model.factors import Own, own_from_stacked
from registry.datasets import IMAGES_FILE, Datasets
from registry.errors import ArtifactError, RecordNotFound
from registry.store import ArtifactStore

OWN_FILE = "own.safetensors"


def load_dataset(
    store: ArtifactStore, family: Family, dataset_id: str, on_part: Callable[[], object]
) -> LabelledImages:
    """Images of a data set as `family`'s network sees them. Raises ArtifactError.

    Latents are kept for other models of the data set; `on_part` is called while they are made.
    """
    datasets = Datasets(store)
    images = _dataset_images(datasets, dataset_id)
    encoder = family.encoder_fingerprint
    if encoder is None:
        return images
    if kept := datasets.latents(dataset_id, encoder):
        return dataclasses.replace(images, images=load_tensors(kept)["latents"])
    encoded = family.encoded(images, on_part)
    datasets.keep_latents(dataset_id, encoder, save_tensors({"latents": encoded.images}))
    return encoded


def _dataset_images(datasets: Datasets, dataset_id: str) -> LabelledImages:
    try:
        class_names = datasets.get(dataset_id).class_names
        tensors = load_tensors(datasets.read(dataset_id, IMAGES_FILE))
    except RecordNotFound as error:
        raise ArtifactError(f"{error}; it was deleted: upload its images again") from error
    return LabelledImages(tensors["images"], tensors["labels"], tuple(class_names))


def load_own(store: ArtifactStore, family: Family, name: str) -> Own:
    """A model's own parameters in an artifact, on the family's device. Raises ArtifactError.

    Layers that share no U and V outlive those: their stem has to be the same, and no more.
    """
    content = store.read(name, OWN_FILE)
    try:
        own = own_from_stacked(load_tensors(content))
    except (SafetensorError, KeyError, RuntimeError, ValueError) as error:
        raise ArtifactError(f"{name}/{OWN_FILE} is not a model's: {error}") from error
    if not family.made(own, str(store.describe(name).get("family_fingerprint"))):
        raise ArtifactError(
            f"{name} was made for another version of the family {family.manifest.name}; make "
            "another model"
        )
    return own.to(family.stem.positions.device)
