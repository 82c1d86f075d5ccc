"""The command lines that serve a result, and what is refused."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from launch.serving import ENGINES, Refused, main, make_command
from tests.conftest import ROOT
from train.config import parse_argument

COMMIT = "d04e592bb4f6aa9cfee91e2e20afa771667e1d4b"
HUB = {"name": "meta-llama/Llama-3.1-8B", "commit": COMMIT, "held": "NF4"}
SERVERS = ("vllm", "sglang")  # which take folders


def write_run(folder: Path, base: dict[str, str], **adapter: Any) -> Path:
    """A run folder with what final/ says of itself."""
    final = folder / "final"
    final.mkdir(parents=True)
    files = {
        "adapter_config.json": {"r": 16, "rank_pattern": {}} | adapter,
        "base.json": base,
        "generation_config.json": {"eos_token_id": [128001, 128009]},
    }
    for name, content in files.items():
        (final / name).write_text(json.dumps(content))
    (final / "chat_template.jinja").write_text("{{ messages }}")
    give_arguments(folder)
    return folder


def give_arguments(run: Path, *arguments: str) -> None:
    """Writes config.json of a run with these --data.template_arguments."""
    record = {"profile": "a100", "model": {}, "run": {}, "data": {"template_arguments": arguments}}
    (run / "config.json").write_text(json.dumps(record))


def write_model(folder: Path) -> Path:
    """What is taken for a model's folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run on a base of the hub, in NF4."""
    return write_run(tmp_path / "a100", HUB)


def shown(*words: object) -> list[str]:
    """The command that these words make."""
    return make_command([*map(str, words), "--dry-run"])[0]


def value(command: list[str], option: str) -> str:
    """The word behind an option."""
    assert command.count(option) == 1, command
    return command[command.index(option) + 1]


def test_vllm_serves_the_adapter_on_its_base(run: Path) -> None:
    """The base at the commit that was trained on; tokenizer, chat template and end tokens are the adapter's."""
    command, final = shown("vllm", run), str(run / "final")
    assert command[:5] == ["vllm", "serve", HUB["name"], "--revision", COMMIT]
    assert value(command, "--tokenizer") == value(command, "--generation-config") == final
    assert value(command, "--chat-template") == f"{final}/chat_template.jinja"
    assert "--enable-lora" in command
    module = {"name": "a100", "path": final, "base_model_name": HUB["name"]}
    assert json.loads(value(command, "--lora-modules")) == module


@pytest.mark.parametrize(("rank", "served"), [(1, "1"), (2, "8"), (16, "16"), (17, "32"), (320, "320"), (400, "512")])
def test_vllm_gets_a_rank_that_it_takes(tmp_path: Path, rank: int, served: str) -> None:
    """Which is the next one that it has memory for, of the largest rank of the adapter."""
    assert value(shown("vllm", write_run(tmp_path / "run", HUB, r=rank)), "--max-lora-rank") == served
    run = write_run(tmp_path / "patterned", HUB, r=1, rank_pattern={"q_proj": rank})
    assert value(shown("vllm", run), "--max-lora-rank") == served


def test_a_rank_beyond_vllm_is_refused(tmp_path: Path) -> None:
    """With the way out."""
    with pytest.raises(Refused, match="up to rank 512, and this one has 513: merge it"):
        shown("vllm", write_run(tmp_path / "run", HUB, r=513))


def test_sglang_serves_the_adapter_on_its_base(run: Path) -> None:
    """The same; its end tokens stand in place of the base's, because SGLang takes no other generation settings."""
    command, final = shown("sglang", run), str(run / "final")
    assert command[:2] == ["sglang", "serve"]
    assert value(command, "--model-path") == HUB["name"]
    assert value(command, "--revision") == COMMIT
    assert value(command, "--tokenizer-path") == final
    assert value(command, "--chat-template") == f"{final}/chat_template.jinja"
    assert json.loads(value(command, "--json-model-override-args")) == {"eos_token_id": [128001, 128009]}
    assert value(command, "--lora-paths") == f"a100={final}"
    assert {"--enable-lora", "--lora-strict-loading"} <= set(command)


@pytest.mark.parametrize("engine", SERVERS)
def test_a_quantised_base_is_said_to_be_another(tmp_path: Path, engine: str) -> None:
    """What was trained on NF4 is served on the stored weights, which is said; what was trained on bf16 is not."""
    _, notes, _ = make_command([engine, str(write_run(tmp_path / "nf4", HUB)), "--dry-run"])
    assert "trained on meta-llama/Llama-3.1-8B in NF4" in notes[0]
    assert "handloop merge" in notes[0]
    _, notes, _ = make_command([engine, str(write_run(tmp_path / "bf16", HUB | {"held": "bf16"})), "--dry-run"])
    assert len(notes) == 1


@pytest.mark.parametrize("engine", SERVERS)
def test_a_base_that_is_not_here_is_refused(tmp_path: Path, engine: str) -> None:
    """A folder of another machine is named, and --base takes another place or hub id, without the old commit."""
    run = write_run(tmp_path / "run", {"name": "/elsewhere/base", "commit": "", "held": "bf16"})
    with pytest.raises(Refused, match="/elsewhere/base is no folder here; say where it is with --base"):
        shown(engine, run)
    here = tmp_path / "base"
    here.mkdir()
    assert str(here) in shown(engine, run, "--base", here)
    moved = shown(engine, write_run(tmp_path / "hub", HUB), "--base", here)
    assert str(here) in moved
    assert "--revision" not in moved
    assert COMMIT in shown(engine, tmp_path / "hub", "--base", HUB["name"])


@pytest.mark.parametrize("engine", SERVERS)
def test_the_name_of_a_folder_is_no_hub_id(tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An export keeps the last part of a base's path, which is refused, not fetched; --base says what it is."""
    run = write_run(tmp_path / "run", {"name": "gpt2", "commit": "", "held": "bf16"}, base_model_name_or_path="gpt2")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refused, match="its base gpt2 is no folder here; say where it is with --base"):
        shown(engine, run)
    assert "gpt2" in shown(engine, run, "--base", "gpt2")
    (tmp_path / "gpt2").mkdir()
    assert "gpt2" in shown(engine, run)


@pytest.mark.parametrize("engine", SERVERS)
@pytest.mark.parametrize("more", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": {"embed_tokens": [7]}}])
def test_what_servers_cannot_load_is_refused(tmp_path: Path, engine: str, more: dict[str, Any]) -> None:
    """Whole layers and rows of the embedding, which would be left out or refused late, with the way out."""
    with pytest.raises(Refused, match=f"{next(iter(more))} of adapter_config.json(.|\n)*`handloop merge`"):
        shown(engine, write_run(tmp_path / "run", HUB, **more))
    assert shown(engine, write_run(tmp_path / "plain", HUB, **dict.fromkeys(more)))


def test_template_arguments_of_the_run_are_served(run: Path) -> None:
    """vLLM gets them as defaults, for adapter and merged folder, also in an export; of SGLang it is said how to ask."""
    words = ("enable_thinking=false", "reasoning=True", "effort=high", "day=a=b", "budget=3")
    give_arguments(run, *words)
    wanted = dict(map(parse_argument, words))
    assert wanted == {"enable_thinking": False, "reasoning": True, "effort": "high", "day": "a=b", "budget": 3}
    for source in (run, run / "final", write_model(run / "merged-original"), write_model(run / "export" / "merged")):
        assert json.loads(value(shown("vllm", source), "--default-chat-template-kwargs")) == wanted
        _, notes, _ = make_command(["sglang", str(source), "--dry-run"])
        assert json.dumps({"chat_template_kwargs": wanted}) in notes[-2]
        assert "chat_template_kwargs" not in " ".join(make_command(["vllm", str(source), "--dry-run"])[1])
    give_arguments(run)
    assert "--default-chat-template-kwargs" not in shown("vllm", run)


@pytest.mark.parametrize("engine", SERVERS)
def test_a_model_that_was_trained_whole_is_served(tmp_path: Path, engine: str) -> None:
    """final/ of a run with train.method full is a model: the run is served under its name."""
    final = write_model(tmp_path / "whole" / "final")
    give_arguments(tmp_path / "whole")
    command = shown(engine, tmp_path / "whole")
    assert str(final) in command
    assert value(command, "--served-model-name") == "whole"
    assert "--enable-lora" not in command


def test_without_base_json_peft_tells_the_base(tmp_path: Path) -> None:
    """An adapter of another trainer is served as well; what it does not have is not passed."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 8, "base_model_name_or_path": "owner/base"}))
    command = shown("vllm", tmp_path, "--name", "theirs")
    assert command[2] == "owner/base"
    assert not {"--chat-template", "--generation-config", "--revision"} & set(command)


@pytest.mark.parametrize("engine", SERVERS)
def test_a_merged_model_is_served_under_its_name(tmp_path: Path, engine: str) -> None:
    """It brings tokenizer, template and end tokens with it; --base has no meaning there and is refused."""
    for place in ("merged", "merged-original", "merged-dequantized", "export/merged"):  # in a run or an export
        merged = write_model(tmp_path / place)
        command = shown(engine, merged)
        assert str(merged) in command
        assert value(command, "--served-model-name") == tmp_path.name
    assert value(shown(engine, merged, "--name", "mine"), "--served-model-name") == "mine"
    with pytest.raises(Refused, match="has its base in it"):
        shown(engine, merged, "--base", "x")


def test_llama_cpp_serves_a_gguf_file(tmp_path: Path) -> None:
    """By its name, its folder or its run's, with the chat template in it, not the one beside it, which lacks arguments.

    One of several must be named.
    """
    (tmp_path / "chat_template.jinja").touch()
    (tmp_path / "model-Q8_0.gguf").touch()
    command = shown("llama_cpp", tmp_path / "model-Q8_0.gguf", "--lora", "adapter.gguf")
    assert command == shown("llama_cpp", tmp_path, "--lora", "adapter.gguf")
    run = write_run(tmp_path / "run", HUB)
    (run / "export").symlink_to(tmp_path)
    assert command == shown("llama_cpp", run, "--lora", "adapter.gguf")
    assert value(command, "--model") == str(tmp_path / "model-Q8_0.gguf")
    assert value(command, "--alias") == "model-Q8_0"
    assert value(command, "--lora") == "adapter.gguf"
    assert "--chat-template-file" not in command
    (tmp_path / "other.gguf").touch()
    with pytest.raises(Refused, match=r"several models, name one: model-Q8_0\.gguf, other\.gguf"):
        shown("llama_cpp", tmp_path)
    (tmp_path / "Modelfile").write_text("FROM ./other.gguf\n")
    assert value(shown("llama_cpp", tmp_path), "--model") == str(tmp_path / "other.gguf")


@pytest.mark.parametrize("named", ["./model.gguf", "model.gguf", '"./model.gguf"', "{folder}/model.gguf"])
def test_ollama_gets_the_modelfile(tmp_path: Path, named: str) -> None:
    """The one beside the .gguf file, and only if that is what it names."""
    (tmp_path / "model.gguf").touch()
    with pytest.raises(Refused, match=r"there is no .*Modelfile"):
        shown("ollama", tmp_path, "--name", "mine")
    modelfile = tmp_path / "Modelfile"
    modelfile.write_text(f"# a comment\nFROM {named.format(folder=tmp_path)}\nPARAMETER stop <|end|>\n")
    assert shown("ollama", tmp_path, "--name", "mine") == ["ollama", "create", "mine", "--file", str(modelfile)]
    (tmp_path / "adapter.gguf").touch()
    assert str(modelfile) in shown("ollama", tmp_path, "--name", "mine")
    with pytest.raises(Refused, match=r"is not of adapter\.gguf"):
        shown("ollama", tmp_path / "adapter.gguf", "--name", "mine")
    (tmp_path / "adapter.gguf").unlink()
    modelfile.write_text("FROM llama3.1\n")
    with pytest.raises(Refused, match=r"FROM names llama3\.1"):
        shown("ollama", tmp_path, "--name", "mine")


def test_what_is_nothing_of_it_is_refused(run: Path, tmp_path: Path) -> None:
    """An unfinished run, a folder of something else, a wrong kind for a server, a name that none takes, bad JSON."""
    model = tmp_path / "model.gguf"
    model.touch()
    for engine in SERVERS:
        with pytest.raises(Refused, match="serve_llama_cpp"):
            shown(engine, model)
    for engine in ("ollama", "llama_cpp"):
        with pytest.raises(Refused, match="handloop export"):
            shown(engine, run)
        with pytest.raises(Refused, match="has its base in it"):
            shown(engine, model, "--base", "x")
    with pytest.raises(Refused, match="is no name"):
        shown("vllm", run, "--name", "a b")
    (run / "final").rename(run / "other")
    with pytest.raises(Refused, match="has not finished"):
        shown("vllm", run)
    with pytest.raises(Refused, match="is no folder"):
        shown("vllm", tmp_path / "nowhere")
    (run / "other" / "base.json").write_text("{")
    with pytest.raises(Refused, match=r"base\.json"):
        shown("vllm", run / "other")


def test_hints_can_be_pasted() -> None:
    """How a server is installed is a line that bash reads, in an environment of its own."""
    for engine in ("vllm", "sglang", "llama_cpp"):
        hint = ENGINES[engine].install
        assert subprocess.run(["bash", "-n", "-c", hint]).returncode == 0
        assert "PATH=" in hint
    assert ENGINES["vllm"].install.startswith("python3 -m venv ~/vllm && ~/vllm/bin/pip install vllm")


@pytest.mark.parametrize("engine", ENGINES)
def test_each_script_becomes_its_server(run: Path, tmp_path: Path, engine: str) -> None:
    """With the server's own options last, on the loopback address; without the program, 78 and how to get it."""
    (tmp_path / "m.gguf").touch()
    (tmp_path / "Modelfile").write_text("FROM m.gguf\n")
    source = run if engine in SERVERS else tmp_path
    script = ["bash", str(ROOT / "launch" / f"serve_{engine}.sh"), str(source), "--name", "mine", "--port", "9000"]
    path = f"{tmp_path}:{os.environ['PATH']}"
    command = shown(engine, source, "--name", "mine", "--port", "9000")
    assert command[-2:] == ["--port", "9000"]
    assert engine == "ollama" or value(command, "--host") == "127.0.0.1"
    missing = subprocess.run(script, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    assert missing.returncode == 78
    assert ENGINES[engine].install in missing.stderr
    program = tmp_path / command[0]
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nexit 7\n')
    program.chmod(0o700)
    done = subprocess.run(script, env={"PATH": path}, capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    assert done.stdout.splitlines()[1:] == command[1:]
    dry = subprocess.run([*script, "--dry-run"], env={"PATH": path}, capture_output=True, text=True)
    assert (dry.returncode, len(dry.stdout.splitlines())) == (0, 1)


def test_bad_words_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown server, or none, is 78 with the known ones; so is a server without a source."""
    assert [main([]), main(["tgi"]), main(["vllm"])] == [78, 78, 78]
    assert "vllm, sglang, ollama, llama_cpp" in capsys.readouterr().err
