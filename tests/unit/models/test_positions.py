"""model.max_positions raises the number of positions of a base, or refuses what that would change."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from accelerate import Accelerator

from tests.conftest import training_of
from tests.finished_runs import finish, settings_of
from tests.multimodal import write_multimodal
from tests.parity.bases import on
from tests.unit.models.test_agreement import LONG, SIZES, write
from tests.unit.models.test_text_part import flat
from train.checkpoints.extension import TOTAL
from train.checkpoints.identity import DETAILS, INITIAL, differences
from train.collate import collate_packed
from train.config import Config, EngineConfig, ModelConfig
from train.deliver.finished import finished_run
from train.deliver.merge import Merge
from train.engine.host_stream import HostBlocks
from train.engine.machine_memory import OwnMemory
from train.models.base import load_base
from train.models.fingerprint import base_fingerprint
from train.models.positions import check_positions
from train.models.shape import max_positions, trained_settings
from train.models.tokenizer import check_length
from train.run.exits import ExitCode, ExitWith

CPU = torch.device("cpu")
IDS = torch.randint(5, 400, (1, 700), generator=torch.Generator().manual_seed(0))  # longer than 512
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
OF_128 = {"original_max_position_embeddings": 128}
# no factor: the scale of attention is made of the two numbers of positions
WITHOUT_FACTOR = {key: value for key, value in LONG.items() if key != "factor"}
WINDOWS: dict[str, Any] = {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]}
GPT2: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": SIZES["vocab_size"], "n_positions": 512}
TAKEN = {
    "plain": lambda: T.LlamaConfig(**SIZES),
    "linear": lambda: T.LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
    "llama3": lambda: T.LlamaConfig(**SIZES, rope_parameters=LLAMA3 | OF_128),
    "yarn": lambda: T.LlamaConfig(**SIZES, rope_parameters=YARN | OF_128),
    "longrope": lambda: T.LlamaConfig(**SIZES, rope_parameters=LONG),
    "two kinds of layers": lambda: T.Gemma3TextConfig(**SIZES, **WINDOWS),
    "another name": lambda: T.GPTJConfig(**GPT2, rotary_dim=8),
}
REFUSED = {
    "dynamic": (
        lambda: T.LlamaConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        r"rotary scaling \(dynamic\) depends on max_position_embeddings",
    ),
    "longrope": (lambda: T.LlamaConfig(**SIZES, rope_parameters=WITHOUT_FACTOR), r"\(longrope\) depends on"),
    "a table": (lambda: T.GPT2Config(**GPT2), r"a learned table \(transformer\.wpe\.weight\) of 512"),
    "a table with an offset": (
        lambda: T.OPTConfig(
            vocab_size=SIZES["vocab_size"], hidden_size=64, num_hidden_layers=1, ffn_dim=96, num_attention_heads=4,
            max_position_embeddings=512, word_embed_proj_dim=64,
        ),
        r"a learned table \(model\.decoder\.embed_positions\.weight\)",
    ),
    "no number": (
        lambda: T.BloomConfig(vocab_size=SIZES["vocab_size"], hidden_size=64, n_layer=1, n_head=4),
        "so there is no limit; leave it out",
    ),
}  # fmt: skip


def raised(folder: Path, positions: int = 1024) -> ModelConfig:
    return ModelConfig(name_or_path=str(folder), quantization="none", max_positions=positions)


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("name", TAKEN)
def test_a_raised_base_reads_short_texts_as_before(name: str, tmp_path: Path) -> None:
    """Loaded with 1,024 positions, a base of 512 has the logits of transformers on a short text, and takes a long
    one."""
    folder = write(tmp_path / "base", TAKEN[name]())
    check_positions(raised(folder))
    before, after = settings_of(folder), trained_settings(raised(folder))
    assert before.keys() == after.keys()
    assert [(before[key], after[key]) for key in before if before[key] != after[key]] == [(512, 1024)]
    base, notes = load_base(raised(folder), torch.float32, CPU, HostBlocks([], OwnMemory(pin=False)), 0, False)
    assert base.config.max_position_embeddings == max_positions(raised(folder)) == 1024
    assert notes == ["takes 1,024 positions (model.max_positions); beyond 512 it has never seen any"]
    plain: Any = T.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(logits(base, IDS[:, :100]), logits(plain, IDS[:, :100]))
    assert logits(base, IDS).isfinite().all()


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_change_is_refused_by_name(name: str, tmp_path: Path) -> None:
    """Scaling that depends on the number of positions, a learned table of them, and no number at all are 78."""
    make, message = REFUSED[name]
    with pytest.raises(ExitWith, match=message) as caught:
        check_positions(raised(write(tmp_path / "base", make())))
    assert caught.value.code == ExitCode.BAD_INPUT


@pytest.mark.parametrize("scaling", [LLAMA3, YARN])
def test_an_original_number_that_is_not_written_is_refused(scaling: dict[str, Any], tmp_path: Path) -> None:
    """Where config.json leaves the original number to max_position_embeddings, raising that changes the frequencies."""
    folder = write(tmp_path / "base", T.LlamaConfig(**SIZES, rope_parameters=dict(scaling)))
    settings = settings_of(folder)
    del settings["rope_parameters"]["original_max_position_embeddings"]
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ExitWith, match=r"depends on max_position_embeddings"):
        check_positions(raised(folder))


def test_raised_means_more(config: Config, tmp_path: Path) -> None:
    """The base's own number or less is refused, and rows that are longer than the raised one, too."""
    folder = write(tmp_path / "base", T.LlamaConfig(**SIZES))
    for positions in (256, 512):
        with pytest.raises(ExitWith, match=rf"--model\.max_positions {positions}: .* takes 512 already; leave it out"):
            check_positions(raised(folder, positions))
    with pytest.raises(ExitWith, match=r"told apart up to 16,777,216; take no more"):
        check_positions(raised(folder, 10**20))
    long = replace(config, model=raised(folder, 600), data=replace(config.data, max_length=700))
    with pytest.raises(ExitWith, match=r"max_length 700: .* made for 512 at most; --model\.max_positions 600 allows"):
        check_length(long)
    with pytest.raises(ExitWith, match=r"made for 512 at most; --model\.max_positions 700 trains it"):
        check_length(replace(long, model=raised(folder, 0)))
    check_length(replace(long, model=raised(folder, 700)))


@pytest.mark.parametrize("kind", ["reference", "fused"])
def test_rows_beyond_the_base_are_trained(kind: Any, config: Config, tmp_path: Path) -> None:
    """A row of 700 tokens has the loss of transformers with 1,024 positions, packed behind another row, too."""
    folder = write(tmp_path / "base", T.LlamaConfig(**SIZES))
    config = replace(on(config, folder, "none"), model=raised(folder), engine=EngineConfig(kind=kind))
    model = training_of(config, Accelerator(cpu=True)).model.eval()
    rows = [{"input_ids": ids, "trained": [True] * len(ids)} for ids in (list(range(9, 40)), IDS[0].tolist())]
    with torch.no_grad():
        ours = sum(float(model(collate_packed([row]))) for row in rows), float(model(collate_packed(rows)))
    plain: Any = T.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, max_position_embeddings=1024)
    theirs = 0.0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        theirs += float(torch.nn.functional.cross_entropy(logits(plain, ids)[0, :-1], ids[0, 1:], reduction="sum"))
    assert ours == pytest.approx((theirs, theirs), rel=2e-5)


def test_a_part_of_a_multimodal_base_is_raised(tmp_path: Path) -> None:
    """The text part's number is raised where config.json has it, and the vision part's is left."""
    folder = write_multimodal(tmp_path / "base", "gemma3")
    check_positions(raised(folder))
    before, after = settings_of(folder), trained_settings(raised(folder))
    assert max_positions(raised(folder)) == after["text_config"].pop("max_position_embeddings") == 1024
    assert before["text_config"].pop("max_position_embeddings") == 512
    assert before == after


def test_a_part_that_is_written_flat_is_raised(tmp_path: Path) -> None:
    """Qwen2.5-VL's config.json on the hub has the text part's settings beside the vision part's."""
    folder = write_multimodal(tmp_path / "base", "qwen2_5_vl")
    flat(folder)
    check_positions(raised(folder))
    assert trained_settings(raised(folder)) == settings_of(folder) | {"max_position_embeddings": 1024}


def test_it_is_told_of_the_run_and_not_of_the_base(config: Config, tmp_path: Path) -> None:
    """The base's fingerprint stays, so an adapter fits it; a checkpoint of the run is another's."""
    folder = write(tmp_path / "base", T.LlamaConfig(**SIZES))
    plain, long = (replace(config, model=raised(folder, number)) for number in (0, 1024))
    assert base_fingerprint(plain) == base_fingerprint(long)
    of_before = dict.fromkeys(("data", "model.base", INITIAL, TOTAL)) | {DETAILS: {}}
    told = differences(of_before, of_before | {"model.max_positions": 1024})
    assert "model.max_positions 0 -> 1024" in told


def test_a_merged_model_takes_what_was_trained(config: Config, tmp_path: Path) -> None:
    """config.json of the merged model has the raised number, and is otherwise the base's."""
    folder = write(tmp_path / "base", T.LlamaConfig(**SIZES))
    run = finish(replace(config, model=raised(folder)), tmp_path / "run")
    (tmp_path / "merged").mkdir()
    Merge.of(finished_run(run), "original", "fp32").write(tmp_path / "merged")
    before, after = settings_of(folder), settings_of(tmp_path / "merged")
    assert (before.pop("max_position_embeddings"), after.pop("max_position_embeddings")) == (512, 1024)
    assert before == after
    merged: Any = T.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert logits(merged, IDS).isfinite().all()


def test_no_number_of_positions_is_no_limit(tmp_path: Path) -> None:
    """XLNet's configuration says -1, which is no longest sample."""
    T.XLNetConfig().save_pretrained(tmp_path)
    assert max_positions(ModelConfig(str(tmp_path))) == 0
