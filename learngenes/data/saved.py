"""Hugging Face datasets on disk (`save_to_disk`), read as images and their classes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from learngenes.data.images import DataError

MEND_LABEL = {
    "string": '`dataset.class_encode_column("{name}")`',
    "int": '`dataset.cast_column("{name}", datasets.ClassLabel(names=[…]))`',
}
"""Call that makes classes of a column, by the beginning of its values' type."""


def is_saved(path: Path) -> bool:
    files = {"state.json", "dataset_info.json"}
    return (path / "dataset_dict.json").exists() or all((path / file).exists() for file in files)


def load_saved(
    path: Path, split: str = "train", decode: bool = True
) -> tuple[Iterator[tuple[Any, int]], list[str]]:
    """Rows of (image, class number), and the class names.

    An image is Pillow's, or the bytes of its file where it is not to be decoded. Raises DataError,
    also while the rows are read.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{path} is a Hugging Face dataset; `pip install datasets` to read it"
        ) from error
    try:
        loaded = datasets.load_from_disk(str(path))
    except (LookupError, OSError, TypeError, ValueError) as error:
        raise DataError(f"{path} is no dataset with rows; save it again: {error}") from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise DataError(
                f"{path} has splits {sorted(loaded)}, not {split!r}; save the one that is meant: "
                f'`datasets.load_from_disk("{path}")[…].save_to_disk(…)`'
            )
        loaded = loaded[split]
    elif split != "train":
        raise DataError(f"{path} is one split only: held-out images need a DatasetDict")
    image, label = (_only(path, kind, loaded.features) for kind in ("Image", "ClassLabel"))
    names = loaded.features[label].names
    loaded = loaded.select_columns([image, label])
    if not decode:
        loaded = loaded.cast_column(image, datasets.Image(decode=False))
    return _rows(path, ((row[image], row[label]) for row in loaded), names), names


def _rows(
    path: Path, rows: Iterator[tuple[Any, int | None]], names: list[str]
) -> Iterator[tuple[Any, int]]:
    for number, (image, label) in enumerate(rows):
        content = image["bytes"] if isinstance(image, dict) else image
        if content is None or label is None:
            raise DataError(f"{path}: row {number} has no image or no class; leave it out")
        if not 0 <= label < len(names):
            raise DataError(f"{path}: row {number} is of class {label}, which has no name")
        yield content, label


def _only(path: Path, kind: str, features: Any) -> str:
    found = [name for name, feature in features.items() if type(feature).__name__ == kind]
    if len(found) == 1:
        return str(found[0])
    there = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())
    wanted = f"{path} needs one {kind} column, it has {there}; "
    if found:
        raise DataError(f"{wanted}drop all but one: `dataset.remove_columns(…)`")
    raise DataError(wanted + (_mend_image if kind == "Image" else _mend_label)(features))


def _mend_image(features: Any) -> str:
    lists = [name for name, feature in features.items() if "Image(" in repr(feature)]
    if lists:
        return f"{lists[0]!r} has several images a row: make rows of one image each"
    return 'make one: `dataset.cast_column("…", datasets.Image())`'


def _mend_label(features: Any) -> str:
    dtypes = {name: str(getattr(feature, "dtype", "")) for name, feature in features.items()}
    usable = [name for name in dtypes if dtypes[name].startswith(tuple(MEND_LABEL))]
    name = max(usable, key=lambda name: "label" in name.lower(), default="…")
    call = next((MEND_LABEL[d] for d in MEND_LABEL if dtypes.get(name, "").startswith(d)), None)
    return f"make one and save it again: {(call or MEND_LABEL['string']).format(name=name)}"
