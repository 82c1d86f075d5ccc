"""benchmarks.fidelity compares runs in bf16 with fp32, step by step; tried on a tiny model."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import fidelity
from benchmarks.fidelity_layer import SHARES, layer
from benchmarks.fidelity_picture import LOWEST, smooth
from benchmarks.fidelity_runs import Setting
from benchmarks.fidelity_trace import Recorder, Trace, distances, flat, unflattened
from tests.conftest import thorough
from train.run.exits import ExitCode, ExitWith

Call = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def base(shape: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with random weights in bf16, which several processes read."""
    folder = tmp_path_factory.mktemp("fidelity") / "base"
    shutil.copytree(shape, folder)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(shape), dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def call(base: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Call:
    """A call of the script: what it wrote."""

    def call(*words: str) -> dict[str, Any]:
        own = ["--model", str(base), "--data", str(pairs), "--steps", "2", "--rates", "1e-3", "--bases", "none"]
        own += ["--out", str(tmp_path / "fidelity.json"), *words, "--"]
        own += ["--batch.per_device", "2", "--batch.accumulation", "2"]
        monkeypatch.setattr(sys, "argv", ["fidelity", *own])
        fidelity.main()
        return json.loads((tmp_path / "fidelity.json").read_text())

    return call


def test_programs_in_fp32_agree_and_those_in_bf16_are_further(
    call: Call, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Our two engines and transformers' Trainer, in its own process, are one run in fp32: rows, start and optimizer."""
    # with two seeds: the second begins where no run has been
    found = call("--seeds", "0", "1", "--systems", "fused-fp32", "fused", "reference", "seed")
    by_system: dict[str, list[dict[str, Any]]] = {}
    for row in found["rows"]:
        by_system.setdefault(row["system"], []).append(row)
    assert list(by_system) == ["fp32", "fused-fp32", "fused", "reference", "seed"]
    assert all([row["seed"] for row in rows] == [0, 1] for rows in by_system.values())
    for name in ("fused-fp32", "seed"):  # PEFT's preparation for k-bit training makes a base in 16 bits fp32
        for row in by_system[name]:
            assert len(row["loss_distance"]) == len(row["update_distance"]) == 2
            assert max(*row["loss_distance"], row["last_loss_distance"]) < 1e-5
            assert max(row["update_distance"]) < 0.02  # AdamW's first steps are +-rate, also where a gradient is noise
            assert row["last_gradient_distance"] < 1e-4
            assert min(row["first_gradient_cosine"], row["last_gradient_cosine"]) > 1 - 1e-8
    control = max(row["last_gradient_distance"] for row in by_system["fused-fp32"])
    for name in ("fused", "reference"):
        assert min(row["last_gradient_distance"] for row in by_system[name]) > 10 * control
        assert min(row["first_gradient_cosine"] for row in by_system[name]) > 0.99
    assert capsys.readouterr().out.count("\n| none | 0.001 |") == 4
    target = tmp_path / "picture.svg"
    sys.argv[1:1] = ["--picture", str(target)]  # the other words are those of the call
    fidelity.main()
    assert len(ElementTree.parse(target).getroot().findall("{*}polyline")) == 4


def test_rows_of_earlier_calls_stay_and_a_failing_peer_ends_nothing(
    call: Call, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A further call adds and replaces rows of the same steps; a peer that fails is told, one that is absent named."""
    call("--seeds", "0", "--systems", "fused")
    monkeypatch.setattr(fidelity, "needs", lambda system: ["not_a_package"] if system == "trl" else [])
    found = call("--seeds", "0", "--systems", "trl", "unsloth", "reference")
    assert [row["system"] for row in found["rows"]] == ["fused", "fp32", "reference"]
    said = capsys.readouterr().out
    assert "trl: not installed (not_a_package), left out" in said
    assert "unsloth on base none ended with 1" in said
    assert "ModuleNotFoundError: No module named 'unsloth'" in said


@thorough
def test_kept_runs_of_fp32_are_taken_where_all_is_the_same(
    call: Call, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is compared with them has the same numbers; another seed, other steps and other weights are run anew."""
    ran, original = [], fidelity.our_traces

    def our_traces(job: Any, system: str, settings: Any) -> Any:
        ran.extend((system, setting.seed) for setting in settings)
        return original(job, system, settings)

    def same(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]

    monkeypatch.setattr(fidelity, "our_traces", our_traces)
    words = ["--systems", "fused", "--keep", str(tmp_path / "kept"), "--seeds"]
    first = call(*words, "0")["rows"]
    (tmp_path / "fidelity.json").unlink()
    ran.clear()
    again = call(*words, "0")["rows"]
    assert ran == [("fused", 0)]
    assert same(again) == same(first)
    assert again[0]["seconds"] == first[0]["seconds"]  # fp32's own
    call(*words, "1", "0")
    assert ran[1:] == [("fp32", 1), ("fused", 1), ("fused", 0)]
    ran.clear()
    assert "made anew" not in capsys.readouterr().out
    call(*words, "0", "--steps", "1")
    assert "fp32-none-0.001-0.safetensors was made with another steps: made anew" in capsys.readouterr().out
    other = tmp_path / "base"
    shutil.copytree(base, other)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base), dtype=torch.bfloat16).save_pretrained(other)
    call(*words, "0", "--steps", "1", "--model", str(other))
    assert "was made with another base_sha256: made anew" in capsys.readouterr().out
    assert ran == [("fp32", 0), ("fused", 0)] * 2


def test_a_recorder_keeps_what_parameters_were() -> None:
    """In the order of their names, in fp32, whatever becomes of them; a gradient that is none is zeros."""
    parameters = {
        name: torch.nn.Parameter(torch.full((2, 1), value).bfloat16()) for name, value in (("b", 1.0), ("a", 2.0))
    }
    record = Recorder(parameters, 1)
    record.note_adapters()
    parameters["a"].grad = torch.full((2, 1), 7.0).bfloat16()
    record.note_gradient()
    with torch.no_grad():
        parameters["b"].add_(2)
    record.note_adapters()
    record.losses += [1.0, 2.0]
    found = record.trace()
    assert found.adapters.tolist() == [[2, 2, 1, 1], [2, 2, 3, 3]]
    assert found.gradients.tolist() == [[7, 7, 0, 0]]
    assert (found.adapters.dtype, found.gradients.dtype, found.losses.tolist()) == (
        torch.float32,
        torch.float32,
        [1, 2],
    )


def test_more_steps_than_rows_are_refused(call: Call) -> None:
    """An epoch's last step has fewer rows, which peers would fill from the next."""
    with pytest.raises(ExitWith, match="rows for 4 whole steps") as refused:
        call("--seeds", "0", "--steps", "5", "--systems", "fused")
    assert refused.value.code == ExitCode.BAD_INPUT


def test_a_first_loss_of_other_rows_is_refused() -> None:
    """Systems that do not compute the same would be compared for nothing."""
    setting, job = Setting("none", 1e-3, 0), fidelity.Job(None, None, {}, {})  # type: ignore[arg-type]
    one = Trace(torch.tensor([4.0, 3.9, 3.8]), torch.zeros(3, 2), torch.ones(2, 2))
    assert fidelity.compared(job, "fp32", setting, one) == {"losses": [4.0, 3.9]}
    other = Trace(torch.tensor([4.1, 3.9, 3.8]), torch.zeros(3, 2), torch.ones(2, 2))
    with pytest.raises(RuntimeError, match=r"trl: the first loss is 4\.1000, fp32's 4\.0000"):
        fidelity.compared(job, "trl", setting, other)


def test_distances_of_known_traces(tmp_path: Path) -> None:
    """Updates count from each run's own start, the cosine is that of the angle, and files hold all of it."""
    wanted = Trace(torch.tensor([4.0, 3.0, 2.0]), torch.tensor([[1.0, 1], [2, 1], [3, 1]]), torch.eye(2))
    own = Trace(
        torch.tensor([4.5, 3.0, 2.25]), torch.tensor([[9.0, 9], [10, 9], [11, 10]]), torch.tensor([[1.0, 1], [0, 2]])
    )
    own.save(tmp_path / "own.safetensors")
    found = distances(Trace.load(tmp_path / "own.safetensors"), wanted)
    assert (found["loss_distance"], found["last_loss_distance"]) == ([0.5, 0.0], 0.25)
    assert found["loss_excess"] == 0.25
    assert found["update_distance"] == [0.0, 0.5]
    assert found["first_gradient_cosine"] == pytest.approx(0.5**0.5)
    assert (found["last_gradient_cosine"], found["last_gradient_distance"]) == (1.0, 1.0)
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor([7.0])}
    back = unflattened(flat(tensors), dict(reversed(tensors.items())))
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_one_product_rounds_once() -> None:
    """It is as good as the exact result rounded; an output that is added to a rounded one is not."""
    rows = layer(torch.device("cpu"), size=256)
    assert [row["share"] for row in rows] == list(SHARES)
    for row in rows[1:]:  # where the adapter's own operands are not most of the error
        assert row["one product"] == pytest.approx(row["rounding"], rel=0.03)
        assert row["one product, kept"] == pytest.approx(1, abs=0.02)
    for row in rows[1:5]:
        assert 1.05 * row["one product"] < row["adapter added"] <= 1.01 * row["added in bf16"]
    assert all(row["base added, kept"] == pytest.approx(1, abs=0.04) for row in rows[1:])
    for way in ("adapter added", "added in bf16"):  # what is below half a step of a rounded number is lost
        assert all(row[f"{way}, kept"] > 0.99 for row in rows[:4])
        assert rows[5][f"{way}, kept"] < 0.6
        assert rows[6][f"{way}, kept"] < 0.25


def test_a_line_is_the_median_of_seeds_and_steps_around() -> None:
    """Where a step's distance passes through 0 the line does not."""
    points = smooth([[1.0, 0.0, 3.0, 4.0, 5.0, 6.0], [1.0, 0.0, 3.0, 4.0, 5.0, 6.0]])
    assert points == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 4.5), (6, 5.0)]
    assert smooth([[0.0]]) == [(1, LOWEST)]
