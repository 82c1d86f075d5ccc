"""The real job with a clock: started as a user starts it, by torchrun where it has several processes.

A step counts from one row of metrics.jsonl to the next by the first process's clock, so whatever lies between steps is
in it. What is written by then stays, so a job that is ended after a time has the steps that it has done.
"""

import copy
import hashlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from benchmarks.interrupted_run import commit
from train.cli import parse
from train.config import Config
from train.main import run
from train.run.devices import device_name
from train.run.exits import ExitCode, ExitWith
from train.run.folder import RunFolder, read_object
from train.run.last_words import say_end
from train.run.versions import versions
from train.track.metrics_file import read_metrics

Watch = Callable[[Mapping[str, Any]], None]
ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "demo" / "base"
TIMES = "times.txt"
LOOK_SECONDS = 1.0  # from one look at the job's memory to the next, at least
WORDS = ("the", "of", "and", "in", "to", "is")


def measured(count: int, words: list[str], place: Path, warmup: int, limit: float = math.inf) -> dict[str, Any]:
    """Figures of a job on `count` processes in the folder `place`, of the steps after the first `warmup`.

    After `limit` seconds the job is killed, and its steps so far are counted. `host_gib` is what the job had of host
    memory at most. Raises RuntimeError where it fails, or has no step to count.
    """
    ended, host_bytes = _started(count, [*words, "--run.dir", str(place)], limit)
    metrics = RunFolder(place).metrics
    rows, arrivals = read_metrics(metrics) if metrics.exists() else [], _arrivals(place)
    seconds = [after - before for before, after in pairwise(arrivals)]
    timed = zip(rows[1:], seconds, strict=False)  # a killed job may have noted a row whose time it has not
    counted = [(row["data/tokens"], each) for row, each in timed if row["step"] > warmup]
    if not counted:
        raise RuntimeError(f"no step after the first {max(warmup, 1)} was done in {limit:.0f} s, in {place}")
    num_tokens, total = (sum(column) for column in zip(*counted, strict=True))
    captures = [row.get("perf/capture_seconds", 0.0) for row in rows]
    plan = read_object(RunFolder(place).plan)
    return {
        "processes": count,
        "tokens_per_second": round(num_tokens / total, 1),
        "tokens_per_second_a_gpu": round(num_tokens / total / count, 1),
        "median_tokens_per_second_a_gpu": round(statistics.median(n / s for n, s in counted) / count, 1),
        "step_seconds": round(total / len(counted), 4),
        "longest_step_seconds": round(max(each for _, each in counted), 4),
        "measured_steps": len(counted),
        "was_ended_early": not ended,
        "capture_seconds_before_counting": round(sum(captures[:warmup]), 2),
        "capture_seconds_while_counting": round(sum(captures[warmup:]), 2),
        "steps_with_captures": [row["step"] for row in rows if row.get("perf/capture_seconds")],
        "peak_gib": max(row.get("memory/peak_reserved_gib", 0.0) for row in rows),
        "peak_allocated_gib": max(row.get("memory/peak_allocated_gib", 0.0) for row in rows),
        "host_gib": round(host_bytes / 2**30, 3),
        "final_loss": rows[-1]["train/loss"],
        "uses_graphs": plan["uses_graphs"],
        "plan": plan["summary"],
    }


def _started(count: int, words: list[str], limit: float) -> tuple[bool, int]:
    """Whether the job ended by itself before `limit` seconds, and its host memory in bytes.

    Raises RuntimeError where it failed.
    """
    command = [sys.executable, "-m", "benchmarks.real_job", *words]
    if count > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), "--no-python"]
        command = [sys.executable, *launch, *command]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}".strip(":")}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes) as job:
        memory = HostMemory(job.pid)
        try:
            said = "".join(part[-8000:] for part in job.communicate(timeout=None if limit == math.inf else limit))
        except subprocess.TimeoutExpired:
            _kill(job.pid)
            return False, memory.peak_bytes
        except BaseException:  # an interrupt must not leave the GPUs busy
            _kill(job.pid)
            raise
        finally:
            memory.end()
    if job.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {job.returncode}:\n{said}")
    return True, memory.peak_bytes


class HostMemory:
    """What a job's processes have of host memory together, at most: their proportional sets, so that what they share
    counts once. Looked at in a thread until `end`."""

    def __init__(self, leader: int) -> None:
        self.peak_bytes = 0
        self._leader = leader
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Looks no more."""
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        seconds = 0.0
        # the kernel walks every page: with tens of GiB that takes a while, and is to cost the job next to nothing
        while not self._is_over.wait(max(LOOK_SECONDS, 20 * seconds)):
            start, total = time.perf_counter(), 0
            for process in _family(self._leader):
                with suppress(psutil.Error):
                    total += process.memory_full_info().pss
            self.peak_bytes, seconds = max(self.peak_bytes, total), time.perf_counter() - start


def _kill(leader: int) -> None:
    """Ends a job with all its processes."""
    for process in _family(leader):
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _family(leader: int) -> list[psutil.Process]:
    """A process and all that it has started, whatever their sessions: torchrun gives each of its own one."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(leader)
        return [process, *process.children(recursive=True)]
    return []


def _arrivals(place: Path) -> list[float]:
    with suppress(FileNotFoundError):
        return [float(line) for line in (place / TIMES).read_text(encoding="ascii").splitlines(keepends=False) if line]
    return []


def handloop_plan(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """`handloop plan` with these words in a process of its own, with what it said."""
    code = "import sys; from train.commands.handloop import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "plan", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def split_words() -> tuple[list[str], list[str]]:
    """The script's own words, and those behind `--`, which are a run's."""
    own = sys.argv[1:]
    place = own.index("--") if "--" in own else len(own)
    return own[:place], own[place + 1 :]


def run_words(words: Sequence[str], watcher: Callable[[Config], Watch]) -> ExitCode:
    """Runs the job of a command line; an end that is not a good one is said as train/main.py says it.

    `watcher` makes of the configuration what is called with each step's row.
    """
    try:
        config = parse(words)
        run(config, watcher(config))
    except ExitWith as end:
        say_end(end)
        return end.code
    return ExitCode.FINISHED


def noting(config: Config) -> Watch:
    """Notes in the run folder when each row of metrics.jsonl comes; only the first process is told of rows."""

    def watch(row: Mapping[str, Any]) -> None:
        with (Path(config.run.dir) / TIMES).open("a", encoding="ascii") as file:
            file.write(f"{time.perf_counter()!r}\n")

    return watch


def shape_folder(shape: PreTrainedConfig, folder: Path) -> Path:
    """A model's config.json with the bundled tokenizer and the ids of its special tokens, in a new folder.

    transformers gives the padding token an embedding of zeros. Were it the token that samples begin with, as id 0 is
    here, that token would stay zero in all blocks, and its gradient grow a thousand times in each: NaN after a dozen.
    """
    shutil.copytree(TOKENIZER, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    of_tokenizer, own = AutoConfig.from_pretrained(TOKENIZER, trust_remote_code=False), copy.deepcopy(shape)
    for part in (own, own.get_text_config()):
        part.bos_token_id, part.eos_token_id = of_tokenizer.bos_token_id, of_tokenizer.eos_token_id
        part.pad_token_id = of_tokenizer.pad_token_id
    own.save_pretrained(folder)
    return folder


def single_words(shape: Path) -> list[str]:
    """English words that are one token each, with the space before them."""
    tokenizer: Any = AutoTokenizer.from_pretrained(shape, trust_remote_code=False)
    texts = {word: f" {word}" * 50 for word in WORDS}
    return [word for word, text in texts.items() if len(tokenizer(text, add_special_tokens=False)["input_ids"]) == 50]


def record(out: Path, workload: str, rows: list[dict[str, Any]], more: Mapping[str, Any]) -> None:
    """Replaces the workload's rows in the file, with the device and `more` beside them."""
    known = json.loads(out.read_text()) if out.exists() else {}
    device = device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    known[workload] = {"device": device, "commit": commit(), "versions": versions(), **more, "rows": rows}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def digest(path: Path) -> str:
    """sha256 of a file, or of the files in a folder; of nothing where the rows are elsewhere."""
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    return hashlib.sha256(b"".join(each.read_bytes() for each in files if each.is_file())).hexdigest()


if __name__ == "__main__":
    sys.exit(run_words(sys.argv[1:], noting))
