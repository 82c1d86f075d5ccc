"""What variables and files tell Weights & Biases is read as wandb itself reads it, and nothing is sent against it."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Outcome, arguments, run_command
from tests.fake_wandb import FakeServer, environment
from train.config import Config, TrackConfig
from train.run.exits import ExitWith
from train.track import wandb_settings
from train.track.weights_and_biases import wandb_mode

KEY = "k" * 40
# (variables, settings files by their path below the working directory, which is also HOME)
SITUATIONS: list[tuple[dict[str, str], dict[str, dict[str, str]]]] = [
    ({}, {}),
    *(({"WANDB_MODE": mode}, {}) for mode in ("online", "run", "shared", "offline", "dryrun", "disabled")),
    ({}, {"wandb/settings": {"mode": "offline"}}),
    ({}, {"wandb/settings": {"mode": "disabled"}}),
    ({}, {".config/wandb/settings": {"mode": "offline"}}),
    ({}, {".config/wandb/settings": {"mode": "offline"}, "wandb/settings": {"mode": "online"}}),
    ({}, {".config/wandb/settings": {"mode": "offline"}, "wandb/settings": {"project": "x"}}),
    ({"WANDB_MODE": "online"}, {"wandb/settings": {"mode": "disabled"}}),
    ({"WANDB_MODE": "disabled"}, {"wandb/settings": {"mode": "online"}}),
    ({"WANDB_CONFIG_DIR": "elsewhere"}, {"elsewhere/settings": {"mode": "disabled"}}),
    ({"WANDB_CONFIG_DIR": "~/elsewhere"}, {"elsewhere/settings": {"mode": "disabled"}}),
    ({"WANDB_CONFIG_DIR": "elsewhere"}, {".config/wandb/settings": {"mode": "disabled"}}),
    ({}, {".wandb/settings": {"mode": "offline"}, "wandb/settings": {"mode": "online"}}),
    ({"WANDB_PROJECT": "mine"}, {"wandb/settings": {"project": "theirs"}}),
    ({}, {"wandb/settings": {"project": "theirs"}, ".config/wandb/settings": {"project": "all"}}),
]
ASK_WANDB = """
import json, os, sys
from wandb.sdk.wandb_setup import _WandbSetup
found = []
for folder, variables in json.load(sys.stdin):
    os.chdir(folder)
    os.environ.update(variables, HOME=folder, WANDB_SILENT="true")
    setup = _WandbSetup(os.getpid())
    setup._load_settings(system_settings_path=None, disable_sagemaker=True)
    found.append([setup.settings.mode, setup.settings.project or ""])
    for name in variables: del os.environ[name]
print(json.dumps(found))
"""


@pytest.fixture(autouse=True)
def _no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home without an account, which is also the working directory."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.chdir(tmp_path)


def write(folder: Path, files: dict[str, dict[str, str]]) -> Path:
    for name, values in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("[default]\n" + "".join(f"{key} = {value}\n" for key, value in values.items()))
    return folder


def test_mode_and_project_are_those_of_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The installed wandb, asked in each situation, has the mode and project that are found here."""
    asked, ours = [], []
    for number, (variables, files) in enumerate(SITUATIONS):
        folder = tmp_path / str(number)
        folder.mkdir()
        asked.append((str(write(folder, files)), variables))
        with monkeypatch.context() as here:
            here.chdir(folder)
            here.setenv("HOME", str(folder))
            for name, value in variables.items():
                here.setenv(name, value)
            ours.append([wandb_settings.said_mode() or "online", wandb_settings.project()])
    done = subprocess.run([sys.executable, "-c", ASK_WANDB], input=json.dumps(asked), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = [[wandb_settings.MODES[mode], project] for mode, project in json.loads(done.stdout)]
    assert ours == theirs
    assert {mode for mode, _ in ours} == {"online", "offline", "off"}


@pytest.mark.parametrize("command", ["offline", "disabled", "off"])
def test_what_its_commands_write_is_found(command: str, tmp_path: Path) -> None:
    """`wandb offline`, `wandb disabled` and `wandb off` write a file, which is read; `wandb online` takes it back."""
    wandb = str(Path(sys.executable).with_name("wandb"))
    subprocess.run([wandb, command], capture_output=True, check=True)
    assert wandb_settings.said_mode() == {"offline": "offline", "disabled": "off", "off": "offline"}[command]
    subprocess.run([wandb, "online"], capture_output=True, check=True)
    assert wandb_settings.said_mode() == ""


def test_what_is_written_below_wandb_dir_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`wandb offline` writes below WANDB_DIR where that is set, where wandb.init would not look for it."""
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "records"))
    wandb = str(Path(sys.executable).with_name("wandb"))
    subprocess.run([wandb, "offline"], capture_output=True, check=True)
    assert wandb_settings.said_mode() == "offline"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *((word, "off") for word in ("true", "TRUE", "1", "yes", "on", "y", "perhaps")),
        *((w, "") for w in ("0", "false", "no", "")),
    ],
)
def test_hf_trainer_s_switch(value: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """WANDB_DISABLED turns everything off unless it clearly says no, also beside WANDB_MODE=online."""
    monkeypatch.setenv("WANDB_DISABLED", value)
    assert wandb_settings.said_mode() == expected
    monkeypatch.setenv("WANDB_MODE", "online")
    assert wandb_settings.said_mode() == (expected or "online")


def test_an_option_wins_and_an_unknown_mode_is_refused(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """--track.wandb offline and off are taken as they are; a mode that wandb does not know is 78 and named."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_DISABLED", "true")
    for mode in ("online", "offline", "off"):
        assert wandb_mode(replace(config, track=TrackConfig(wandb=mode))) == mode
    assert wandb_mode(replace(config, track=TrackConfig())) == "off"
    monkeypatch.delenv("WANDB_DISABLED")
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(ExitWith, match="WANDB_MODE is 'ofline'; write one of online"):
        wandb_mode(replace(config, track=TrackConfig()))


def test_where_a_key_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable, a token file, netrc by the server's name and port, or a settings file."""
    assert not wandb_settings.has_key()
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        with monkeypatch.context() as here:
            here.setenv(name, KEY)
            assert wandb_settings.has_key()
    write(tmp_path, {"wandb/settings": {"base_url": "http://mine:8080"}})
    for server, expected in (("mine", False), ("api.wandb.ai", False), ("mine:8080", True)):
        (tmp_path / ".netrc").write_text(f"machine {server}\n login user\n password {KEY}\n")
        (tmp_path / ".netrc").chmod(0o600)
        assert wandb_settings.has_key() == expected, server
    monkeypatch.setenv("NETRC", "~/other")
    assert not wandb_settings.has_key()
    (tmp_path / ".netrc").rename(tmp_path / "other")
    assert wandb_settings.has_key()
    write(tmp_path, {"wandb/settings": {"api_key": KEY}})
    (tmp_path / "other").unlink()
    assert wandb_settings.has_key()


def run_beside(server: FakeServer, config: Config, variables: dict[str, str], **options: Any) -> Outcome:
    """A run with a key for the server, and `variables`."""
    watched = replace(config, track=TrackConfig(**options))
    return run_command(arguments(watched), None, **{**environment(server.url), **variables})


@pytest.mark.parametrize(
    "variables",
    [
        {"WANDB_DISABLED": "true"},
        {"WANDB_MODE": "dryrun"},
        {"WANDB_MODE": "offline"},
        {"WANDB_CONFIG_DIR": "{tmp}"},
        {"WANDB_DIR": "{tmp}"},
    ],
    ids=str,
)
def test_no_request_leaves_the_machine(variables: dict[str, str], config: Config, tmp_path: Path) -> None:
    """With a key and a server, each way to say no is obeyed."""
    write(tmp_path, {"settings": {"mode": "offline"}, "wandb/settings": {"mode": "disabled"}})
    with FakeServer() as server:
        outcome = run_beside(server, config, {name: v.format(tmp=tmp_path) for name, v in variables.items()})
    assert outcome.returncode == 0, outcome.stderr
    assert server.bodies == []


def test_names_from_variables_arrive_and_what_is_decided_is_said(config: Config, tmp_path: Path) -> None:
    """Project, name, entity, group, tags, notes and job type are defaults; id, resume and folder are Handloop's."""
    variables = {
        "WANDB_PROJECT": "my-project",
        "WANDB_NAME": "my-name",
        "WANDB_ENTITY": "my-team",
        "WANDB_RUN_GROUP": "my-group",
        "WANDB_TAGS": "tag-one,tag-two",
        "WANDB_NOTES": "my-notes",
        "WANDB_JOB_TYPE": "my-job",
        "WANDB_RUN_ID": "not-this-id",
        "WANDB_RESUME": "must",
        "WANDB_DIR": str(tmp_path / "not-here"),
        "WANDB_RESUME_FROM": "not-this-id?_step=3",
        "WANDB_SAVE_CODE": "false",
    }
    with FakeServer() as server:
        outcome = run_beside(server, config, variables)
    assert outcome.returncode == 0, outcome.stderr
    sent = b"\n".join(server.bodies)
    wanted = ("my-project", "my-name", "my-team", "my-group", "tag-one", "tag-two", "my-notes", "my-job")
    assert [word for word in wanted if word.encode() not in sent] == []
    assert b"not-this-id" not in sent
    assert server.num_rows_received == 6
    assert not (tmp_path / "not-here").exists()
    for name in ("WANDB_RUN_ID", "WANDB_RESUME", "WANDB_DIR", "WANDB_RESUME_FROM"):
        assert f"Weights & Biases: {name} has no effect: " in outcome.stdout
    assert "WANDB_SAVE_CODE" not in outcome.stdout


def test_an_option_wins_over_the_project_of_a_variable(config: Config) -> None:
    """--track.project is what the command line says."""
    with FakeServer() as server:
        assert run_beside(server, config, {"WANDB_PROJECT": "theirs"}, project="chosen-one").returncode == 0
    sent = b"\n".join(server.bodies)
    assert b"chosen-one" in sent
    assert b"theirs" not in sent
