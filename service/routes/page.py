"""The page for people at /, made of files that a browser runs as they are."""

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles

DIRECTORY = Path(__file__).parent.parent / "web"

router = APIRouter(include_in_schema=False)
files = StaticFiles(directory=DIRECTORY)


@router.get("/")
def page() -> FileResponse:
    return FileResponse(DIRECTORY / "index.html")
