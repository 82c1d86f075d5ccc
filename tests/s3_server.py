"""An S3 server on loopback: moto's, behind a door that can be slow, full, dead or shut.

The tests that need it are skipped where moto[server] and s3fs are not installed: nothing else here needs them.
"""

import importlib.util
import json
import logging
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable
from typing import Any

import pytest

BUCKET = "checkpoints"
SECRET = "c4nary-passw0rd-of-a-bucket"
KEY = "AKIACANARYCANARY0000"
MISSING = [name for name in ("moto", "s3fs", "flask") if importlib.util.find_spec(name) is None]
needs_s3: Any = pytest.mark.skipif(
    bool(MISSING), reason=f"an S3 server needs {', '.join(MISSING)}: pip install s3fs 'moto[server]'"
)
FULL = b"<Error><Code>QuotaExceeded</Code><Message>the bucket is full</Message></Error>"


class S3Server:
    """The server; its faults can be switched while it runs."""

    def __init__(self) -> None:
        self.room = float("inf")  # bytes that it still takes
        self.bytes_per_second = float("inf")
        self.is_dead = False  # takes connections and never answers
        self.gate: Callable[[str, str], None] = lambda method, path: None  # sees each request before it is served
        self.requests: list[tuple[str, str]] = []

    def __enter__(self) -> "S3Server":
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.application: Any = DomainDispatcherApplication(create_backend_app)
        self.server = make_server("127.0.0.1", 0, self._serve, threaded=True)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.client("s3").create_bucket(Bucket=BUCKET)
        self.requests.clear()
        return self

    def __exit__(self, *error: object) -> None:
        self.client("s3", "/moto-api/reset-auth", b"inf")
        self.client("s3", "/moto-api/reset")
        self.server.shutdown()

    @property
    def environment(self) -> dict[str, str]:
        """What a run needs to find it."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self, service: str, path: str = "", body: bytes = b"") -> Any:
        """A client of the server; with `path` a message to moto itself."""
        if path:
            kind = {"Content-Type": "text/plain"}
            return urllib.request.urlopen(urllib.request.Request(self.url + path, body, kind, method="POST")).read()
        import boto3

        keys = {"aws_access_key_id": KEY, "aws_secret_access_key": SECRET, "region_name": "us-east-1"}
        return boto3.client(service, endpoint_url=self.url, **keys)

    def with_credentials(self) -> dict[str, str]:
        """From now on it takes only requests with these credentials, which may do everything."""
        iam = self.client("iam")
        iam.create_user(UserName="trainer")
        rule = {"Effect": "Allow", "Action": "*", "Resource": "*"}
        policy = json.dumps({"Version": "2012-10-17", "Statement": [rule]})
        iam.put_user_policy(UserName="trainer", PolicyName="all", PolicyDocument=policy)
        made = iam.create_access_key(UserName="trainer")["AccessKey"]
        self.client("s3", "/moto-api/reset-auth", b"0")
        return {"AWS_ACCESS_KEY_ID": made["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": made["SecretAccessKey"]}

    def objects(self) -> dict[str, int]:
        """Bytes by key."""
        found = self.client("s3").list_objects_v2(Bucket=BUCKET)
        return {each["Key"]: each["Size"] for each in found.get("Contents", [])}

    def flip(self, key: str) -> None:
        """Flips a bit in the middle of an object."""
        client = self.client("s3")
        content = bytearray(client.get_object(Bucket=BUCKET, Key=key)["Body"].read())
        content[len(content) // 2] ^= 1
        client.put_object(Bucket=BUCKET, Key=key, Body=bytes(content))

    def _serve(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        is_ours = "Boto3" not in environ.get("HTTP_USER_AGENT", "") and not path.startswith("/moto-api")
        if is_ours:
            self.requests.append((method, path))
            self.gate(method, path)
            while self.is_dead:
                time.sleep(0.05)
            size = int(environ.get("CONTENT_LENGTH") or 0)
            if self.bytes_per_second < float("inf"):
                time.sleep(size / self.bytes_per_second)
            if method == "PUT" and size > self.room:
                start_response("507 Insufficient Storage", [("Content-Type", "application/xml")])
                environ["wsgi.input"].read(size)
                return [FULL]
            self.room -= size if method == "PUT" else 0
        return self.application(environ, start_response)
