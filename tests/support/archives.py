"""Images, and folders and archives of them."""

import io
import tarfile
import zipfile
from pathlib import Path

from PIL import Image

Files = dict[str, bytes]


def png(
    colour: int | tuple[int, ...] = 100, side: int = 8, mode: str = "RGB", kind: str = "PNG"
) -> bytes:
    """Square picture of one colour; a number is a grey, or the red of RGB."""
    if mode == "RGB" and isinstance(colour, int):
        colour = (colour, 0, 0)
    buffer = io.BytesIO()
    Image.new(mode, (side, side), colour).save(buffer, kind)
    return buffer.getvalue()


def zipped(files: Files) -> io.BytesIO:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer


def tarred(files: Files, compression: str = "") -> io.BytesIO:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{compression}") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    buffer.seek(0)
    return buffer


def unpacked(files: Files, folder: Path) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


PETS: Files = {f"{name}/{i}.png": png(50 * i + 20) for name in ("cat", "dog") for i in range(3)}
