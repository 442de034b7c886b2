import threading
from pathlib import Path

import pytest

from learngenes.files import replaced, write_file


def test_a_file_is_replaced_and_nothing_lies_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "new folder" / "a.json"
    for content in (b"old", b"new"):
        write_file(file, content)
        assert file.read_bytes() == content
    assert list(file.parent.iterdir()) == [file]


def test_only_its_owner_may_read_what_is_secret(tmp_path: Path) -> None:
    write_file(tmp_path / "keys", b"", permissions=0o600)
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("directory", [False, True])
def test_what_fails_leaves_the_old_one(tmp_path: Path, directory: bool) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"old")

    def fail() -> None:
        with replaced(file) as new:
            if directory:
                new.mkdir()
            (new / "part" if directory else new).write_bytes(b"half of the")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_directory_appears_with_all_that_is_in_it(tmp_path: Path) -> None:
    target = tmp_path / "artifacts" / "a"
    with replaced(target, scratch=tmp_path / "incoming") as new:
        new.mkdir()
        (new / "part").write_bytes(b"whole")
        assert not target.exists()
    assert (target / "part").read_bytes() == b"whole"
    assert list((tmp_path / "incoming").iterdir()) == []


def test_many_writers_and_a_reader_see_whole_files(tmp_path: Path) -> None:
    file = tmp_path / "a"
    contents = [bytes([letter]) * 100_000 for letter in b"abcd"]
    file.write_bytes(contents[0])
    writers = [threading.Thread(target=write_file, args=(file, content)) for content in contents]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert file.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [file]
