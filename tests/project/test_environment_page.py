"""docs/ENVIRONMENT.md: each name in its tables is one that we read or try, or one that the library it names reads."""

import importlib.util
import re
from functools import cache
from pathlib import Path

from tests.conftest import ROOT
from tests.project.sources import files_in

PAGE = (ROOT / "docs" / "ENVIRONMENT.md").read_text(encoding="utf-8")
# accelerate's own names of settings, in its launcher's options
LIBRARIES = {"wandb", "accelerate", "huggingface_hub", "datasets", "transformers", "mlflow", "botocore"}
EXTRAS = {name for name in ("mlflow", "botocore") if importlib.util.find_spec(name) is None}  # not here


@cache
def source_of(library: str) -> str:
    """All Python source of a library, or of ours."""
    if library == "handloop":
        paths = files_in("train", "data_tools")
    else:
        found = importlib.util.find_spec(library)
        assert found is not None
        assert found.origin is not None
        paths = sorted(Path(found.origin).parent.rglob("*.py"))
    return "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in paths)


def rows() -> list[list[str]]:
    """The cells of each row of the tables."""
    lines = [
        line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith(("| variable", "| setting"))
    ]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def is_spelled(name: str, text: str) -> bool:
    return re.search(rf"(?<![A-Za-z_]){name}(?![A-Za-z_])", text) is not None


def test_every_variable_is_read_by_whom_it_says() -> None:
    """Where it says handloop, our source names the variable; otherwise the library's does."""
    num_names = 0
    for variables, reader, _ in rows():
        names = re.findall(r"`([A-Z][A-Z0-9_]+)`", variables)
        readers = [word for word in re.split(r", ", reader) if word in {*LIBRARIES, "handloop"}]
        for name in names:
            num_names += 1
            assert readers, name
            if EXTRAS & set(readers):
                continue
            stem = name.removeprefix("WANDB_").lower()  # wandb derives most names from its settings
            in_settings = "wandb" in readers and is_spelled(stem, source_of("wandb"))
            assert in_settings or any(is_spelled(name, source_of(each)) for each in readers), name
    assert num_names > 50


def test_every_setting_of_accelerate_is_one() -> None:
    """Its variable is refused or honoured in our source, or read by accelerate; the setting is an option of its."""
    section = PAGE.partition("## accelerate")[2].partition("\n## ")[0]
    settings = re.findall(r"^\| (.*?) \| (.*?) \|", section, re.MULTILINE)[2:]
    assert len(settings) > 10
    for named, variables in settings:
        for name in re.findall(r"`(\w+)`", named):
            assert is_spelled(name, source_of("accelerate")), name
        for name in re.findall(r"`(\w+)`", variables):
            assert is_spelled(name, source_of("handloop")) or is_spelled(name, source_of("accelerate")), name


def test_every_variable_that_we_read_is_on_the_page() -> None:
    """Variables of ours for other purposes, and those of CUDA's and git's children, are not."""
    ours = set(
        re.findall(
            r'"((?:WANDB|MLFLOW|ACCELERATE|HF|HANDLOOP|OMP|MKL|CUBLAS|NVIDIA|TORCH|PYTORCH|MASTER|PMI)_[A-Z0-9_]+)"',
            source_of("handloop"),
        )
    )
    internal = {"HANDLOOP_LAUNCHER", "WANDB_IDENTITY_TOKEN"}  # between launcher and trainer; redacted
    assert {"WANDB_DISABLED", "ACCELERATE_USE_FSDP", "OMP_NUM_THREADS", "HANDLOOP_CACHE"} <= ours
    assert [name for name in sorted(ours - internal) if f"`{name}`" not in PAGE] == []
