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


class Hub:
    """What stands in for the hub: whether repositories are private, and what was sent to them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_private: dict[str, bool] = {}
        self.sent: list[dict[str, Any]] = []
        monkeypatch.setattr(HfApi, "create_repo", lambda _, name, **how: self.create(name, **how))
        monkeypatch.setattr(HfApi, "repo_info", lambda _, name, **how: self.describe(name, **how))
        monkeypatch.setattr(HfApi, "upload_folder", lambda _, **how: self.sent.append(how))

    def create(self, name: str, repo_type: str, private: bool, exist_ok: bool) -> str:
        """As the hub does, which does not look at `private` where the repository is there."""
        assert repo_type == "model"
        assert exist_ok
        self.is_private.setdefault(name, private)
        return "URL"

    def describe(self, name: str, repo_type: str) -> Any:
        assert repo_type == "model"
        return SimpleNamespace(private=self.is_private[name])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    """An empty one."""
    return Hub(monkeypatch)


@pytest.mark.parametrize("is_public", [False, True])
def test_the_listed_files_are_sent(is_public: bool, folder: Path, hub: Hub) -> None:
    """Exactly what is listed goes to a repository that is private unless it is to be public."""
    files = files_of(folder)
    assert files == [("README.md", 4), ("merged/config.json", 2), ("x.gguf", 7)]
    (folder / "secret.txt").write_text("written since")
    for _ in range(2):  # to a new one, and again
        assert push(folder, "me/model", is_public, [name for name, _ in files]) == ["sent to URL"]
    assert hub.is_private == {"me/model": not is_public}
    assert len(hub.sent) == 2
    for sent in hub.sent:
        assert sent["allow_patterns"] == ["README.md", "merged/config.json", "x.gguf"]
        assert (sent["repo_id"], sent["folder_path"], sent["repo_type"]) == ("me/model", folder, "model")


def test_nothing_is_published_unasked(folder: Path, hub: Hub) -> None:
    """A repository that is public already gets nothing without --public; one that is private is said to stay so."""
    hub.is_private = {"me/open": False, "me/closed": True}
    with pytest.raises(ExitWith, match="--push me/open: it is there and public; write --public") as refusal:
        push(folder, "me/open", False, ["README.md"])
    assert refusal.value.code == ExitCode.BAD_INPUT
    assert not hub.sent
    assert push(folder, "me/open", True, ["README.md"]) == ["sent to URL"]
    assert "is private and stays so" in push(folder, "me/closed", True, ["README.md"])[1]
    assert hub.is_private == {"me/open": False, "me/closed": True}
    assert len(hub.sent) == 2


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
