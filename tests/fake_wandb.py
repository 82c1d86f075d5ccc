"""Weights & Biases for tests: a local server, broken servers, faults of the client, and a reader of records."""

import atexit
import gzip
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from train.track.offline_records import records

KEY = "0123456789abcdef0123456789abcdef01234567"


def environment(url: str, key: str = KEY) -> dict[str, str]:
    """Environment variables for a run that talks to `url` and finds no account of this machine."""
    quick = {"WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "0.2"}  # seconds; 15 would be longer than a tiny run
    return {"WANDB_BASE_URL": url, "WANDB_API_KEY": key, "WANDB_MODE": "", "NETRC": "/nonexistent"} | quick


class FakeServer:
    """Implements the part of W&B's GraphQL and file stream that a run uses; a `status` other than 200 refuses all.

    Keeps the rows and the summary of one run, and the body of every request. With `is_silent_stream` it never answers
    requests to the file stream, so a run starts well but cannot end.
    """

    def __init__(self, status: int = 200, is_silent_stream: bool = False) -> None:
        self.status = status
        self.is_silent_stream = is_silent_stream
        self.bodies: list[bytes] = []
        self.names: set[str] = set()  # of the runs
        self.rows: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.artifacts: list[dict[str, Any]] = []
        self.num_rows_received = 0
        self.server = _Quiet(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "FakeServer":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *failure: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, path: str, body: bytes) -> object:
        """The answer to a request."""
        self.bodies.append(path.encode() + b" " + body)
        if self.status != 200:
            return {"error": "refused"}
        if "/file_stream" in path:
            if self.is_silent_stream:
                time.sleep(600)
            self._stream(json.loads(body).get("files", {}))
        return {"data": self._graphql(json.loads(body))} if path.startswith("/graphql") else {}

    def _stream(self, files: dict[str, Any]) -> None:
        for name, content in files.items():
            if name == "wandb-history.jsonl":
                del self.rows[content["offset"] :]
                self.rows += [json.loads(line) for line in content["content"]]
                self.num_rows_received += len(content["content"])
            elif name == "wandb-summary.json":
                self.summary = json.loads(content["content"][-1])

    def _graphql(self, request: dict[str, Any]) -> object:
        given = request.get("variables") or {}
        project = {"id": "p", "name": "handloop", "entity": {"id": "e", "name": "someone"}}
        bucket = {
            **{"id": "b", "name": given.get("name"), "displayName": "d", "config": "{}", "project": project},
            **{"historyLineCount": len(self.rows), "eventsLineCount": 0, "logLineCount": 0, "eventsTail": "[]"},
            "historyTail": json.dumps([json.dumps(row) for row in self.rows[-1:]]),
            "summaryMetrics": json.dumps(self.summary),
            "wandbConfig": '{"t": 1}',
        }
        if request.get("operationName") == "UpsertBucket":
            self.names.add(given["name"])
            return {"upsertBucket": {"inserted": not self.rows, "bucket": bucket}}
        if request.get("operationName") == "RunResumeStatus":
            return {"model": project | {"bucket": bucket if self.names else None}}
        if "query ArtifactType(" in request["query"]:
            return {"project": {"artifact": None}}
        if request.get("operationName") == "Viewer":
            someone = {"id": "v", "entity": "someone", "username": "someone", "email": "", "flags": "{}"}
            return {"viewer": someone | {"teams": {"edges": []}}}
        if request.get("operationName") == "CreateArtifact":  # it has the files already
            self.artifacts.append(given)
            artifact = {"id": "a", "state": "COMMITTED", "artifactSequence": {"id": "s", "latestArtifact": None}}
            return {"createArtifact": {"artifact": artifact}}
        if request.get("operationName") == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in given["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        return {}


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignores broken connections of killed clients."""


def _handler(fake: FakeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _do(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            answer = json.dumps(fake.answer(self.path, body)).encode()
            self.send_response(fake.status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_POST = do_PUT = _do

        def log_message(self, format: str, *arguments: object) -> None:
            """Prints nothing."""

    return Handler


@contextmanager
def blackhole() -> Iterator[str]:
    """The address of a server that accepts connections and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(100)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@dataclass(frozen=True)
class WatcherFault:
    """Breaks W&B's client in the run's process, and runs the exit hooks at its end.

    `what` is `absent` (its import fails), `service killed`, `service hangs` or `log raises` (at the third row),
    `finish hangs`, or empty. `patience`, unless it is 0, replaces the seconds that a run waits at its end. Processes of
    multiprocessing do not run exit hooks by themselves, and W&B has one that waits.
    """

    what: str = ""
    patience: float = 0.0

    def __call__(self) -> None:
        import train.main
        import train.track.isolated

        if self.patience:
            train.track.isolated.PATIENCE_SECONDS = self.patience
        main = train.main.main

        def main_and_exit_hooks(words: list[str]) -> int:
            try:
                return main(words)
            finally:
                atexit._run_exitfuncs()

        setattr(train.main, "main", main_and_exit_hooks)  # noqa: B010
        if self.what == "absent":
            sys.modules["wandb"] = None  # type: ignore[assignment]
        elif self.what:
            self._break_client()

    def _break_client(self) -> None:
        from wandb.sdk import wandb_run, wandb_setup

        original = wandb_run.Run.log
        calls = 0

        def log(run: Any, *arguments: Any, **options: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == 3 and self.what.startswith("service"):
                connection: Any = wandb_setup.singleton().assert_service()
                kind = signal.SIGKILL if self.what == "service killed" else signal.SIGSTOP
                os.kill(connection._proc._process.pid, kind)
                time.sleep(0.2)
            if calls == 3 and self.what == "log raises":
                raise RuntimeError("a bad day\nin two lines")
            original(run, *arguments, **options)

        setattr(wandb_run.Run, "log", log)  # noqa: B010
        if self.what == "finish hangs":
            setattr(wandb_run.Run, "finish", lambda run: time.sleep(600))  # noqa: B010


def services_of(process: int) -> list[str]:
    """Command lines of the live W&B service processes that `process` started; Linux only."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            lines.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace").strip())
    return [line for line in lines if "wandb-core" in line and line.endswith(f"--pid {process}")]


def recorded_rows(path: Path) -> list[dict[str, Any]]:
    """The rows logged to a .wandb file."""
    logged = [record.history.item for record in records(path) if record.WhichOneof("record_type") == "history"]
    return [{"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row} for row in logged]
