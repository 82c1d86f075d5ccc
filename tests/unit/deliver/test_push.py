"""What is sent to the hub, and what its refusals are told as; the hub's client is replaced at its border."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from train.deliver.push import check_push, files_of, push
from train.run.exits import ExitCode, ExitWith


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An export."""
    (tmp_path / "merged").mkdir()
    for name, text in (("README.md", "card"), ("x.gguf", "weights"), ("merged/config.json", "{}")):
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize("is_public", [False, True])
def test_the_listed_files_are_sent(is_public: bool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly what is listed goes to a repository that is private unless it is to be public."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **how: calls.append({"name": name, **how}) or "URL")
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **how: calls.append(how))
    files = files_of(folder)
    assert files == [("README.md", 4), ("merged/config.json", 2), ("x.gguf", 7)]
    (folder / "secret.txt").write_text("written since")
    assert push(folder, "me/model", is_public, [name for name, _ in files]) == "URL"
    made, sent = calls
    assert (made["name"], made["private"], made["repo_type"]) == ("me/model", not is_public, "model")
    assert sent["allow_patterns"] == ["README.md", "merged/config.json", "x.gguf"]
    assert (sent["repo_id"], sent["folder_path"]) == ("me/model", folder)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (401, "--push me/model: the hub does not know your token: set HF_TOKEN"),
        (403, "--push me/model: your token may not write there"),
        (500, "--push me/model: it went wrong"),
        (ConnectionError("no route"), "--push me/model: the hub cannot be reached: no route; repeat the command"),
    ],
)
def test_a_refusal_is_told(error: Any, reason: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown token, one that may not write, a broken hub, no network: 78, the option, the reason."""

    def fail(self: HfApi, *_: Any, **__: Any) -> None:
        if isinstance(error, Exception):
            raise error
        response: Any = SimpleNamespace(status_code=error, headers={}, request=None)
        raise HfHubHTTPError("it went wrong", response=response)

    monkeypatch.setattr(HfApi, "create_repo", fail)
    with pytest.raises(ExitWith) as refusal:
        push(folder, "me/model", False, ["README.md"])
    assert refusal.value.code == ExitCode.BAD_INPUT
    assert refusal.value.reason.startswith(reason)


def test_what_cannot_be_pushed_is_known_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name without owner or with strange signs, an offline machine, and no token end before anything is written."""
    monkeypatch.setattr("train.deliver.push.is_offline_mode", lambda: True)
    for name, reason in (("model", "write OWNER/NAME"), ("a/b/c", "namespace"), ("me/-x-", "--push me/-x-")):
        with pytest.raises(ExitWith, match=reason):
            check_push(name, needs_token=False)
    check_push("me/model", needs_token=False)
    with pytest.raises(ExitWith, match="HF_HUB_OFFLINE is set"):
        check_push("me/model", needs_token=True)
    monkeypatch.setattr("train.deliver.push.is_offline_mode", lambda: False)
    monkeypatch.setattr("train.deliver.push.get_token", lambda: None)
    with pytest.raises(ExitWith, match="there is no token: set HF_TOKEN"):
        check_push("me/model", needs_token=True)
