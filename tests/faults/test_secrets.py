"""Secrets, however they are given, reach neither the run folder nor Weights & Biases nor the terminal."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.conftest import Outcome, arguments, run_command
from tests.fake_wandb import FakeServer, environment
from tests.tally import Tally
from train.config import CheckpointConfig, Config, TrackConfig

TOKEN = "hf_" + "CanaryCanaryCanaryCanaryCanary1234"
OTHER_TOKEN = "hf_" + "YranacYranacYranacYranacYranac5678"
HEX_KEY = "cafe0123456789abcdefcafe0123456789abcdef"
BEARER = "c4nary.bearer-0123456789_abcdef"
PASSWORD = "c4nary-passw0rd"
URL = f"https://someone:{PASSWORD}@host.invalid/data.jsonl"
CANARIES = (TOKEN, OTHER_TOKEN, HEX_KEY, BEARER, PASSWORD)
SECRET_ENVIRONMENT = {
    "HF_TOKEN": TOKEN,
    "HUGGING_FACE_HUB_TOKEN": OTHER_TOKEN,
    "HTTPS_PROXY": f"http://someone:{PASSWORD}@127.0.0.1:9",
    "AUTHORIZATION": f"Bearer {BEARER}",
}


def hits(folder: Path) -> list[str]:
    """Files of `folder` whose path or content has a canary; the folder must not be empty."""
    paths = [path for path in folder.rglob("*") if not path.is_symlink()]
    assert paths, f"{folder} is empty"
    return [f"{path}: {found}" for path in paths for found in in_bytes(content_of(path) + str(path).encode())]


def content_of(path: Path) -> bytes:
    """The content of a file; nothing for a folder."""
    return path.read_bytes() if path.is_file() else b""


def in_bytes(content: bytes) -> list[str]:
    """The canaries in `content`."""
    return [canary for canary in CANARIES if canary.encode() in content]


def printed(outcome: Outcome) -> list[str]:
    """The canaries on the terminal."""
    return in_bytes((outcome.stdout + outcome.stderr).encode())


def watched(config: Config, run_dir: Path, num_questions: int = 0) -> list[str]:
    """The command line of a run with Weights & Biases, and with questions at its end."""
    compare = replace(config.compare, num_questions=num_questions, max_new_tokens=4)
    config = replace(config, track=TrackConfig(), compare=compare, run=replace(config.run, dir=str(run_dir)))
    return arguments(config)


@pytest.mark.fault("T23")
def test_secrets_of_the_environment(config: Config, tmp_path: Path, tally: Tally) -> None:
    """In a whole run, online and offline, they are in no file, no request and no output."""
    for key in (HEX_KEY, "")[: tally.times(1, 2)]:
        run_dir = tmp_path / f"run-{key[:1]}"
        with FakeServer() as server:
            settings = environment(server.url, key) | SECRET_ENVIRONMENT
            # the table of answers is an artifact, which the fake server does not support
            words = watched(config, run_dir, num_questions=0 if key else 2)
            outcome = run_command(words, None, **settings)
        assert outcome.returncode == 0, outcome.stderr
        assert list((run_dir / "wandb").glob("*run-*/*.wandb"))
        assert (run_dir / "final").is_dir()
        assert [row["step"] for row in server.rows] == ([1, 2, 3, 4, 5, 6] if key else [])
        tally.check(not hits(run_dir), f"{hits(run_dir)}")
        tally.check(not printed(outcome), f"printed: {printed(outcome)}")
        tally.check(not in_bytes(b"".join(server.bodies)), f"sent: {in_bytes(b''.join(server.bodies))}")


@pytest.mark.fault("T23")
def test_secrets_in_options(config: Config, tmp_path: Path, tally: Tally) -> None:
    """Given in a path, a name or an unknown option, they are not in the run folder, and not echoed."""
    run_dir = tmp_path / "run"
    words = watched(config, run_dir)
    ways = [
        ["--data.path", URL],
        ["--track.project", f"project-{TOKEN}"],
        ["--model.name_or_path", f"https://someone:{PASSWORD}@host.invalid/model"],
        ["--hf_token", TOKEN],
        ["--model.name_or_path", f"someone/{TOKEN}"],
        ["--data.chat_template", URL],
        ["--run.resume", URL],
        ["--track.api_key", TOKEN],
        ["--wandb.password", TOKEN],
        ["--model.revision", TOKEN],
    ]
    for way in ways[: tally.times(2, len(ways))]:
        run_dir.mkdir(exist_ok=True)
        (run_dir / "a file").touch()
        with FakeServer() as server:
            outcome = run_command(with_option(words, way), None, **environment(server.url))
        expected = (78, 0) if way[0] in ("--track.project", "--model.revision") else (78,)  # stored nowhere
        tally.check(outcome.returncode in expected, f"{way[0]}: exit {outcome.returncode}, {outcome.stderr[-300:]}")
        tally.check(not hits(run_dir), f"{way[0]}: {hits(run_dir)}")
        tally.check(not printed(outcome), f"{way[0]} printed: {printed(outcome)}")
        tally.check(not in_bytes(b"".join(server.bodies)), f"{way[0]}: sent")


def with_option(words: list[str], option: list[str]) -> list[str]:
    """The command line with this option's value replaced."""
    if option[0] not in words:
        return [*words, *option]
    place = words.index(option[0])
    return [*words[:place], *option, *words[place + 2 :]]


@dataclass(frozen=True)
class RaiseInRun:
    """Makes the run fail in preparing its data, or in saving, with `text` in the exception."""

    kind: str  # exit | data | memory | save
    text: str

    def __call__(self) -> None:
        import torch

        import train.checkpoints.store
        import train.main
        from data_tools.report import DataError
        from train.run.exits import ExitCode, ExitWith

        errors: dict[str, Exception] = {
            "exit": ExitWith(ExitCode.BAD_INPUT, self.text),
            "data": DataError(self.text),
            "memory": torch.OutOfMemoryError(self.text),
            "save": OSError(5, self.text),
        }

        def fail(*arguments: object, **options: object) -> None:
            raise errors[self.kind]

        holder, name = (train.checkpoints.store, "_write") if self.kind == "save" else (train.main, "read_data")
        setattr(holder, name, fail)


def exception_texts() -> Iterator[str]:
    """Messages as libraries write them."""
    yield f"401 Client Error for {URL}, headers {{'authorization': 'Bearer {BEARER}'}}"
    yield f"Invalid token {TOKEN} (WANDB_API_KEY={HEX_KEY})"


@pytest.mark.fault("T23")
def test_secrets_in_exceptions(config: Config, tmp_path: Path, tally: Tally) -> None:
    """An error that quotes them is reported in exit.json and on the terminal without them."""
    kinds = ("data", "save", "exit", "memory")
    for kind in kinds[: tally.times(2, 4)]:
        run_dir = tmp_path / kind
        text = "the beginning of it " + " and ".join(exception_texts())
        words = watched(replace(config, checkpoint=CheckpointConfig(every=1)), run_dir)
        settings = environment("", HEX_KEY) | SECRET_ENVIRONMENT | {"WANDB_MODE": "offline"}
        outcome = run_command(words, RaiseInRun(kind, text), **settings)
        tally.check(outcome.returncode == (76 if kind == "save" else 78), f"{kind}: exit {outcome.returncode}")
        told = "the beginning of it" in outcome.stderr and "the beginning of it" in (run_dir / "exit.json").read_text()
        tally.check(told, f"{kind}: not told, {outcome.stderr[-300:]}")
        tally.check(not hits(run_dir), f"{kind}: {hits(run_dir)}")
        tally.check(not printed(outcome), f"{kind} printed: {printed(outcome)}")
