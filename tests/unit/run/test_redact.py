"""redact removes secrets and nothing else."""

import sys

import pytest

from train.run.redact import REMOVED, SECRET_VARIABLES, print_redacted, redact

TOKEN = "hf_" + "aB3dE6gH9jK2mN5pQ8sT"


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        (f"401 for {TOKEN}, log in again", TOKEN),
        (f"runs/{TOKEN}/final", TOKEN),
        ("GET https://user:p4ssw0rd@host/path", "p4ssw0rd"),
        ("GET https://user:p4ss@w0rd@host:8080/path", "w0rd"),
        ("https:/user:p4ssw0rd@host/template.jinja does not exist", "p4ssw0rd"),
        ("GET s3+http://0123456789@host", "0123456789"),
        ("{'authorization': 'Bearer abc.DEF-123_456~789/x+y=='}", "abc.DEF-123_456~789/x+y=="),
        ("https://host/path?token=abcdefgh12&x=1", "abcdefgh12"),
        ("https://bucket.host/key?X-Amz-Signature=abcdefgh12&x=1", "abcdefgh12"),
        ("wandb_v1_0123456789abcdefghij_KLMNOPQRST", "0123456789abcdefghij_KLMNOPQRST"),
    ],
)
def test_a_secret_is_removed(text: str, secret: str) -> None:
    """A secret of a known form is removed from a text."""
    clean = redact(text)
    assert secret not in clean
    assert REMOVED in clean
    assert redact(clean) == clean


@pytest.mark.parametrize("name", SECRET_VARIABLES)
def test_values_of_the_environment_are_removed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key without a known form is removed if an environment variable holds it."""
    key = "0123456789abcdef0123456789abcdef01234567"
    assert redact(f"bad key {key}") == f"bad key {key}"
    monkeypatch.setenv(name, key)
    assert redact(f"bad key {key}") == f"bad key {REMOVED}"


@pytest.mark.parametrize(
    "text",
    [
        "the commit 0123456789abcdef0123456789abcdef01234567 of https://github.com/a/b@main was not found",
        "hf_hub_download failed for meta-llama/Llama-3.1-8B",
        "data/bearer of good tidings.jsonl:3: the bearer certification-of-conformity is missing",
        "user@host:/data and max_tokens=12345678",
        "C:/Users/me@work/data.jsonl and file:///data/a@b.jsonl",
        "",
    ],
)
def test_ordinary_text_stays(text: str) -> None:
    """Commits, addresses without a password and ordinary words stay."""
    assert redact(text) == text


def test_a_short_value_removes_no_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_TOKEN=data does not remove every `data`."""
    monkeypatch.setenv("HF_TOKEN", "data")
    assert redact("the data") == "the data"


def test_a_traceback_is_printed_without_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    """The hook prints the error and its place, without the token."""
    try:
        raise OSError(f"no access with {TOKEN}")
    except OSError:
        kind, error, trace = sys.exc_info()
        assert kind is not None
        assert error is not None
        print_redacted(kind, error, trace)
    printed = capsys.readouterr().err
    assert "test_redact.py" in printed
    assert f"OSError: no access with {REMOVED}" in printed
    assert TOKEN not in printed
