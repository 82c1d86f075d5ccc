"""The mirror in a bucket: a real S3 protocol server that fills, is shut, flips bits, or falls silent."""

import shutil
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.compare_runs import known_reference, result_of
from tests.conftest import Run, run_command
from tests.faults.test_mirror import mirrored
from tests.interruptions import AtMicroBatch
from tests.s3_server import BUCKET, KEY, SECRET, S3Server, needs_s3
from train.config import CheckpointConfig, Config
from train.track.metrics_file import read_metrics


@pytest.fixture
def expected(config: Config) -> dict[str, bytes]:
    """The result of the run that was left alone."""
    return known_reference(replace(config, checkpoint=CheckpointConfig(every=1)))


@needs_s3
def test_a_bucket_that_fills_costs_copies_alone(config: Config, expected: dict[str, bytes], tmp_path: Path) -> None:
    """From the second checkpoint on: warnings and a count, the first copy stays, the same bits; no secret anywhere."""
    with S3Server() as server:
        url = f"s3://{BUCKET}/run"

        def fills(method: str, path: str) -> None:
            if method == "PUT" and path.endswith("complete.json"):
                server.room = 6000  # of which this takes a part

        server.gate = fills
        slowly = AtMicroBatch(99, 0, seconds=0.3)
        outcome = run_command(mirrored(config, url, tmp_path / "run"), slowly, **server.environment)
        keys = sorted(server.objects())
    assert outcome.returncode == 0, outcome.stderr
    assert result_of(tmp_path / "run") == expected
    assert "(QuotaExceeded)" in outcome.stdout
    assert "is the newest there, training goes on" in outcome.stdout
    assert "1 copied, " in outcome.stdout
    assert " failed" in outcome.stdout.rpartition("1 copied, ")[2]
    assert sum(key.endswith("complete.json") for key in keys) == 1
    assert any("QuotaExceeded" in row.get("warning", "") for row in read_metrics(tmp_path / "run" / "metrics.jsonl"))
    everything = (outcome.stdout + outcome.stderr).encode()
    everything += b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert SECRET.encode() not in everything
    assert KEY.encode() not in everything


@needs_s3
def test_a_new_machine_and_a_bucket(config: Config, expected: dict[str, bytes], tmp_path: Path) -> None:
    """Killed while it sends to S3, with a bit flipped in the newest copy: the one before it, and the same bits."""
    with S3Server() as server:
        url, seen = f"s3://{BUCKET}/some/where", []

        def kills(method: str, path: str) -> None:
            if method == "PUT" and path.endswith("optimizer.safetensors"):
                seen.append(path)
                if len(seen) == 3:
                    run.signal(signal.SIGKILL)

        server.gate = kills
        run = Run(mirrored(config, url, tmp_path / "one"), AtMicroBatch(99, 0, seconds=0.4), **server.environment)
        assert run.wait().returncode == -signal.SIGKILL
        shutil.rmtree(tmp_path / "one")
        whole = sorted(key for key in server.objects() if key.endswith("complete.json"))
        assert len(whole) == 2
        server.flip(whole[-1].replace("complete.json", "checkpoint/adapter_model.safetensors"))
        again = run_command(mirrored(config, url, tmp_path / "two"), None, **server.environment)
        assert again.returncode == 0, again.stderr
        assert "is not usable: checkpoint/adapter_model.safetensors is damaged" in again.stdout
        assert f"fetched from {url}" in again.stdout
        assert result_of(tmp_path / "two") == expected
        assert sum(key.endswith("complete.json") for key in server.objects()) == 2


@needs_s3
@pytest.mark.parametrize("kind", ["key", "secret", "none", "bucket", "silent", "shut"])
def test_a_mirror_that_cannot_be_had_is_refused_at_the_start(kind: str, config: Config, tmp_path: Path) -> None:
    """Exit 78 before data is read, with the store's own reason, and without the credentials."""
    with S3Server() as server:
        environment, bucket, fault = dict(server.environment), BUCKET, None
        if kind in ("key", "secret"):
            environment |= server.with_credentials() | {"AWS_SECRET_ACCESS_KEY": SECRET}
            environment |= {"AWS_ACCESS_KEY_ID": KEY} if kind == "key" else {}
        elif kind == "none":
            environment |= {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "HOME": str(tmp_path)}
        elif kind == "bucket":
            bucket = "another"
        elif kind == "silent":
            server.is_dead, fault = True, Impatient()
        else:
            environment["AWS_ENDPOINT_URL"] = "http://127.0.0.1:9"
        words = mirrored(config, f"s3://{bucket}/run", tmp_path / "run")
        outcome = run_command(words, fault, **environment)
        server.is_dead = False
    assert outcome.returncode == 78, outcome.stdout + outcome.stderr
    reason = {
        "key": "The AWS Access Key Id you provided does not exist in our records",
        "secret": "The request signature we calculated does not match",
        "none": "Unable to locate credentials",
        "bucket": "The specified bucket does not exist",
        "silent": "no answer within 1 s",
        "shut": "Could not connect to the endpoint",
    }[kind]
    assert f"--checkpoint.mirror s3://{bucket}/run cannot be used: " in outcome.stderr
    assert reason in outcome.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert SECRET not in outcome.stdout + outcome.stderr + (tmp_path / "run" / "exit.json").read_text()


@dataclass(frozen=True)
class Impatient:
    """The start waits a second for the mirror, and the end likewise."""

    def __call__(self) -> None:
        import train.checkpoints.copier
        import train.checkpoints.remote

        train.checkpoints.remote.PATIENCE_SECONDS = 1.0
        train.checkpoints.copier.STALL_SECONDS = 1.0


@needs_s3
def test_a_line_that_dies_later_costs_nothing(config: Config, expected: dict[str, bytes], tmp_path: Path) -> None:
    """After the first copy nothing answers any more: the run ends as ever, a second later, and says what is there."""
    with S3Server() as server:

        def dies(method: str, path: str) -> None:
            server.is_dead = server.is_dead or (method == "PUT" and path.endswith("complete.json"))

        server.gate = dies
        began = time.monotonic()
        words = mirrored(config, f"s3://{BUCKET}/run", tmp_path / "run")
        outcome = run_command(words, Impatient(), **server.environment)
        took = time.monotonic() - began
        server.is_dead = False
    assert outcome.returncode == 0, outcome.stderr
    assert took < 15
    assert "no checkpoint is there" in outcome.stdout
    assert result_of(tmp_path / "run") == expected
