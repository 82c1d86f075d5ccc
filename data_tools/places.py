"""Where a path that was not found was looked for, and where it may be."""

from contextlib import suppress
from pathlib import Path

from data_tools.spelling import nearest

PROJECT = Path(__file__).resolve().parent.parent


def not_found(name: str) -> str:
    """Why a path cannot be read: the whole path, the same one in the project's folder, or a like name beside it."""
    path = Path(name)
    said = "no such file or folder" + ("" if path.is_absolute() else f"; looked for {path.absolute()}")
    if not path.is_absolute() and (PROJECT / path).exists():
        return f"{said}; there is one in the project's folder: {PROJECT / path}"
    with suppress(OSError):  # a folder that is not there, or not to be read
        if near := nearest(path.name, (each.name for each in path.parent.iterdir()), cutoff=0.75):
            return f"{said}; did you mean {path.parent / near}?"
    return said
