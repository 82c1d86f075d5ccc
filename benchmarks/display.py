"""Draws the display of a run as it was at a step, out of its run folder: `docs/display.svg`.

    python -m benchmarks.display RUN --step 150 --base SmolLM2-135M --out docs/display.svg

The same folder and step give the same bytes. The picture in docs/ is of SmolLM2-135M in NF4 on the bundled glossary
(`--profile a100 --data.path demo/glossary.jsonl --data.validation_path demo/held_out.jsonl`, 16 samples a step, six
epochs) on one H100.
"""

import argparse
import io
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from train.run.attempts import last_start
from train.run.folder import RunFolder
from train.track.metrics_file import read_metrics
from train.track.progress import Progress, RunFacts
from train.track.screen import Line, Room, screen

ROWS, COLUMNS = 20, 80


def main() -> None:
    """Writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--step", type=int, required=True)
    parser.add_argument("--base", default="", help="the base's name, where its folder has another")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    facts = facts_of(RunFolder(options.run), options.base)
    progress, now = replayed(facts, read_metrics(facts.folder.metrics), options.step)
    options.out.write_text(drawing(screen(progress, now, Room(COLUMNS, ROWS, is_ascii=False))), encoding="utf-8")


def facts_of(folder: RunFolder, base: str) -> RunFacts:
    """What the run's records say of it."""
    config, plan = (json.loads(path.read_text(encoding="utf-8")) for path in (folder.config, folder.plan))
    start = last_start(folder)
    return RunFacts(
        folder=folder,
        base=base or Path(config["model"]["name_or_path"]).name,
        data=Path(config["data"]["path"][0]).name,
        method=f"LoRA r={config['lora']['r']} on {config['model']['quantization'].upper()}",
        device=start["device"].partition(",")[0],
        total_steps=start["data"]["total_steps"],
        steps_per_epoch=start["data"]["steps_per_epoch"],
        planned_gib=plan["peak_bytes"] / 2**30,
        uses_graphs=plan["uses_graphs"],
    )


def replayed(facts: RunFacts, rows: Iterable[dict[str, Any]], step: int) -> tuple[Progress, float]:
    """What is known after the step, and when that is, by the seconds of steps and saves."""
    progress, now = Progress(facts, first_step=0), 0.0
    for row in rows:
        if row["step"] <= step:
            now += row.get("perf/step_seconds", 0.0) + row.get("perf/save_seconds", 0.0)
            progress.take(row, now)
    return progress, now


def drawing(lines: list[Line]) -> str:
    """The lines as an SVG without fonts from elsewhere."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    for line in lines:
        console.print(Text.assemble(*line), soft_wrap=True)
    svg = console.export_svg(title="Handloop", unique_id="display")
    svg = re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    return svg.replace("Fira Code, monospace", "ui-monospace, 'Fira Code', Menlo, Consolas, monospace")


if __name__ == "__main__":
    main()
