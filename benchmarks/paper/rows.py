"""Rows of a table, each measured once: a run that was killed goes on with the next."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Rows:
    """One JSON object a line; a row is known by its key."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._known: dict[str, Row] = {}
        if file.exists():
            for line in file.read_text().splitlines():
                row = json.loads(line)
                self._known[_name(row["key"])] = row

    def get(self, key: Row, measure: Callable[[], Row]) -> Row:
        """The row with `key`, measured now if it is not there."""
        name = _name(key)
        if name not in self._known:
            self._known[name] = {"key": key, **measure()}
            with self._file.open("a") as file:
                file.write(json.dumps(self._known[name]) + "\n")
        return self._known[name]

    def has(self, key: Row) -> bool:
        return _name(key) in self._known


def _name(key: Row) -> str:
    return json.dumps(key, sort_keys=True)
