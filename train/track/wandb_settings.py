"""What the user has told Weights & Biases, in environment variables and in the files that its commands write.

Read as wandb 0.31 reads them (wandb_setup._load_settings, settings_file, wbauth), but without importing it, which takes
a second. docs/ENVIRONMENT.md lists them.
"""

import configparser
import netrc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

from train.run.exits import ExitCode, ExitWith

DEFAULT_SERVER = "https://api.wandb.ai"
# wandb's modes (Settings.mode) by what they mean here
MODES = {
    "online": "online",
    "run": "online",
    "shared": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "off",
}
NOT_TRUE = ("", "0", "false", "no", "n", "f", "off")
INIT_SECONDS = 10  # that a server may take to answer at the start; then the run is recorded offline
# (variable, values that agree with what is done anyway, what is done instead)
DECIDED = (
    ("WANDB_RUN_ID", (), "the run has an id of its own, under which it goes on when it is resumed"),
    ("WANDB_RESUME", ("allow",), "a resumed run goes on under its own id"),
    ("WANDB_RESUME_FROM", (), "a resumed run goes on under its own id"),
    ("WANDB_FORK_FROM", (), "a resumed run goes on under its own id"),
    ("WANDB_DIR", (), "records are in the run folder"),
    ("WANDB_CONSOLE", ("off",), "what is printed is not sent"),
    ("WANDB_SAVE_CODE", NOT_TRUE, "code is not sent"),
    ("WANDB_LOG_MODEL", NOT_TRUE, "the adapter is not sent"),
    ("WANDB_WATCH", NOT_TRUE, "gradients and weights are not sent"),
    ("WANDB_INIT_TIMEOUT", (), f"{INIT_SECONDS} s, so that a silent server costs no more"),
)
SYNC = ("-m", "wandb", "sync", "--yes")  # its command, for Python
# what belongs to a run that records, and not to one that uploads a record
OF_A_RUN = {"WANDB_MODE", "WANDB_DISABLED", "WANDB_SWEEP_ID", *(name for name, _, _ in DECIDED)}


def said_mode() -> str:
    """What the user has said of uploads: online, offline, off, or nothing.

    WANDB_DISABLED is HF Trainer's switch; anything but a clear no counts. WANDB_MODE wins over the files, as in wandb.
    Raises ExitWith(BAD_INPUT) for a mode that wandb does not know.
    """
    if os.environ.get("WANDB_DISABLED", "").strip().lower() not in NOT_TRUE:
        return "off"
    mode, source = os.environ.get("WANDB_MODE", ""), "WANDB_MODE"
    if not mode:
        mode, source = setting("mode"), "mode in the settings file of wandb"
    if mode and mode not in MODES:
        raise ExitWith(ExitCode.BAD_INPUT, f"{source} is {mode!r}; write one of {', '.join(MODES)}, or unset it")
    return MODES.get(mode, "")


def setting(name: str) -> str:
    """A setting of the files, or nothing; the folder's own file wins over the user's."""
    for path in _files():
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read(path, encoding="utf-8")
            found = parser.get("default", name, fallback="")
        except (OSError, ValueError, configparser.Error):  # wandb leaves out what it cannot read
            continue
        if found:
            return found
    return ""


def _files() -> Iterator[Path]:
    """Where `wandb offline` and the like write: below WANDB_DIR or the working directory, and `wandb login` for all."""
    for folder in (_home(os.environ.get("WANDB_DIR") or "."), Path(".")):
        yield folder / (".wandb" if (folder / ".wandb").exists() else "wandb") / "settings"
    yield _home(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb") / "settings"


def _home(path: str) -> Path:
    """The path with `~` replaced; left as it is for a user without a home, where pathlib raises."""
    return Path(os.path.expanduser(path))


def has_key() -> bool:
    """Whether there are credentials for the server: a key or a token file, in variables, netrc or the files."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or setting("api_key"):
        return True
    server = urlsplit(os.environ.get("WANDB_BASE_URL") or setting("base_url") or DEFAULT_SERVER)
    home = [path for path in (_home("~/.netrc"), _home("~/_netrc")) if path.exists()]
    named = os.environ.get("NETRC")
    path = _home(named) if named else home[0] if home else None
    try:
        found = netrc.netrc(path).authenticators(server.netloc) if path else None
    except (OSError, netrc.NetrcParseError):
        return False
    return found is not None and bool(found[2])


def project() -> str:
    """The project that the user has named, or nothing."""
    return os.environ.get("WANDB_PROJECT") or setting("project")


def run_of_sweep() -> Callable[[], str] | None:
    """What gives a new run the id that an agent of a sweep has chosen for it, where there is one."""
    chosen = os.environ.get("WANDB_RUN_ID", "")
    return (lambda: chosen) if chosen and os.environ.get("WANDB_SWEEP_ID") else None


def decided() -> list[str]:
    """A line for each variable that says otherwise than what is done."""
    return [
        f"{name} has no effect: {instead}"
        for name, agreeing, instead in DECIDED
        if os.environ.get(name) and os.environ[name].lower() not in agreeing
        if not (name == "WANDB_RUN_ID" and run_of_sweep())
    ]


def settle_environment(mode: str, identity: str, project: str) -> None:
    """Makes the environment say what is done, before wandb reads it: it refuses combinations of what is decided.

    In a sweep wandb takes id and project from there alone.
    """
    for name, _, _ in DECIDED:
        os.environ.pop(name, None)
    if os.environ.get("WANDB_SWEEP_ID"):
        os.environ.update(WANDB_RUN_ID=identity, WANDB_PROJECT=project)
    os.environ["WANDB_MODE"] = mode
    if mode == "offline":
        os.environ["WANDB_ERROR_REPORTING"] = "false"  # a crash report is an upload
