"""Rows of a table, each measured once: a run that was killed goes on with the next."""

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.parts import commit_now
from learngenes.files import write_file

if TYPE_CHECKING:  # tables are made of rows without torch
    from learngenes.family.family import Family

Row = dict[str, Any]
OURS = "fine any-size"
LAYER_STEPS, SIZES, TASKS = "layer steps", "bytes of sizes", "bytes of tasks"
"""What the rows of totals count."""


@dataclass(frozen=True)
class Cell:
    """The FD of some rows that differ in their seed."""

    mean: float
    spread: float
    rows: int


def cell(rows: Sequence[Row], **wanted: object) -> Cell | None:
    """Mean and spread of all rows whose key has what is wanted; None where there is none."""
    found = [row["fd"] for row in rows if wanted.items() <= row["key"].items() and "fd" in row]
    if not found:
        return None
    return Cell(statistics.mean(found), max(found) - min(found), len(found))


def version(family: "Family") -> str:
    """Rows of a shipped family are of this one's weights, not of an earlier one's."""
    return family.fingerprint[:12]


class Rows:
    """A JSON file for each row, named after its key: several processes can add to them."""

    def __init__(self, directory: Path, earlier: Iterable[Row] = ()) -> None:
        """`earlier`: rows that need not be measured again."""
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        for row in earlier:
            if not self.has(row["key"]):
                self._write(row)

    def get(self, key: Row, measure: Callable[[], Row]) -> Row:
        """The row with `key`, measured now if it is not there."""
        if not self.has(key):
            self._write({"key": key, "commit": commit_now(), **measure()})
        row: Row = json.loads(self._path(key).read_text())
        return row

    def all(self) -> list[Row]:
        return [json.loads(path.read_text()) for path in sorted(self._directory.glob("*.json"))]

    def has(self, key: Row) -> bool:
        return self._path(key).exists()

    def _write(self, row: Row) -> None:
        write_file(self._path(row["key"]), json.dumps(row).encode())

    def _path(self, key: Row) -> Path:
        words = [f"{name}={value}" for name, value in sorted(key.items())]
        return self._directory / f"{' '.join(words)}.json"
