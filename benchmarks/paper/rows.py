"""Rows of a table, each measured once: a run that was killed goes on with the next."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Rows:
    """A JSON file for each row, named after its key: several processes can add to them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def get(self, key: Row, measure: Callable[[], Row]) -> Row:
        """The row with `key`, measured now if it is not there."""
        path = self._path(key)
        if not path.exists():
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps({"key": key, **measure()}))
            temporary.replace(path)
        row: Row = json.loads(path.read_text())
        return row

    def has(self, key: Row) -> bool:
        return self._path(key).exists()

    def _path(self, key: Row) -> Path:
        words = [f"{name}={value}" for name, value in sorted(key.items())]
        return self._directory / f"{' '.join(words)}.json"
