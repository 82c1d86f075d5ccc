"""Runs with other ways to tune: exactly resumed, and loaded by plain PEFT or transformers."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.compare_runs import at, result_of
from tests.conftest import Outcome, arguments, run_command
from tests.parity.bases import Shape, on, write
from tests.parity.test_full_fine_tuning import whole
from train.checkpoints.contents import ADAPTER
from train.config import CheckpointConfig, Config
from train.deliver.finished import finished_run, load_tuned

NEW = ("<|so|>", "bolt", "unseen-word")


def tuned(config: Config, tmp_path: Path, is_tied: bool) -> Config:
    """Four steps with all of it, a checkpoint after every second."""
    config = on(config, write(tmp_path / "base", Shape(is_tied=is_tied)), "none")
    lora = replace(config.lora, rslora=True, trainable_tokens=NEW)
    optim = replace(config.optim, lora_plus_ratio=4.0, warmup=0)
    config = replace(config, lora=lora, optim=optim, checkpoint=CheckpointConfig(every=2, keep=9))
    return replace(config, train=replace(config.train, max_steps=4))


def started(config: Config, folder: str) -> Config:
    """The run from another adapter, or from none."""
    return replace(config, lora=replace(config.lora, init_from=folder))


def finished(config: Config) -> Outcome:
    outcome = run_command(arguments(config))
    assert outcome.returncode == 0, outcome.stderr
    return outcome


def test_on_top_of_an_adapter_and_resumed_to_the_bit(config: Config, tmp_path: Path) -> None:
    """Whole = continued from its second step, wherever the adapter lies; with another adapter, or none, exit 77."""
    config = tuned(config, tmp_path, is_tied=False)
    first = at(replace(config, train=replace(config.train, max_steps=2)), tmp_path / "first")
    said = finished(first).stdout
    assert "3 tokens are new: <|so|> bolt unseen-word" in said
    assert "2 of lora.trainable_tokens are in no sample, so that their embedding stays as it starts: <|so|> u" in said
    assert "B at 4 times the rate" in said
    second = started(at(config, tmp_path / "run"), str(tmp_path / "first"))
    assert f"rsLoRA r=4 alpha=8 (scale 4) dropout=0.0, from {tmp_path / 'first'}, on" in finished(second).stdout
    shutil.copytree(tmp_path / "first" / "final", tmp_path / "moved")
    half = str(tmp_path / "run" / "checkpoints" / "step-0000000002")
    resumed = started(at(second, tmp_path / "resumed"), str(tmp_path / "moved"))
    finished(replace(resumed, run=replace(resumed.run, resume=half)))
    whole, continued = result_of(tmp_path / "run"), result_of(tmp_path / "resumed")
    assert all(whole[part] == continued[part] for part in ("adapters", "saved", "optimizer"))
    shutil.rmtree(tmp_path / "first")  # a finished run needs no more what it started from
    check_final(second)
    tensors = load_file(tmp_path / "moved" / ADAPTER)
    save_file({name: 1.01 * tensor for name, tensor in tensors.items()}, tmp_path / "moved" / ADAPTER, {"format": "pt"})
    refusals = {
        f"lora.init_from: the adapter in {tmp_path / 'moved'} has changed": resumed,
        f"lora.init_from {tmp_path / 'moved'} -> (none)": started(resumed, ""),
    }
    for reason, other in refusals.items():
        outcome = run_command(arguments(other))
        assert (outcome.returncode, reason in outcome.stderr) == (77, True), outcome.stderr


def test_a_tied_pair_is_delivered(config: Config, tmp_path: Path) -> None:
    """Rows that embedding and head share: final/ gives the trained model's logits in plain PEFT."""
    config = tuned(config, tmp_path, is_tied=True)
    finished(config)
    check_final(config)


def check_final(config: Config) -> None:
    """Plain transformers and PEFT, told the vocabulary of base.json, give the logits of the run loaded again."""
    final = Path(config.run.dir) / "final"
    tokenizer: Any = AutoTokenizer.from_pretrained(final)
    assert tokenizer("bolt", add_special_tokens=False).input_ids == [tokenizer.convert_tokens_to_ids("bolt")]
    assert json.loads((final / "adapter_config.json").read_text())["use_rslora"]
    base: Any = AutoModelForCausalLM.from_pretrained(config.model.name_or_path, dtype=torch.float32)
    base.resize_token_embeddings(json.loads((final / "base.json").read_text())["vocabulary"])
    theirs = PeftModel.from_pretrained(base, final).eval()
    ours = load_tuned(finished_run(Path(config.run.dir))).model
    ids = torch.tensor([[*tokenizer("a bolt number 3").input_ids, *tokenizer.convert_tokens_to_ids(list(NEW))]])
    with torch.no_grad(), ours.generating():
        wanted = ours.adapted(input_ids=ids).logits
        torch.testing.assert_close(theirs(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-4)


def test_a_model_trained_whole_is_resumed_and_delivered(config: Config, tmp_path: Path) -> None:
    """Whole = continued from its second step; final/ loads as a model, with the type and the settings of the base."""
    config = whole(config, write(tmp_path / "base", Shape(is_tied=True, dtype=torch.bfloat16)))
    config = replace(config, checkpoint=CheckpointConfig(every=2, keep=9), train=replace(config.train, max_steps=4))
    config = replace(config, memory=replace(config.memory, checkpointing="full"))
    expected = bits_of(config, tmp_path / "run")
    half = str(tmp_path / "run" / "checkpoints" / "step-0000000002")
    resumed = at(config, tmp_path / "resumed")
    outcome = run_command(arguments(replace(resumed, run=replace(resumed.run, resume=half))))
    assert outcome.returncode == 0, outcome.stderr
    assert bits_of(config, tmp_path / "resumed", is_made=True) == expected
    assert "every weight, in fp32" in outcome.stdout
    assert "no questions are asked" in outcome.stdout
    last = tmp_path / "run" / "checkpoints" / "step-0000000004"
    assert json.loads((last / "adapter_config.json").read_text())["train_method"] == "full"
    final = tmp_path / "run" / "final"
    assert (final / "config.json").read_bytes() == (tmp_path / "base" / "config.json").read_bytes()
    model: Any = AutoModelForCausalLM.from_pretrained(final)
    assert model.dtype == torch.bfloat16
    saved = load_file(last / "adapter_model.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, saved[name].bfloat16()), name
    of_adapters = replace(at(config, tmp_path / "run"), train=replace(config.train, method="lora"))
    refused = run_command(arguments(of_adapters))
    assert (refused.returncode, "train.method full -> lora" in refused.stderr) == (77, True), refused.stderr


def bits_of(config: Config, run_dir: Path, is_made: bool = False) -> dict[str, bytes]:
    """The bits of the last checkpoint and of final/, of a run that is made unless it was."""
    if not is_made:
        outcome = run_command(arguments(at(config, run_dir)))
        assert outcome.returncode == 0, outcome.stderr
    last = max((run_dir / "checkpoints").glob("step-*"))
    files = (last / "adapter_model.safetensors", last / "optimizer.safetensors", run_dir / "final/model.safetensors")
    return {path.name: path.read_bytes() for path in files}
