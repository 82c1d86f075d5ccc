"""Of a multimodal base the text part is trained, as the text class of its family, and nothing else of it is read."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

from tests.conftest import training_of
from tests.multimodal import FAMILIES, logits_of, served, write_multimodal
from tests.parity.bases import QUANTIZED, Tensors, first_loss, on, rewrite, ways
from train.commands.handloop import main
from train.config import Config, ModelConfig
from train.deliver.final import publish_model
from train.engine.host_stream import HostBlocks
from train.engine.machine_memory import OwnMemory
from train.models.base import load_base
from train.models.language_model import keep_one_cpu_kernel
from train.models.stored import StoredWeights
from train.models.text_part import TWINS, Names, text_part
from train.models.tokenizer import load_tokenizer
from train.run.exits import ExitCode, ExitWith
from train.step import optimizer_step

IDS = torch.arange(5, 45)[None]
CPU = torch.device("cpu")


def loaded(folder: Path, quantization: Any = "none") -> tuple[Any, list[str]]:
    """The base in fp32, and notes on it."""
    config = ModelConfig(name_or_path=str(folder), quantization=quantization)
    return load_base(config, torch.float32, CPU, HostBlocks([], OwnMemory(pin=False)), 0, False)


def refused(folder: Path, quantization: Any = "none") -> str:
    with pytest.raises(ExitWith) as caught:
        loaded(folder, quantization)
    assert caught.value.code == ExitCode.BAD_INPUT
    return caught.value.reason


def is_vision(name: str) -> bool:
    return any(word in name for word in ("visi", "visual", "projector"))


class Counted:
    """A slice of a file that notes when its values are read."""

    def __init__(self, name: str, values: Any, read: list[str]) -> None:
        self.name, self.values, self.read = name, values, read

    def __getattr__(self, name: str) -> Any:
        return getattr(self.values, name)

    def __getitem__(self, key: Any) -> torch.Tensor:
        self.read.append(self.name)
        return self.values[key]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_class_computes_what_the_whole_does(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The family's text class has the whole's logits of text, where every vision weight is NaN and none is read."""
    folder, read = write_multimodal(tmp_path / "base", family), []
    wanted = logits_of(served(folder), IDS)
    rewrite(folder, lambda tensors: {n: t * (torch.nan if is_vision(n) else 1) for n, t in tensors.items()})
    plain = StoredWeights.slices
    monkeypatch.setattr(StoredWeights, "slices", lambda self: {n: Counted(n, s, read) for n, s in plain(self).items()})
    base, notes = loaded(folder)
    assert type(base).__name__ == FAMILIES[family][1]
    torch.testing.assert_close(logits_of(base.eval(), IDS), wanted, rtol=0, atol=1e-5)
    assert set(read) == {name for name, _ in base.named_parameters()} | {n for n in base.state_dict() if "scalar" in n}
    whole = type(served(folder)).__name__
    assert notes == [f"text part of {whole}; its vision weights are not read"]


@pytest.mark.parametrize("family", ["gemma3", "mistral3", "qwen3_5", "qwen3_vl"])
def test_a_text_part_that_is_stored_in_4_bits(family: str, tmp_path: Path) -> None:
    """A whole base that bitsandbytes has packed, vision too: its text class has the packed whole's logits."""
    folder = write_multimodal(tmp_path / "plain", family)
    skipped = ["lm_head", "model.language_model.layers.1.mlp", "language_model.model.layers.1.mlp", "vision_tower"]
    how = T.BitsAndBytesConfig(**QUANTIZED["nf4"].to_diff_dict() | {"llm_int8_skip_modules": skipped})
    kind = T.AutoModelForImageTextToText
    packed: Any = kind.from_pretrained(folder, quantization_config=how, dtype=torch.float32, device_map={"": "cpu"})
    for old in folder.glob("model*"):
        old.unlink()
    packed.save_pretrained(folder)
    base, _ = loaded(folder, "nf4")
    keep_one_cpu_kernel(base)
    keep_one_cpu_kernel(packed)
    assert sum(type(module).__name__ == "Linear4bit" for module in base.modules()) == sum(
        type(module).__name__ == "Linear4bit" and not is_vision(name) for name, module in packed.named_modules()
    )
    torch.testing.assert_close(logits_of(base.eval(), IDS), logits_of(packed.eval(), IDS), rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma3", "llava", "ministral3", "mistral3", "qwen2_5_vl", "qwen3_vl"])
def test_the_engine_runs_a_text_part_of_a_family_it_knows(family: str, config: Config, tmp_path: Path) -> None:
    """Resident, streamed and by the reference engine the first loss is one."""
    config = on(config, write_multimodal(tmp_path / "base", family), "nf4")
    found = {name: first_loss(way) for name, way in ways(config).items()}
    assert found["streamed"] == found["resident"]
    assert found["reference"] == pytest.approx(found["resident"], rel=2e-5)


def flat(folder: Path) -> None:
    """config.json as Qwen2.5-VL's on the hub: the text part's settings beside the vision part's."""
    settings = json.loads((folder / "config.json").read_text())
    text = settings.pop("text_config")
    kept = {key: value for key, value in text.items() if key not in ("model_type", "dtype", "rope_parameters")}
    rope = {"rope_theta": 1e4, "rope_scaling": {"type": "mrope", "mrope_section": [4, 2, 2]}}
    (folder / "config.json").write_text(json.dumps(settings | kept | rope))


# how names begin in a family's files as transformers saves them -> as others on the hub do
LAYOUTS: list[tuple[str, dict[str, str]]] = [
    ("gemma3", {"language_model.model.": "model.language_model.", "vision_tower.": "model.vision_tower."}),
    ("gemma3", {"vision_tower.": "vision_tower.vision_model."}),
    ("mistral3", {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head."}),
    ("qwen2_5_vl", {"model.language_model.": "model.", "model.visual.": "visual."}),
    ("qwen3_vl", {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."}),
    ("gemma4", {"model.language_model.": "", "model.vision_tower.": "vision_tower."}),
]


@pytest.mark.parametrize(("family", "starts"), LAYOUTS)
def test_names_as_others_saved_them(family: str, starts: dict[str, str], tmp_path: Path) -> None:
    """The text part is found under the beginnings of names that older versions and other programs give it."""
    folder = write_multimodal(tmp_path / "base", family)
    wanted = logits_of(served(folder), IDS)

    def renamed(name: str) -> str:
        start = next((start for start in starts if name.startswith(start)), "")
        return starts[start] + name.removeprefix(start) if start else name

    rewrite(folder, lambda tensors: {renamed(name): tensor for name, tensor in tensors.items()})
    if family == "qwen2_5_vl":
        flat(folder)
    torch.testing.assert_close(logits_of(loaded(folder)[0].eval(), IDS), wanted, rtol=0, atol=1e-5)


TEXT = "language_model.model.layers.0.self_attn.q_proj.weight"
Change = Callable[[Tensors], Tensors]


UNLIKE: dict[str, tuple[Change, str]] = {
    "a weight is missing": (
        lambda tensors: {n: t for n, t in tensors.items() if n != TEXT},
        "the files lack model.layers.0.self_attn.q_proj.weight",
    ),
    "a weight has another shape": (
        lambda tensors: tensors | {TEXT: torch.zeros(3, 3)},
        r"model.layers.0.self_attn.q_proj.weight is [3, 3] in the files, [64, 64] by config.json",
    ),
    "a bias in a block": (
        lambda tensors: tensors | {TEXT.replace("weight", "bias"): torch.zeros(64)},
        "the files hold model.layers.0.self_attn.q_proj.bias, which the model of config.json does not have",
    ),
    "a further block": (
        lambda tensors: tensors | {TEXT.replace("layers.0", "layers.7"): torch.zeros(64, 64)},
        "the files hold model.layers.7.self_attn.q_proj.weight, which",
    ),
    "an unknown part": (
        lambda tensors: tensors | {"thinker.weight": torch.zeros(3)},
        "thinker.weight is neither of the text part (model.language_model.*) nor beside it",
    ),
    "a text part twice": (
        lambda tensors: (
            tensors | {"model.embed_tokens.weight": tensors["language_model.model.embed_tokens.weight"].clone()}
        ),
        "a text part has one embedding embed_tokens.weight",
    ),
    "no text part": (
        lambda tensors: {n: t for n, t in tensors.items() if is_vision(n)},
        "a text part has one embedding embed_tokens.weight and at most one head",
    ),
    "another head": (
        lambda tensors: (
            tensors
            | {"language_model.lm_head.weight": torch.zeros_like(tensors["language_model.model.embed_tokens.weight"])}
        ),
        "config.json ties the head to the embedding, and the files hold two",
    ),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_the_text_part_is_whole_or_refused(name: str, tmp_path: Path) -> None:
    """What lacks in the text part, or is neither of it nor known to lie beside it, ends the run by name."""
    change, message = UNLIKE[name]
    folder = write_multimodal(tmp_path / "base", "gemma3")
    rewrite(folder, change)
    assert message in refused(folder)


def test_weights_that_transformers_leaves_may_lie_beside(tmp_path: Path) -> None:
    """Qwen3.5's layers for predicting several tokens, which no class of transformers has, are no reason to refuse."""
    folder = write_multimodal(tmp_path / "base", "qwen3_5")
    rewrite(folder, lambda tensors: tensors | {"mtp.layers.0.self_attn.q_proj.weight": torch.zeros(3)})
    loaded(folder)


def test_a_text_part_without_a_class_is_refused_by_name(tmp_path: Path) -> None:
    """A family for whose text part transformers has no class of its own ends with 78, naming both."""
    T.Glm4vConfig().save_pretrained(tmp_path)
    reason = refused(tmp_path)
    assert "it is multimodal (glm4v), and transformers" in reason
    assert "has no causal language model for its text part (glm4v_text) alone" in reason


def test_a_text_part_that_is_stored_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts that the whole transposes as it reads them are not read as they lie, though their shapes are the same."""
    moe = {"model_type": "qwen3_vl_moe_text", "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
    shape: Any = FAMILIES["qwen3_vl"][0]()
    text = shape.text_config.to_dict() | moe
    T.Qwen3VLMoeConfig(text_config=text, vision_config=shape.vision_config.to_dict()).save_pretrained(tmp_path)
    for _ in ("without a twin", "with one"):
        assert "no causal language model for its text part (qwen3_vl_moe_text)" in refused(tmp_path)
        monkeypatch.setitem(TWINS, "qwen3_vl_moe_text", T.Qwen3MoeConfig)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_there_and_back(family: str, tmp_path: Path) -> None:
    """Every text weight has a name in the whole, which is one there, and gets its own back; PEFT's prefix stays."""
    folder = write_multimodal(tmp_path / "base", family)
    part = text_part(ModelConfig(name_or_path=str(folder)))
    assert part is not None
    whole, names = served(folder).state_dict(), part.names
    for name, _ in loaded(folder)[0].named_parameters():
        assert names.served(name) in whole
        assert not is_vision(names.served(name))
        assert names.text(names.served(name)) == names.text(name) == name
        assert names.served(f"base_model.model.{name}") == f"base_model.model.{names.served(name)}"
    assert names.served("lm_head") == names.served("lm_head.weight").removesuffix(".weight")


def test_an_ordinary_base_is_not_renamed() -> None:
    """The names of a base without a text part are its own, and adapter_config.json is left as it is."""
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    names = Names()
    assert names.served("model.norm.weight") == names.text("model.norm.weight") == "model.norm.weight"
    assert names.served_settings(settings, ["model.layers.0.self_attn.q_proj"]) == settings


@pytest.mark.parametrize("family", ["gemma3", "llama4", "qwen3_vl"])
def test_trained_whole_it_becomes_its_text_class(family: str, config: Config, tmp_path: Path) -> None:
    """final/ of full fine-tuning is a model of the text class, which transformers loads, as it was trained."""
    config = on(config, write_multimodal(tmp_path / "base", family), "none")
    training = training_of(replace(config, train=replace(config.train, method="full")), Accelerator(cpu=True))
    optimizer_step(training, 0)
    publish_model(tmp_path / "final", training.model, load_tokenizer(config).backend, [1], {}, {})
    settings = json.loads((tmp_path / "final" / "config.json").read_text())
    assert settings["architectures"] == [FAMILIES[family][1]]
    assert "mrope" not in json.dumps(settings)
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype=torch.float32).eval()
    with training.model.generating():
        wanted = logits_of(training.model.causal_lm, IDS)
    torch.testing.assert_close(logits_of(plain, IDS), wanted, rtol=0, atol=1e-5)


def test_it_is_said(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The banner's notes and `handloop plan` say that it is a part, and of which class."""
    folder = write_multimodal(tmp_path / "base", "mistral3")
    told = "text part of Mistral3ForConditionalGeneration; its vision weights are not read"
    assert told in training_of(on(config, folder, "nf4"), Accelerator(cpu=True)).model.about.notes
    assert main(["plan", "--profile", "4gb", "--model.name_or_path", str(folder), "--data.max_length", "512"]) == 0
    assert f"base      {told}" in capsys.readouterr().out


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.mark.parametrize("name", ["chat_template.jinja", "chat_template.json", "processor_config.json"])
def test_a_processor_s_template_is_found(name: str, config: Config, tmp_path: Path) -> None:
    """The chat template is found where a processor keeps it, and trained; a broken file is 78 with the way out."""
    folder = write_multimodal(tmp_path / "base", "mistral3")
    (folder / "chat_template.jinja").unlink()
    held = TEMPLATE if name.endswith(".jinja") else json.dumps({"chat_template": TEMPLATE})
    (folder / name).write_text(held)
    own = on(config, folder, "nf4")
    assert load_tokenizer(own).backend.chat_template == TEMPLATE
    if name.endswith(".json"):
        assert f"chat template: that of {name}" in load_tokenizer(own).notes
        for broken in ("{", json.dumps({"chat_template": ["a list"]}), "[]"):
            (folder / name).write_text(broken)
            with pytest.raises(ExitWith, match=rf"{name}: the chat template cannot be read.*--data\.chat_template"):
                load_tokenizer(own)
