"""Run folders with files in them."""

from pathlib import Path

from train.run.folder import RunFolder


def fill(folder: RunFolder, names: list[str]) -> None:
    """Files with their name as content; one that ends in / is a folder with a file."""
    for name in names:
        path = folder.path / name
        if name.endswith("/"):
            path.mkdir(parents=True)
            path = path / "file"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def names_in(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}
