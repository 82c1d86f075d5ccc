"""The table of docs/DISTRIBUTED.md says what the plan says. After a change of the plan, read what this prints:

python -m tests.project.test_plan_table
"""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, published_llama, thorough
from train.cli import parse
from train.commands.forecast import assumed_lengths, forecast, parse_gpu
from train.commands.plan import DEFAULT_LINK
from train.layout import arranged
from train.memory.cluster import Cluster
from train.memory.outlook import GIB

PAGE = ROOT / "docs" / "DISTRIBUTED.md"
HEADING = "| base | GPUs | options | where the weights are | a GPU, GiB | host, GiB | tokens/s |"
LLAMA: dict[str, Any] = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072}
SHAPES: dict[str, dict[str, Any]] = {
    "8B": LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": LLAMA
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}


def rows() -> list[list[str]]:
    """The cells of each row of the table, as the page has them."""
    lines = PAGE.read_text(encoding="utf-8").partition(HEADING)[2].splitlines()[2:]
    table = lines[: next(number for number, line in enumerate(lines) if not line.startswith("|"))]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in table]


def planned(cells: list[str], folder: Path) -> list[str]:
    """The row as the plan has it."""
    base, gpus, options = cells[:3]
    *nodes, count, card = gpus.split(" x ")
    cluster = Cluster(int(count), int(*nodes or [1]), DEFAULT_LINK)
    words = ["--profile", "multi_gpu", "--model.name_or_path", str(folder), *options.strip("`").split()]
    config = parse(words)
    config = replace(config, batch=arranged(config.batch, cluster.num_processes))
    found = forecast(config, parse_gpu(card), assumed_lengths(config, config.data.max_length), None, cluster)
    plan, peak = found.plan, f"{found.plan.peak_bytes / GIB:.1f}"
    if found.tokens_per_second is None:
        return [base, gpus, options, "does not fit", peak, "", ""]
    places = [f"{len(plan.streamed)} of {plan.num_blocks} blocks streamed"] if plan.streamed else []
    if plan.num_shards > 1 and len(plan.streamed) < plan.num_blocks:
        places.append("the rest shared out" if plan.streamed else "shared out")
    speed = f"{float(format(found.tokens_per_second, '.2g')):,.0f}"
    where = ", ".join(places) or "on each GPU"
    return [base, gpus, options, where, peak, f"{plan.host_bytes / GIB:.0f}", speed]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: published_llama(tmp_path_factory.mktemp(name), **shape) for name, shape in SHAPES.items()}


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, pytest.param(1, marks=thorough)])
def test_the_table_is_what_the_plan_says(first: int, shapes: dict[str, Path]) -> None:
    """Every second row, from each first one, its memory, and its speed to two digits."""
    table = rows()[first::2]
    assert {cells[0] for cells in table} == set(SHAPES)
    for cells in table:
        assert cells == planned(cells, shapes[cells[0]])


def test_the_table_has_rows_of_every_kind() -> None:
    """Of both bases, sharded, streamed, of two machines, and one that does not fit."""
    told = " ".join(cell for cells in rows() for cell in cells)
    assert all(
        word in told for word in ("8B", "70B", "shared out", "streamed", "on each GPU", "does not fit", "2 x 8 x")
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as there:
        for name, shape in SHAPES.items():
            (Path(there) / name).mkdir()
            published_llama(Path(there) / name, **shape)
        for row in rows():
            print(f"| {' | '.join(planned(row, Path(there) / row[0]))} |")
