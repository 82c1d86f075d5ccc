"""Whether this Python can run Handloop, and how to get one that can.

Nothing here is newer than Python 3.8, and nothing of ours is imported before: an old Python must be told as well.
"""

import os
import re
import shlex
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BAD_INPUT = 78  # ExitCode.BAD_INPUT
OLDEST = (3, 11)
NUM_NAMED = 4


def check_packages() -> None:
    """Ends the process with 78 and one message if this Python is too old, lacks a package or has no docstrings."""
    check_docstrings()
    problem = _problem()
    if problem:
        print(f"handloop: {_way_out()}\n  {problem}", file=sys.stderr)
        sys.exit(BAD_INPUT)


def check_docstrings() -> None:
    """Ends the process with 78 where Python leaves docstrings out: transformers reads its own at its import."""
    if sys.flags.optimize > 1:
        told = "handloop: transformers reads docstrings, which PYTHONOPTIMIZE=2 (python -OO) leaves out; 1 (-O) will do"
        print(told, file=sys.stderr)
        sys.exit(BAD_INPUT)


def _problem() -> str:
    here = sys.executable
    if sys.version_info < OLDEST:
        return "{} is Python {}.{}; {}.{} or newer is needed".format(here, *sys.version_info[:2], *OLDEST)
    project = os.path.join(ROOT, "pyproject.toml")
    if not os.path.exists(project):
        return ""  # not the project's folder: an installed package, whose installer has seen to it
    import tomllib
    from importlib.metadata import PackageNotFoundError, version

    with open(project, "rb") as file:
        wanted = tomllib.load(file)["project"]["dependencies"]
    absent, old = [], []
    for requirement in wanted:
        if ";" in requirement:  # for some systems alone
            continue
        name, _, oldest = re.match(r"([\w.-]+)(.*?>=([\d.]+))?", requirement).groups("")  # type: ignore[union-attr]
        try:
            found = version(name)
        except PackageNotFoundError:
            absent.append(name)
            continue
        if _numbers(found) < _numbers(oldest):
            old.append(f"{name} {found} (wanted: {requirement})")
    if absent:
        more = f" and {len(absent) - NUM_NAMED} more" if len(absent) > NUM_NAMED else ""
        return "{} lacks {}{}".format(here, ", ".join(absent[:NUM_NAMED]), more)
    return "{} has {}".format(here, ", ".join(old)) if old else ""


def _numbers(version: str) -> "list[int]":
    """The release of a version: [2, 11] of 2.11.0+cu130's beginning."""
    release = re.match(r"[\d.]*", version)
    return [int(number) for number in release.group().split(".") if number] if release else []


def _way_out() -> str:
    environment = os.path.join(ROOT, ".venv")
    python = os.path.join(environment, "bin", "python")
    if os.path.exists(python) and os.path.realpath(sys.prefix) != os.path.realpath(environment):
        words = sys.orig_argv[1:] if sys.version_info >= (3, 10) else sys.argv
        return "run it with the project's environment: {}".format(" ".join(map(shlex.quote, [python, *words])))
    folder = "" if os.getcwd() == ROOT else f" in {ROOT}"
    return f"install it first{folder}: `bash launch/demo.sh` does all set-up, or pip install -c constraints.txt -e ."
