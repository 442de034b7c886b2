"""Files that are not what they were, and calls that fail."""

from collections.abc import Callable

from hypothesis import strategies as st

Edit = tuple[float, bytes]
"""Share of a file's bytes that comes before, and what is written over those that follow."""
EDIT = st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=12))


def damaged(whole: bytes, edits: list[Edit], length: float | None, head: int = 0) -> bytes:
    """Edited and cut to a share of its length; edits of the first half are of `head` bytes."""
    content = bytearray(whole)
    for share, replacement in edits:
        at = int(share * (head if head and share < 0.5 else len(content)))
        content[at : at + len(replacement)] = replacement
    return bytes(content if length is None else content[: int(length * len(content))])


def raising(error: Exception) -> Callable[..., None]:
    """Function that raises an error whatever it is given."""

    def fail(*_: object, **__: object) -> None:
        raise error

    return fail
