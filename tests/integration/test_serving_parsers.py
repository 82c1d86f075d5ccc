"""The command lines that serve a result, read by the parsers of the servers themselves where they are installed."""

import argparse
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from launch.serving import make_command
from tests.unit.launch.test_serving import HUB, give_arguments, write_model, write_run


def made(engine: str, source: Path, *words: str) -> list[str]:
    """The command line for a server."""
    return make_command([engine, str(source), "--dry-run", *words])[0]


def test_vllm_reads_what_is_made_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parser takes every option, with the meaning that was meant."""
    if not torch.cuda.is_available():
        monkeypatch.setenv("VLLM_TARGET_DEVICE", "cpu")  # its parser asks for a device
    cli = pytest.importorskip("vllm.entrypoints.common.cli_args", reason="vllm cannot be imported here")
    parsing = pytest.importorskip("vllm.utils.argparse_utils", reason="vllm cannot be imported here")
    parser = cli.make_arg_parser(parsing.FlexibleArgumentParser())
    final = str(write_run(tmp_path / "a100", HUB, r=24) / "final")
    give_arguments(tmp_path / "a100", "enable_thinking=false")
    read = parser.parse_args(made("vllm", tmp_path / "a100", "--port", "9000")[2:])
    assert (read.model_tag, read.revision) == (HUB["name"], HUB["commit"])
    assert (read.host, read.port) == ("127.0.0.1", 9000)
    assert (read.tokenizer, read.generation_config) == (final, final)
    assert read.chat_template == f"{final}/chat_template.jinja"
    assert read.default_chat_template_kwargs == {"enable_thinking": False}
    assert (read.enable_lora, read.max_lora_rank) == (True, 32)
    assert [(each.name, each.path, each.base_model_name) for each in read.lora_modules] == [
        ("a100", final, HUB["name"])
    ]
    read = parser.parse_args(made("vllm", write_model(tmp_path / "merged"))[2:])
    assert (read.model_tag, read.served_model_name) == (str(tmp_path / "merged"), [tmp_path.name])


def test_sglang_reads_what_is_made_for_it(tmp_path: Path) -> None:
    """The same for SGLang's parser."""
    arguments = pytest.importorskip("sglang.srt.server_args", reason="sglang cannot be imported here")
    parser = argparse.ArgumentParser()
    arguments.ServerArgs.add_cli_args(parser)
    final = str(write_run(tmp_path / "a100", HUB, r=24) / "final")
    read = parser.parse_args(made("sglang", tmp_path / "a100", "--port", "9000")[2:])
    assert (read.model_path, read.revision, read.tokenizer_path) == (HUB["name"], HUB["commit"], final)
    assert (read.host, read.port, read.chat_template) == ("127.0.0.1", 9000, f"{final}/chat_template.jinja")
    assert json.loads(read.json_model_override_args) == {"eos_token_id": [128001, 128009]}
    assert (read.enable_lora, read.lora_strict_loading, read.lora_paths) == (True, True, [f"a100={final}"])
    read = parser.parse_args(made("sglang", write_model(tmp_path / "merged"))[2:])
    assert (read.model_path, read.served_model_name) == (str(tmp_path / "merged"), tmp_path.name)


def test_llama_server_reads_what_is_made_for_it(tmp_path: Path) -> None:
    """llama-server takes every option; --version, behind them, ends it before it loads anything."""
    if shutil.which("llama-server") is None:
        pytest.skip("llama-server is not on the PATH")
    (tmp_path / "model.gguf").touch()
    command = made("llama_cpp", tmp_path, "--lora", "adapter.gguf", "--port", "9000")
    done = subprocess.run([*command, "--version"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    refused = subprocess.run([*command, "--no-such-option", "--version"], capture_output=True, text=True)
    assert "no-such-option" in refused.stderr
    assert refused.returncode != 0
