"""benchmarks.public runs the real job on published shapes and writes what it measured; tried on a tiny shape."""

import json
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from benchmarks import public
from benchmarks.public import NOTE, OF_MLPERF, WORKLOADS, Workload, main, reason_of
from benchmarks.real_job import HostMemory, _kill, measured, shape_folder
from tests.conftest import thorough
from tests.slurm_cluster import wait_for
from train.cli import parse
from train.data import read_data
from train.models.tokenizer import load_tokenizer

TINY = "--lora.r 4 --lora.target_modules all-linear --batch.per_device 1 --model.max_positions 640"
ON_CPU = ["--", "--run.device", "cpu", "--engine.kind", "fused"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, shape: Path, tmp_path: Path) -> Any:
    """A call of the script: what it wrote."""
    monkeypatch.setitem(WORKLOADS, "tiny", Workload("Llama-2-70B", 640, 2, TINY, OF_MLPERF, "tiny"))
    sharded = Workload("Llama-2-70B", 640, 2, f"{TINY} --memory.shard true", OF_MLPERF, is_sharded=True)
    monkeypatch.setitem(WORKLOADS, "sharded", sharded)

    def call(*words: str) -> dict[str, Any]:
        own = ["public", *words, "--shape", str(shape), "--out", str(tmp_path / "out.json"), *ON_CPU]
        monkeypatch.setattr(sys, "argv", own)
        main()
        found = json.loads((tmp_path / "out.json").read_text())
        further = ", " + " ".join(ON_CPU[1:])  # these rows stand apart from those without
        assert all(key.endswith(further) for key in found)
        return {key.removesuffix(further): rows for key, rows in found.items()}

    return call


def test_every_row_is_full(shape: Path, tmp_path: Path) -> None:
    """Also the last one of a text, so that steps have the same tokens."""
    folder, workload = shape_folder(AutoConfig.from_pretrained(shape), tmp_path / "shape"), WORKLOADS["mlperf-70b"]
    data = public.texts(folder, workload.tokens, 40, tmp_path / "texts.jsonl")
    words = public.words_of(workload, folder, data, workload.rows)
    config = parse([*words, "--run.dir", str(tmp_path / "run")])
    samples: Any = read_data(config, load_tokenizer(config).backend, date(2026, 1, 1)).training.samples
    assert len(samples) >= 40
    assert {len(sample["input_ids"]) for sample in samples} == {workload.tokens}


@thorough
def test_a_row_for_each_number_of_processes(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows longer than the base's positions, in full, on one process and shared out to two; another call adds rows."""
    run("tiny", "--processes", "1", "--warmup", "1", "--steps", "2")
    found = run("sharded", "--processes", "1", "2", "--warmup", "1", "--steps", "1", "--rows", "4")
    (one,), (two,) = found["tiny"]["rows"], found["sharded"]["rows"]
    assert found["tiny"]["note"] == f"{NOTE}; tiny"
    assert (one["processes"], one["measured_steps"], one["rows_a_step"]) == (1, 2, 2)
    assert (two["processes"], two["measured_steps"], two["rows_a_step"]) == (2, 1, 4)
    assert one["tokens_per_second"] * one["step_seconds"] == pytest.approx(2 * 640, rel=0.01)
    assert two["tokens_per_second"] * two["step_seconds"] == pytest.approx(4 * 640, rel=0.01)
    assert one["seconds_for_384_sequences"] == pytest.approx(384 / 2 * one["step_seconds"], rel=0.01)
    assert one["times_published"].keys() == {each.what for each in OF_MLPERF}
    assert "27.03 min to the target" in capsys.readouterr().out


def test_what_fails_is_a_row_with_its_reason(run: Any) -> None:
    """A job that ends by itself with an error does not end the script, and leaves the other rows."""
    public.WORKLOADS["tiny"] = Workload("Llama-2-70B", 640, 2, TINY.replace("640", "512"), (), "")
    (row,) = run("tiny", "--processes", "1", "--warmup", "0", "--steps", "1")["tiny"]["rows"]
    assert row["failed"].endswith("takes 512 already; leave it out (--data.max_length limits samples)")


def test_the_first_error_is_told() -> None:
    """Not torchrun's own report of it, which comes last."""
    said = "[rank1]: Traceback\n[rank1]: ValueError: this\nE1127 failed\ntorch.distributed.ChildFailedError: \n====\n"
    assert reason_of(said) == "[rank1]: ValueError: this"
    assert reason_of("killed\n") == "killed"
    refused = "\nhandloop: the configuration cannot be used:\n  --x: no such option\nusage: ...\nE1127 failed\n====\n"
    assert reason_of(refused) == "handloop: the configuration cannot be used: --x: no such option"


def test_a_workload_is_named_once(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Named twice it would be measured twice in one folder, which ends in a traceback."""
    with pytest.raises(SystemExit, match="2"):
        run("tiny", "sharded", "tiny", "--processes", "1")
    assert "tiny: named twice" in capsys.readouterr().err


def is_alive(process: Path) -> bool:
    """Whether the process with this file's number runs; one that nobody has waited for does not."""
    try:
        return Path("/proc", process.name, "stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def test_an_ended_job_leaves_no_process(tmp_path: Path) -> None:
    """Children with sessions of their own, as torchrun's, are ended with it."""
    child = f"import os, time; os.setsid(); open(r'{tmp_path}/' + str(os.getpid()), 'w'); time.sleep(60)"
    parent = f"import subprocess, sys; [subprocess.Popen([sys.executable, '-c', {child!r}]) for _ in 'ab'][1].wait()"
    with subprocess.Popen([sys.executable, "-c", parent]) as job:
        while len([*tmp_path.iterdir()]) < 2:
            time.sleep(0.02)
        _kill(job.pid)
        assert job.wait(10) == -signal.SIGKILL
    wait_for(lambda: not any(map(is_alive, tmp_path.iterdir())), 10, "the children's end")


def test_host_memory_that_processes_share_counts_once(tmp_path: Path) -> None:
    """Two children with sessions of their own read 64 MiB of one mapping, of which each also has a copy of 16."""
    child = f"""import mmap, os, time
os.setsid()
kept = bytes(range(256)) * (16 << 12)
with open(r'{tmp_path}/shared', 'rb') as file:
    shared = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
total = sum(shared[i] for i in range(0, len(shared), 4096))
open(r'{tmp_path}/' + str(os.getpid()), 'w').close()
time.sleep(60)"""
    parent = f"import subprocess, sys; [subprocess.Popen([sys.executable, '-c', {child!r}]) for _ in 'ab'][1].wait()"
    (tmp_path / "shared").write_bytes(bytes(64 << 20))
    with subprocess.Popen([sys.executable, "-c", parent]) as job:
        wait_for(lambda: len([*tmp_path.iterdir()]) == 3, 20, "the children")
        memory = HostMemory(job.pid)
        wait_for(lambda: memory.peak_bytes > 0, 10, "a look at them")
        memory.end()
        _kill(job.pid)
    assert 96 << 20 <= memory.peak_bytes < 150 << 20  # three interpreters take some 20 MiB


def test_steps_of_an_ended_job_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A job that was ended after its third row, before its time was noted, has one step after the warmup."""
    rows = [{"step": step, "data/tokens": 100, "train/loss": 1.0} for step in (1, 2, 3, 4)]

    def started(*_: Any) -> tuple[bool, int]:
        (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        (tmp_path / "plan.json").write_text(json.dumps({"uses_graphs": False, "summary": ""}))
        (tmp_path / "times.txt").write_text("0.0\n4.0\n6.0\n")
        return False, 3 << 29

    monkeypatch.setattr("benchmarks.real_job._started", started)
    found = measured(2, [], tmp_path, 2, 10.0)
    assert (found["measured_steps"], found["was_ended_early"]) == (1, True)
    assert (found["tokens_per_second"], found["host_gib"]) == (50.0, 1.5)
    with pytest.raises(RuntimeError, match="no step after the first 3 was done in 10 s"):
        measured(2, [], tmp_path, 3, 10.0)


def test_a_job_that_was_ended_before_its_first_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """There is no metrics.jsonl yet; the reason is that of a job without a step to count."""
    monkeypatch.setattr("benchmarks.real_job._started", lambda *_: (False, 0))
    with pytest.raises(RuntimeError, match="no step after the first 1 was done in 10 s"):
        measured(2, [], tmp_path, 0, 10.0)


def test_what_a_gpu_s_plan_predicts() -> None:
    """Its parts are the peak; a CPU's plan has none."""
    plan = {"parts": {"head": 1 << 30, "adapters": 1 << 29}, "seconds": 2.0, "streamed": [0, 1], "num_kept": 3}
    row = {"tokens_per_second": 8192.0, "tokens_per_second_a_gpu": 4446.0}
    found = public.beside(WORKLOADS["mlperf-70b"], row, plan)
    assert (found["predicted_peak_gib"], found["streamed_blocks"], found["predicted_step_seconds"]) == (1.5, 2, 2.0)
    assert found["times_published"]["8 x H100, NeMo, fp8 (Supermicro)"] == 2.0
    assert found["seconds_for_384_sequences"] == 384.0


def test_no_sample_begins_with_an_embedding_of_zeros(tmp_path: Path) -> None:
    """Of random weights, whatever padding token the shape names: its gradient would overflow, layer by layer."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2}
    folder = shape_folder(LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=9, pad_token_id=0), tmp_path / "shape")
    tokenizer, config = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
    weights = AutoModelForCausalLM.from_config(config).get_input_embeddings().weight
    assert not weights[tokenizer.pad_token_id].any()
    assert weights[tokenizer.bos_token_id].any()
