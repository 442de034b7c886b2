import os
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest

from benchmarks.deployment import wait
from registry.errors import KeysError
from registry.keys import Keys, Scope


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "some" / "keys.json"


def test_a_key_counts_in_every_process_until_it_is_revoked(path: Path) -> None:
    operator, service = Keys(path), Keys(path)
    assert not service.required
    made, key = operator.create("team", [Scope.GENERATE, Scope.DEPLOY])
    assert service.required
    assert service.find(key) == made
    assert made.state == "valid"
    assert service.find(key + "x") is None
    another, second = operator.create("team", [Scope.ADMIN])
    assert service.find(second) == another
    assert operator.revoke(made.id).state == "revoked"
    found = service.find(key)
    assert found is not None
    assert found.state == "revoked"
    assert operator.revoke(made.id) == found, "the first time counts"
    assert [k.id for k in operator.all()] == [made.id, another.id]
    with pytest.raises(KeysError, match="no key 'k-0'"):
        operator.revoke("k-0")


def test_a_key_expires(path: Path) -> None:
    made, _ = Keys(path).create("team", [Scope.ADMIN], valid_for=timedelta(0))
    assert made.state == "expired"


def test_only_its_owner_reads_the_file_and_it_holds_no_key(path: Path) -> None:
    _, key = Keys(path).create("team", [Scope.ADMIN])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    content = path.read_text()
    assert all(part not in content for part in (key, key.rpartition("-")[2]))


def test_keys_that_are_made_at_once_are_all_kept(path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = pool.map(lambda i: Keys(path).create(str(i), [Scope.ADMIN])[0].id, range(16))
    assert {key.id for key in Keys(path).all()} == set(made)


@pytest.mark.parametrize("content", [None, b"", b"[]", b'{"keys": [{"id": "k-1"}]}'])
def test_without_its_file_nobody_comes_in(path: Path, content: bytes | None) -> None:
    keys = Keys(path)
    _, key = keys.create("team", [Scope.ADMIN])
    assert keys.required
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
        os.utime(path, ns=(1, 1))
    assert keys.required
    with pytest.raises(KeysError, match="cannot be read"):
        keys.find(key)


class Away:
    """A mark in a place that cannot be asked, for a while."""

    made: bool | None = None
    kept = 0

    def __call__(self) -> bool | None:
        return self.made

    def keep(self) -> bool:
        self.kept += 1
        return self.made is not None


def test_the_mark_is_looked_at_as_soon_as_its_place_answers(tmp_path: Path) -> None:
    mark = Away()
    keys = Keys(tmp_path / "keys.json", made=mark)
    assert not keys.required
    mark.made = True
    assert wait(lambda: keys.required, 10)
    assert Keys(tmp_path / "keys.json", made=mark).required


def test_the_mark_is_left_as_soon_as_it_can_be(tmp_path: Path) -> None:
    mark = Away()
    keys = Keys(tmp_path / "keys.json", made=mark)
    keys.create("owner", [Scope.ADMIN])
    assert all(keys.required for _ in range(3))
    wait(lambda: mark.kept > 1, 10)
    mark.made = True
    kept = mark.kept
    time.sleep(0.6)
    assert mark.kept <= kept + 2, "it was left, and that was all"
