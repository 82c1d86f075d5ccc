"""benchmarks.scaling_table puts predictions for several GPUs beside what was measured; tried on a tiny shape."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import public, scaling, scaling_table
from benchmarks.public import OF_MLPERF, Workload
from tests.conftest import thorough

Call = Callable[..., str]
TINY = Workload("Llama-2-70B", 640, 2, "--lora.r 4 --batch.per_device 1 --model.max_positions 640", OF_MLPERF)

SPEEDS = {"H200": 900.0, "H100": 800.0}  # predicted of one


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Call:
    """A call of the script with files of its own: what it printed."""

    def call(*words: str) -> str:
        files = ["--predicted", str(tmp_path / "predicted.json")]
        files += ["--measured", str(tmp_path / "scaling.json"), str(tmp_path / "public.json")]
        monkeypatch.setattr(sys, "argv", ["scaling_table", *words, *files])
        scaling_table.main()
        return capsys.readouterr().out

    return call


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Of the three files: replicas on one and two H200s, sharded on two, and one that was never measured."""

    def run(count: int, speed: float, **more: Any) -> dict[str, Any]:
        return {"processes": count, "tokens_per_second": speed, "peak_gib": 10.04, "host_gib": 3.2} | more

    def plan(card: str, count: int, times: float | None, **more: Any) -> dict[str, Any]:
        row = {"gpu": card, "gpus": count, "fits": times is not None, "times_one": times, "gib_a_gpu": 9.0}
        return row | {"tokens_per_second": times and SPEEDS[card] * times, "host_gib": 7.7} | more

    device = {"device": "NVIDIA H200, 139.8 GiB"}
    measured = {"packed": {**device, "rows": [run(1, 1000.0), run(2, 1800.0)]}}
    measured["packed, sharded"] = {**device, "rows": [run(2, 1600.0)]}
    (tmp_path / "scaling.json").write_text(json.dumps(measured))
    failed = {"processes": 1, "failed": "CUDA out of memory"}
    rows = [failed, run(8, 500.0, rows_a_step=4)]
    (tmp_path / "public.json").write_text(json.dumps({"mlperf-70b": {**device, "rows": rows}}))
    plans = [plan(card, count, times) for card in SPEEDS for count, times in ((1, 1.0), (2, 1.9), (8, None))]
    refused = {"gpu": "H200", "gpus": 64, "fits": False, "refused": "several machines"}
    workloads = {"packed": plans, "packed-sharded": [plan("H200", 2, 1.8), refused], "llama-70b": plans}
    predicted = {"workloads": {name: {"rows": rows} for name, rows in workloads.items()}}
    (tmp_path / "predicted.json").write_text(json.dumps(predicted))
    return tmp_path


def test_what_is_measured_stands_beside_what_is_predicted(call: Call, results: Path) -> None:
    """Of the same card; sharded weights beside replicas on one GPU; what is not there is a dash."""
    assert [line.strip("| ") for line in call().splitlines()[2:]] == [
        "packed, H200 | 1 | 1,000 | 1.00 | 900 (1.00) | -10% | 10.0 | 9.0 | 3 | 8",
        "packed, H200 | 2 | 1,800 | 1.80 | 1,710 (1.90) | -5% | 10.0 | 9.0 | 3 | 8",
        "packed, H200 | 8 | - | - | does not fit | - | - | 9.0 | - | 8",
        "packed-sharded, H200 | 2 | 1,600 | 1.60 | 1,620 (1.80) | +1% | 10.0 | 9.0 | 3 | 8",
        "packed-sharded, H200 | 64 | - | - | refused | - | - | - | - | -",
        "llama-70b, H100 | 1 | - | - | 800 (1.00) | - | - | 9.0 | - | 8",
        "llama-70b, H100 | 2 | - | - | 1,520 (1.90) | - | - | 9.0 | - | 8",
        "llama-70b, H100 | 8 | - | - | does not fit | - | - | 9.0 | - | 8",
    ]
    assert call("llama-70b", "--gpu", "H200").count("llama-70b, H200") == 3


def test_another_step_is_no_row(call: Call, results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Eight GPUs with four rows in place of eight: said, and left out; so is a run that failed."""
    options = {"measured": [results / "public.json"], "predicted": results / "predicted.json", "gpu": ["H100"]}
    assert scaling_table.beside("mlperf-70b", scaling_table.argparse.Namespace(**options)) == []
    assert capsys.readouterr().err == "mlperf-70b on 8 GPUs is left out: 4 rows a step, not 8\n"


def test_the_picture_has_lines_and_points(call: Call, results: Path) -> None:
    """A line for each prediction of more than nothing, a point for each measurement, and the ideal in each panel."""
    call("--picture", str(results / "picture.svg"))
    root = ElementTree.parse(results / "picture.svg").getroot()
    lines, points = root.findall("{*}polyline"), root.findall("{*}circle")
    assert [each.get("class") for each in lines] == ["ideal", "packed", "packed-sharded", "ideal", "llama-70b"]
    assert [each.get("class") for each in points] == ["packed", "packed", "packed-sharded"]
    first, second = (float(each.get("cy") or 0) for each in points[:2])
    assert first > second  # more is higher
    assert "packed, H200: 1.0 on 1, 1.9 on 2" in [each.text for each in root.iter("{http://www.w3.org/2000/svg}text")]
    with pytest.raises(SystemExit, match="--predict packed"):
        scaling_table.picture({})


def test_further_options_have_rows_of_their_own(
    monkeypatch: pytest.MonkeyPatch, shape: Path, pairs: Path, tmp_path: Path
) -> None:
    """Sharded weights do not replace the replicas' rows; the table finds both, and all that the project's file has."""
    speeds = iter((1000.0, 900.0, 800.0, 1100.0))
    monkeypatch.setattr(scaling, "measured", lambda *_: {"tokens_per_second": next(speeds)})
    monkeypatch.setattr(scaling, "imbalance", lambda *_: {})
    monkeypatch.setattr(scaling, "line", lambda *_: "")
    out = tmp_path / "scaling.json"
    words = [
        "--workloads",
        "packed",
        "--processes",
        "1",
        "--shape",
        str(shape),
        "--data",
        str(pairs),
        "--out",
        str(out),
    ]
    words += ["--warmup", "0", "--steps", "1"]
    for further in ([], ["--", *scaling.SHARD], ["--", "--optim.lr", "8"], []):
        monkeypatch.setattr(sys, "argv", ["scaling", *words, *further])
        scaling.main()
    found = {name: each["rows"][0]["tokens_per_second"] for name, each in json.loads(out.read_text()).items()}
    assert found == {"packed": 1100.0, "packed, sharded": 900.0, "packed, --optim.lr 8": 800.0}
    assert {"packed", "packed, sharded"} < {scaling_table.key_of(name) for name in scaling_table.NAMES}
    assert json.loads(scaling.RESULTS.read_text()).keys() <= {
        scaling_table.key_of(name) for name in scaling_table.NAMES
    }


@thorough
@pytest.mark.slow
def test_the_plan_of_one_and_two_gpus(call: Call, shape: Path, tmp_path: Path) -> None:
    """Sharded weights have a row for two GPUs alone, beside replicas on one; two machines are refused."""
    config = json.loads((shape / "config.json").read_text()) | {"max_position_embeddings": 2048}
    (tmp_path / "config.json").write_text(json.dumps(config))
    call("--predict", "packed-sharded", "--shape", str(tmp_path), "--gpu", "H100", "--gpus", "1", "2", "16")
    found = json.loads((tmp_path / "predicted.json").read_text())
    two, sixteen = found["workloads"]["packed-sharded"]["rows"]
    assert "not measured" in found["note"]
    assert (two["gpu"], two["gpus"], two["samples_a_step"], two["fits"]) == ("H100", 2, 16, True)
    assert 1 < two["times_one"] <= 2
    assert two["host_gib"] == pytest.approx(two["pinned_gib"] + 5)
    assert (sixteen["samples_a_step"], sixteen["fits"]) == (32, False)
    assert sixteen["refused"].startswith("--memory.shard: 16 processes are on several machines")


@pytest.mark.slow
def test_the_plan_of_a_published_shape(
    call: Call, shape: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row for each card; rows of the file stay unless their workload is named; MLPerf's has the time of 384 rows."""
    monkeypatch.setitem(public.WORKLOADS, "tiny", TINY)
    monkeypatch.setattr(scaling_table, "NAMES", ("tiny",))
    (tmp_path / "predicted.json").write_text(json.dumps({"workloads": {"other": {}}}))
    call("--predict", "tiny", "--shape", str(shape), "--gpus", "1")
    found = json.loads((tmp_path / "predicted.json").read_text())["workloads"]
    assert [*found] == ["other", "tiny"]
    assert {"date", "commit", "words"} < set(found["tiny"])
    assert [row["gpu"] for row in found["tiny"]["rows"]] == ["H100", "H200"]
    for row in found["tiny"]["rows"]:
        assert row["seconds_for_384_sequences"] == pytest.approx(384 * 640 / row["tokens_per_second"], abs=0.1)
        assert row["tokens_per_second"] * row["step_seconds"] == pytest.approx(2 * 640, rel=0.1)  # of few digits


@pytest.mark.parametrize("words", [("nothing",), ("--gpus", "12")])
def test_what_cannot_be_asked_is_refused(call: Call, words: tuple[str, ...]) -> None:
    """A workload that is none, and machines that are not whole."""
    with pytest.raises(SystemExit, match="2"):
        call("--predict", *words)
