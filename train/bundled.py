"""What lies elsewhere in a checkout than in an installed wheel: the files that come with the program, and its scripts.

A wheel has the demo's base and data and accelerate's configurations. The scripts in launch/ are a checkout's alone.
"""

import shlex
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_INSTALLED = _HERE / "bundled_files"  # setup.py copies them there for a wheel
MAIN = _HERE / "main.py"  # what accelerate launches


def bundled(name: str) -> Path:
    """`demo` or `accelerate_configs`, or a path within: of a wheel, or else of the checkout that this is."""
    return (_INSTALLED if _INSTALLED.is_dir() else _HERE.parent) / name


def typed(path: Path) -> str:
    """The path as it can be typed here: from the current folder, if it is below that."""
    return shlex.quote(str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path))


def script(name: str) -> str:
    """The command that runs a script of launch/; empty where there are none."""
    path = _HERE.parent / "launch" / name
    return "" if _INSTALLED.is_dir() else f"bash {typed(path)}"


def how_to_install(extra: str = "") -> str:
    """The command that installs what an extra needs, or without one what everything needs."""
    if not _INSTALLED.is_dir():
        return f".venv/bin/pip install -c constraints.txt -e {shlex.quote(f'.[{extra}]') if extra else '.'}"
    found = (line.partition(";") for line in _requirements())
    wanted = [name.strip() for name, _, marker in found if (extra in marker if extra else not marker)]
    return f"pip install {' '.join(map(shlex.quote, wanted))}"


def _requirements() -> list[str]:
    try:
        return requires("handloop") or []
    except PackageNotFoundError:  # the folder alone is on Python's path
        return []
