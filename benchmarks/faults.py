"""Turns the tally of the fault tests into benchmarks/results/faults.json and the table of docs/RELIABILITY.md.

    bash launch/test.sh --faults full

runs the tests with their full counts and then this.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.interrupted_run import ROOT, commit
from train.run.versions import versions

RESULTS = ROOT / "benchmarks" / "results" / "faults.json"
PAGE = ROOT / "docs" / "RELIABILITY.md"
BEGIN, END = "<!-- table: bash launch/test.sh --faults full -->", "<!-- end of the table -->"

# what is done to the program, and what has to come of it
FAULTS = {
    "T1": "SIGKILL at random moments, loading included | the repeated command ends in the same bits",
    "T2": "SIGKILL before and after every disk operation of a save | resumes from a whole checkpoint, same bits",
    "T3": "power cut after every disk operation, unsynced data lost, kept or torn | a checkpoint not older than the "
    "last that was reported; taking any fsync away is seen",
    "T4": "files of a checkpoint cut short | passed over, kept aside, the file named",
    "T5": "single bits flipped in any file of a checkpoint | all found",
    "T6": "forged, missing, extra, linked and special files | refused; nothing outside the folder is read",
    "T7": "every checkpoint damaged | exit 80, at each further start too; nothing deleted",
    "T8": "full disk, injected and real | training goes on, the older checkpoint stands, no rubbish; 76 if it stays",
    "T9": "I/O errors, missing rights, a slow disk | likewise",
    "T10": "SIGTERM, SIGUSR1, SIGINT, SIGHUP at random moments, in a save, twice | exit 75, then the same bits",
    "T11": "signals to the launcher alone | the trainer saves, no process is left, ours returns the real code",
    "T12": "accumulation, optimizer, dropout, schedule, place of the kill, crossed | same bits",
    "T13": "ten kills in a chain | same bits",
    "T14": "another number of processes | the same samples in the same steps, losses within 1e-5",
    "T15": "one of two processes killed | the other ends with 81 soon; started again: same bits",
    "T16": "a process hangs, or the first cannot save | 81, the silent one named; or 76 in all of them",
    "T17": "two jobs in one folder, a lock left behind | the second is refused, the first unharmed",
    "T18": "NaN or infinity in loss or gradient | one decision in all processes, counted, noted, never published",
    "T19": "Weights & Biases absent, unreachable, hanging, failing, killed | same bits, at most 20 s more",
    "T20": "resume of a watched run | the same run id, each step once",
    "T21": "malformed and mutated data | file, line and reason, or skipped and counted; bounded time and memory",
    "T22": "a changed recipe, base, file or template | exit 77, naming exactly what changed",
    "T23": "secrets in environment, configuration, arguments, errors | found nowhere",
    "T24": "malicious pickles in every slot | never opened",
    "T25": "hundreds of steps, each saved | open files and memory do not grow",
    "T26": "a trainer killed, stopped or failing alone | a code and a sentence of its own; of several, the one at "
    "fault is named within the timeout and ten seconds",
    "T27": "a stop signal within a step or a validation | durable one micro-batch and a save later; same bits",
    "T28": "a defect, a terminal that is gone, a home or cache that cannot be written | exit.json says code, what was "
    "being done and what to do; or training goes on",
    "T29": "a base whose files are not those of its config.json | refused by both loaders, with the tensors' names",
    "T30": "heads, blocks and layers that compute another model than we do | refused before the first step",
}

# where the moment or the place of the fault is drawn at random, so that more tries would see more
RANDOM = ("T1", "T5", "T10", "T21")


def main(tally: Path) -> None:
    """Writes both files from the lines of `tally`."""
    rows = summarise([json.loads(line) for line in tally.read_text(encoding="utf-8").splitlines()])
    report = {"rows": rows, "versions": versions(), "commit": commit()}
    RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(before + BEGIN + "\n\n" + table(rows) + "\n\n" + END + after, encoding="utf-8")
    print(table(rows))


def summarise(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a fault: tries, failures, and the share of failures that so many tries cannot exclude."""
    grouped = defaultdict(list)
    for record in records:
        grouped[record["test"]].append(record)
    missing = set(FAULTS) - set(grouped)
    if missing:
        raise SystemExit(f"no test reported {', '.join(sorted(missing))}: the table would be incomplete")
    return [
        {
            "test": name,
            "count": sum(record["count"] for record in grouped[name]),
            "random_tries": (tries := _random_tries(name, grouped[name])),
            "failures": (failures := sum(record["failures"] for record in grouped[name])),
            "upper_bound_95": None if failures or not tries else round(1 - 0.05 ** (1 / tries), 4),
            "seconds": round(sum(record["seconds"] for record in grouped[name]), 1),
        }
        for name in FAULTS
    ]


def _random_tries(name: str, records: list[dict[str, Any]]) -> int:
    return sum(record["tries"] for record in records) if name in RANDOM else 0


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| | fault | what has to come of it | checks | failures | random tries: bound |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        bound = "" if row["upper_bound_95"] is None else f"{row['random_tries']:,}: {row['upper_bound_95']:.1%}"
        lines.append(f"| {row['test']} | {FAULTS[row['test']]} | {row['count']:,} | {row['failures']} | {bound} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
