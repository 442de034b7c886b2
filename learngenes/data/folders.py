"""Class folders: which files are images, of which class, and what is skipped and why.

Uploads, the client that packs them, and training decide by this alone. The classes are the folders
of the first level, whatever folders are in them; folders around all of them are looked through.
"""

import json
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from learngenes.data.images import SUFFIXES, DataError, class_name

CLASSES_FILE = "fineserve-classes.json"
"""File beside class folders that maps each folder to the name of its class, in the classes' order:
for names that no folder can have, and for an order that is not the alphabet's."""
MOST_LISTED_BYTES = 1_000_000
JUNK = {"__MACOSX", "Thumbs.db", "desktop.ini"}
PICTURES = {
    *(".avif", ".cr2", ".dng", ".gif", ".heic", ".heif", ".ico", ".jp2", ".jxl", ".nef"),
    *(".psd", ".svg", ".tga", ".tif", ".tiff"),
}
"""Suffixes of pictures that are not read."""
TRAINING = {"train", "training"}
SPLITS = {*TRAINING, "test", "testing", "val", "valid", "validation", "dev", "eval", "holdout"}
LABELS = {"metadata.csv", "metadata.jsonl", "labels.csv"}
"""Files that give images labels which are not read."""
EXAMPLES = 3
MEND = "put each class's images into a folder that is named after it"


@dataclass(frozen=True)
class Skipped:
    """Files that are not taken, for one reason."""

    reason: str
    count: int
    examples: tuple[str, ...]


@dataclass(frozen=True)
class ClassFolders:
    class_names: list[str]
    """Names in the order of their numbers: as listed; or as numbers where all are numbers; or by
    the alphabet."""
    labels: dict[PurePosixPath, int]
    """Number of the class of each image that is taken, in the order that they came in."""
    skipped: list[Skipped]


def walked(directory: Path) -> list[PurePosixPath]:
    """Paths of all files below a directory, sorted; linked folders are looked into, once each, and
    links that lead nowhere are no files."""
    found, seen = [], set()
    for folder, folders, files in os.walk(directory, followlinks=True):
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        inside = Path(folder).relative_to(directory)
        found += [PurePosixPath(inside / file) for file in files if (Path(folder) / file).exists()]
    return sorted(found)


def listed_classes(content: bytes) -> dict[str, str]:
    """Names of classes by their folders, from a CLASSES_FILE. Raises DataError."""
    try:
        listed = json.loads(content) if len(content) <= MOST_LISTED_BYTES else None
    except (RecursionError, ValueError):
        listed = None
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise DataError(f"{CLASSES_FILE} has to be a JSON object: a class's name for each folder")
    return {_composed(folder): name for folder, name in listed.items()}


def is_image(file: PurePosixPath) -> bool:
    """Whether a file is read as an image, by its path; hidden ones are not."""
    return file.suffix.lower() in SUFFIXES and not _hidden(file)


def class_folders(
    files: Iterable[PurePosixPath], listed: Mapping[str, str] | None = None
) -> ClassFolders:
    """What files, by their paths, are. Raises DataError where classes would be guessed.

    `listed`: `listed_classes`, where there is such a file.
    """
    skipped: defaultdict[str, list[PurePosixPath]] = defaultdict(list)
    images, pictures, others = [], [], []
    for file in files:
        if _hidden(file):
            skipped["hidden"].append(file)
        elif is_image(file):
            images.append(file)
        elif file.suffix.lower() in PICTURES:
            pictures.append(file)
        elif file.name != CLASSES_FILE:
            others.append(file)
    if not images:
        raise _no_images(pictures, skipped["hidden"])
    root = _root(images)
    if not listed and (split := _training_split(root, images)) != root:
        there = [file for file in images if file.is_relative_to(split)]
        skipped["of another split than that for training"] = [*{*images} - {*there}]
        images, root = there, split
    folders = {file: _composed(file.relative_to(root).parts[0]) for file in images}
    if not listed and len({*folders.values()}) == 1:
        _refuse_labels(others)
    _refuse_vanished(root, {*folders.values()}, pictures)
    skipped["in a format that is not read"] = pictures
    skipped["no pictures"] = others
    names = _names({*folders.values()}, listed)
    numbers = {folder: number for number, folder in enumerate(names)}
    return ClassFolders(
        [*names.values()],
        {file: numbers[folder] for file, folder in folders.items()},
        [
            Skipped(reason, len(some), tuple(str(file) for file in sorted(some)[:EXAMPLES]))
            for reason, some in skipped.items()
            if some
        ],
    )


def _hidden(file: PurePosixPath) -> bool:
    return any(part in JUNK or part.startswith(".") for part in file.parts)


def _composed(name: str) -> str:
    """A name as most keyboards write it (NFC): file systems may keep it in other code points."""
    return unicodedata.normalize("NFC", name)


def _no_images(pictures: Sequence[PurePosixPath], hidden: Sequence[PurePosixPath]) -> DataError:
    there = f"there are no images ({', '.join(SUFFIXES)}) in it"
    if pictures:
        return DataError(f"{there}, but {len(pictures)} like {str(pictures[0])!r}: convert them")
    if hidden:
        return DataError(f"{there} that are not hidden, as {str(hidden[0])!r} is: rename it")
    return DataError(f"{there}; {MEND}")


def _root(images: Sequence[PurePosixPath]) -> PurePosixPath:
    """The folder whose folders are the classes: below those that merely hold all the others."""
    root = PurePosixPath()
    while True:
        inside = [file.relative_to(root).parts for file in images]
        if loose := next((parts for parts in inside if len(parts) == 1), None):
            raise DataError(f"{str(root / loose[0])!r} is in no class's folder; {MEND}")
        if len({parts[0] for parts in inside}) > 1 or any(len(parts) == 2 for parts in inside):
            return root
        root /= inside[0][0]


def _training_split(root: PurePosixPath, images: Sequence[PurePosixPath]) -> PurePosixPath:
    """The folder of the split to train on, where there are splits instead of classes."""
    inside = [file.relative_to(root).parts for file in images]
    folders = {parts[0] for parts in inside}
    if not {folder.casefold() for folder in folders} <= SPLITS:
        return root
    training = [folder for folder in folders if folder.casefold() in TRAINING]
    nested = all(len(parts) > 2 for parts in inside if parts[0] in training)
    if len(training) == 1 and nested:
        return root / training[0]
    raise DataError(
        f"the folders {', '.join(sorted(folders))} are splits of a data set, and no classes; "
        f"{MEND}, or name them in {CLASSES_FILE}"
    )


def _refuse_labels(others: Sequence[PurePosixPath]) -> None:
    if beside := next((file for file in others if file.name.lower() in LABELS), None):
        raise DataError(f"{str(beside)!r} may say what the images are, and is not read; {MEND}")


def _refuse_vanished(
    root: PurePosixPath, folders: set[str], pictures: Sequence[PurePosixPath]
) -> None:
    """Raise DataError where a class has pictures, and none of them is read."""
    below = (file for file in pictures if file.is_relative_to(root))
    for file in below:
        parts = file.relative_to(root).parts
        if len(parts) > 1 and _composed(parts[0]) not in folders:
            raise DataError(
                f"of the class {parts[0]!r} no picture can be read, {str(file)!r} is one: convert "
                f"them to {', '.join(SUFFIXES)}, or leave the class out"
            )


def _names(folders: set[str], listed: Mapping[str, str] | None) -> dict[str, str]:
    """Names of the classes by their folders, in the order of their numbers."""
    if listed is None:
        numbers = all(folder.isascii() and folder.isdigit() for folder in folders)
        names = {f: f for f in sorted(folders, key=(lambda f: (int(f), f)) if numbers else None)}
    else:
        names = {folder: name for folder, name in listed.items() if folder in folders}
    if unlisted := folders - names.keys():
        raise DataError(f"folder {min(unlisted)!r} is not in {CLASSES_FILE}; name its class there")
    used = {folder: class_name(name) for folder, name in names.items()}
    if twice := [name for name, count in Counter(used.values()).items() if count > 1]:
        raise DataError(f"{CLASSES_FILE} calls several folders {twice[0]!r}; put them into one")
    return used
