"""A hub of models on this machine: what huggingface_hub asks for, from folders, with gates, tokens and failures."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Serves `folder`/OWNER/NAME as the model OWNER/NAME, at one commit, which is also `main` and `v1`.

    A model named gated... wants the token `hf_right`; private... is not seen without it. While `is_broken`, all
    requests fail with 503; while `is_silent`, none is answered.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.is_broken = self.is_silent = False
        self.paths: list[str] = []
        self.tokens: set[str] = set()
        self.released = threading.Event()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                hub.answer(self)

            def do_GET(self) -> None:
                hub.answer(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self) -> "FakeHub":
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path)
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        self.paths.append(path)
        self.tokens.add(token)
        if self.is_silent:
            self.released.wait(60)
            return
        if self.is_broken:
            self.send(request, 503, b"{}")
            return
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self.describe(request, "/".join(parts[2:4]), parts[4:], token)
        elif len(parts) > 3 and parts[2] == "resolve":
            self.send_file(request, "/".join(parts[:2]), parts[3], "/".join(parts[4:]), token)
        else:
            self.send(request, 404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def describe(self, request: BaseHTTPRequestHandler, name: str, rest: list[str], token: str) -> None:
        folder = self.folder / name
        is_hidden = "private" in name and token != "hf_right"
        if not folder.is_dir() or is_hidden:
            self.send(request, 401 if not token else 404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif len(rest) > 1 and rest[1] not in ("main", "v1", COMMIT):
            self.send(request, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif rest[:1] == ["tree"]:
            entries = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": digest(file)}
                for file in sorted(folder.iterdir())
            ]
            self.send(request, 200, json.dumps(entries).encode())
        else:
            files = [{"rfilename": file.name} for file in sorted(folder.iterdir())]
            about = {"id": name, "sha": COMMIT, "siblings": files, "private": False, "gated": "gated" in name}
            self.send(request, 200, json.dumps(about).encode())

    def send_file(self, request: BaseHTTPRequestHandler, name: str, revision: str, file: str, token: str) -> None:
        path = self.folder / name / file
        if "gated" in name and token != "hf_right":
            code = 403 if token else 401
            self.send(request, code, b"{}", {"X-Error-Code": "GatedRepo"})
        elif not path.is_file():
            self.send(request, 404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        else:
            self.send(request, 200, path.read_bytes(), {"ETag": f'"{digest(path)}"', "X-Repo-Commit": COMMIT})

    def send(
        self, request: BaseHTTPRequestHandler, code: int, body: bytes, headers: dict[str, str] | None = None
    ) -> None:
        request.send_response(code)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            request.send_header(key, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)


def digest(path: Path) -> str:
    """As git names a file, and the hub's cache after it."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
