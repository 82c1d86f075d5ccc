"""An exported folder -> a repository on the hub."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.constants import is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from train.models.hub import GET_TOKEN, first_line, is_of_the_network
from train.run.exits import ExitCode, ExitWith


def check_push(name: str, needs_token: bool) -> None:
    """Raises ExitWith(BAD_INPUT) where a push to OWNER/NAME cannot succeed, before anything is exported."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise _refused(name, first_line(error)) from None
    if name.count("/") != 1:
        raise _refused(name, "write OWNER/NAME")
    if needs_token and is_offline_mode():
        raise _refused(name, "HF_HUB_OFFLINE is set; unset it")
    if needs_token and get_token() is None:
        raise _refused(name, f"there is no token: {GET_TOKEN}; it must be one that may write")


def files_of(folder: Path) -> list[tuple[str, int]]:
    """(Path in the folder, bytes) of what a push sends."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in files]


def push(folder: Path, name: str, is_public: bool, names: Sequence[str]) -> list[str]:
    """Sends these files of the folder to the model OWNER/NAME, which is made if it is not there; returns what was done.

    A new one is private unless `is_public`. One that is there keeps its visibility: create_repo does not look at it.
    Raises ExitWith(BAD_INPUT), also for one that everybody sees without `is_public`, before a file is sent.
    """
    api = HfApi()
    try:
        address = api.create_repo(name, repo_type="model", private=not is_public, exist_ok=True)
        is_private = bool(api.repo_info(name, repo_type="model").private)
        if not is_private and not is_public:
            raise _refused(name, "it is there and public; write --public to publish, or name another")
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            repo_type="model",
            allow_patterns=list(names),
            commit_message="Upload the export of a Handloop run",
        )
    except ExitWith:
        raise
    except Exception as error:
        if isinstance(error, HfHubHTTPError):
            raise _refused(name, _told(error)) from None
        if not is_of_the_network(error):
            raise
        raise _refused(name, f"the hub cannot be reached: {first_line(error)}; repeat the command") from None
    kept = "--public: the repository is private and stays so; its settings on the hub change that"
    return [f"sent to {address}", *([kept] if is_public and is_private else [])]


def _told(error: HfHubHTTPError) -> str:
    status = getattr(error.response, "status_code", 0)
    if status == 401:
        return f"the hub does not know your token: {GET_TOKEN}"
    if status == 403:
        return "your token may not write there; make one that may, and check the name of the owner"
    return first_line(error)


def _refused(name: str, reason: str) -> ExitWith:
    return ExitWith(ExitCode.BAD_INPUT, f"--push {name}: {reason}")
