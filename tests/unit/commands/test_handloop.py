"""How the `handloop` command ends: broken pipes, full disks, defects, Ctrl-C."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data_tools.report import DataError
from tests.conftest import ROOT
from train.commands import handloop, preview
from train.commands.handloop import LESS_MEMORY
from train.run.exits import ExitCode, ExitWith

COMMAND = [sys.executable, "-c", "import sys\nfrom train.commands.handloop import main\nsys.exit(main())"]


WRITES = """
import sys, time
from pathlib import Path
from train.commands import handloop, preview
from train.run.durable import publish

def main(words):
    with publish(Path(words[0])) as folder:
        (folder / "weights").write_text("half")
        print("writing", flush=True)
        time.sleep(60)

preview.main = main
sys.exit(handloop.main())
"""


def piped(words: str, tail: str) -> tuple[int, str]:
    """Exit code and stderr of `handloop WORDS` with its stdout as `tail` of a shell command says."""
    script = f'{{ "$@" {words} 2>&3; echo code $? >&3; }} 3>&2 {tail}'
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", script, "bash", *COMMAND], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    said, _, code = done.stderr.rpartition("code ")
    return int(code), said


@pytest.mark.parametrize(("words", "tail"), [("", "| true"), ("preview demo/glossary.jsonl --rows 500", "| head -n 2")])
def test_a_broken_pipe_is_quiet(words: str, tail: str) -> None:
    """`handloop ... | head` ends with 0 and says nothing of it, also where the pipe breaks at the last flush."""
    code, said = piped(words, tail)
    assert code == 0
    assert "handloop:" not in said
    assert "BrokenPipe" not in said
    assert "Exception ignored" not in said


def test_a_full_disk_is_said() -> None:
    """A result that cannot be written is no success."""
    code, said = piped("", "> /dev/full")
    assert code == ExitCode.BAD_INPUT
    assert "handloop: [Errno 28] No space left on device" in said
    assert "Exception ignored" not in said


def test_what_ends_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A foreseen error is one message, a defect 70 with its report, Ctrl-C 130 and silent."""
    ends: list[tuple[BaseException, int, str]] = [
        (DataError("bad rows"), 78, "\nhandloop: bad rows\n"),
        (ExitWith(ExitCode.NON_FINITE, "no number"), 79, "\nhandloop: no number\n"),
        (MemoryError(), 78, "\nhandloop: out of memory\n"),
        (KeyboardInterrupt(), 130, ""),
        (torch.OutOfMemoryError("CUDA out of memory."), 78, f"\nhandloop: CUDA out of memory.\n{LESS_MEMORY}\n"),
    ]
    for error, code, text in [*ends, (ZeroDivisionError("a bug, hf_" + "a" * 30), 70, None)]:

        def fail(words: object, error: BaseException = error) -> int:
            raise error

        monkeypatch.setattr(preview, "main", fail)
        assert handloop.main(["preview"]) == code
        said = capsys.readouterr().err
        if text is not None:
            assert said == text
    assert "a defect of Handloop, while running handloop preview: ZeroDivisionError: a bug" in said
    assert "Traceback" in said
    assert "hf_aaaa" not in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_removes_what_is_half_written(number: signal.Signals, tmp_path: Path) -> None:
    """SIGTERM and SIGHUP end a command by 128 + their number, silently, and nothing of its output is left."""
    command = [sys.executable, "-c", WRITES, "preview", str(tmp_path / "merged")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as started:
        assert started.stdout is not None
        assert started.stdout.readline() == b"writing\n"
        assert len(list(tmp_path.iterdir())) == 1
        started.send_signal(number)
        _, said = started.communicate(timeout=60)
    assert (started.returncode, said) == (128 + number, b"")
    assert not list(tmp_path.iterdir())
