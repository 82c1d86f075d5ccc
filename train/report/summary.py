"""A run in a few figures, and what distinguishes several: for the list of runs and the page of several."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import Any

from train.profiles import PROFILES
from train.report.blocks import Cell
from train.report.curves import Curve, curve
from train.report.record import RunRecord, is_run, read_run
from train.report.values import at, number, shown, texts, whole
from train.run.attempts import plain
from train.run.folder import PREVIOUS, read_object

NOT_COMPARED = {"run.dir", "run.resume", "run.extend"}  # where a run is and how it was started again, not what it is


@dataclass(frozen=True)
class Summary:
    """One run in figures; None: not known."""

    name: str
    path: str
    state: str
    code: int | None
    reason: str
    started: str  # of the first attempt, in UTC
    base: str
    data: list[str]
    step: int
    total_steps: int | None
    loss_last: float | None
    loss_best: float | None
    eval_loss_best: float | None
    eval_loss_best_step: int | None
    tokens_per_second: float | None  # median of the steps
    peak_reserved_gib: float | None
    seconds: float | None
    size_bytes: int
    num_attempts: int
    exact: str  # held-out questions, else trained ones, that are answered word for word
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        """For --json."""
        return plain(asdict(self))


def summary_of(run: RunRecord, name: str = "") -> Summary:
    """The figures of a run, under the name that a list gives it."""
    losses, held_out = curve(run.rows, "train/loss"), run.held_out
    data = at(run.config, "data", "path")
    return Summary(
        name=name or run.name,
        path=str(run.folder.path),
        state=run.state,
        code=whole(run.ending.get("code")) if run.state != "running" else None,
        reason=shown(run.ending.get("reason", "")) if run.ending and run.state != "running" else "",
        started=shown(run.attempts[0].start.get("time", "")) if run.attempts else "",
        base=base_name(run),
        data=[data_name(each) for each in texts(data)],
        step=run.last_step,
        total_steps=run.total_steps,
        loss_last=losses.values[-1] if len(losses) else None,
        loss_best=lowest(losses)[0],
        eval_loss_best=lowest(held_out)[0],
        eval_loss_best_step=lowest(held_out)[1],
        tokens_per_second=run.median("perf/tokens_per_second"),
        peak_reserved_gib=max(run.values("memory/peak_reserved_gib"), default=None),
        seconds=run.seconds,
        size_bytes=size_of(run.folder.path),
        num_attempts=len(run.attempts),
        exact=_exact(run),
        notes=run.notes,
    )


def base_name(run: RunRecord) -> str:
    """The hub id of the base, or the last part of its folder's path."""
    name = at(run.config, "model", "name_or_path") or run.base.get("name") or at(run.start, "base", "name")
    return data_name(shown(name)) if name else ""


def data_name(name: str) -> str:
    """The last part of an absolute path, or of one from the home folder; a hub id or another path as it is."""
    return (PurePath(name).name or name) if name.startswith(("/", "~")) else name


def lowest(of: Curve) -> tuple[float | None, int | None]:
    """The lowest value and its step."""
    return (of.values[of.lowest], of.steps[of.lowest]) if len(of) else (None, None)


def size_of(folder: Path) -> int:
    """Bytes of all files below, links not followed."""
    total = 0
    for place, _, names in os.walk(folder, onerror=None):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except OSError:  # gone meanwhile
                continue
    return total


def _exact(run: RunRecord) -> str:
    groups = at(read_object(run.folder.comparison), "groups")
    for kind in ("held_out", "trained"):
        found = at(groups, kind, "after", "exact")
        count, total = whole(at(found, "count")), whole(at(found, "total"))
        if count is not None and total:
            return f"{count} of {total} {kind.replace('_', ' ')}"
    return ""


def results_of(run: RunRecord) -> dict[str, Cell]:
    """What came of a run, by name, to stand beside that of others."""
    told = summary_of(run)
    last, best = told.loss_last, told.eval_loss_best
    return {
        "state": told.state if told.code in (None, 0) else f"{told.state} ({told.code})",
        "started": told.started or None,
        "step": told.step,
        "of steps": told.total_steps,
        "training loss, last": last,
        "training loss, lowest": told.loss_best,
        "validation loss, lowest": best,
        "at step": told.eval_loss_best_step,
        "answered word for word": told.exact or None,
        "tokens/s, median": told.tokens_per_second,
        "peak memory reserved, GiB": told.peak_reserved_gib,
        "seconds": number(told.seconds),
        "bytes on disk": told.size_bytes,
        "device": shown(run.start.get("device")) if run.start.get("device") else None,
    }


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """`section.option` -> value."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        found |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    return found


def profile_of(config: dict[str, Any]) -> dict[str, Any]:
    """The options that the configuration's profile has by itself; empty for a profile that this version lacks."""
    make = PROFILES.get(shown(config.get("profile")))
    return flat(plain(asdict(make()))) if make else {}


def differing(configs: Sequence[dict[str, Any]]) -> list[tuple[str, list[Any]]]:
    """The options that are not the same in all, in the first's order; None where one has no such option."""
    options = [flat(config) for config in configs]
    names = dict.fromkeys(name for each in options for name in each)
    rows = [(name, [each.get(name) for each in options]) for name in names if name not in NOT_COMPARED]
    return [(name, values) for name, values in rows if any(value != values[0] for value in values)]


def find_runs(folder: Path) -> list[Path]:
    """The run folders at or below this one, earlier runs that were moved aside included; links are not followed."""
    found = []
    for place, names, _ in os.walk(folder):
        here = is_run(Path(place))
        if here:
            found.append(Path(place))
        names[:] = sorted(name for name in names if (PREVIOUS.fullmatch(name) if here else not name.startswith(".")))
    return found


def read_runs(folders: Sequence[Path]) -> list[tuple[str, RunRecord]]:
    """The runs at or below the folders, each under its shortest telling name, the one that started last first."""
    found: dict[Path, tuple[str, RunRecord]] = {}
    for folder in folders:
        for path in find_runs(folder):
            run = read_run(path)
            name = run.name if path == folder else path.relative_to(folder).as_posix()
            found.setdefault(path.resolve(), (name, run))
    return sorted(found.values(), key=lambda pair: (_started(pair[1]), pair[0]), reverse=True)


def _started(run: RunRecord) -> str:
    return shown(run.attempts[0].start.get("time", "")) if run.attempts else ""
