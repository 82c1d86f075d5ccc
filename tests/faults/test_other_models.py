"""What would compute another model than the base's is refused before the first step: heads, blocks, packing."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers as T
from accelerate import Accelerator
from transformers.core_model_loading import WeightRenaming

from tests.conftest import training_of
from tests.parity.bases import on
from tests.unit.models.test_agreement import HEADS, SIZES, SPARSE, for_all_linear, packed, write
from train.config import Config, EngineConfig
from train.loss import Head
from train.models import language_model
from train.models.tokenizer import check_fits, load_tokenizer
from train.run.exits import ExitCode, ExitWith


@pytest.mark.fault("T30")
@pytest.mark.parametrize("name", HEADS)
def test_a_head_that_is_not_known_is_refused(
    name: str, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of these heads, taken for one that only multiplies, ends the run, whatever the seed."""
    folder = write(tmp_path / "base", HEADS[name]())
    monkeypatch.setattr(language_model, "head_of", lambda model, compute: Head(model.get_output_embeddings().weight))
    for seed in range(4):
        config = replace(for_all_linear(config, folder), train=replace(config.train, seed=seed))
        with pytest.raises(ExitWith, match="of the logits that our head makes differ from transformers'") as caught:
            training_of(config, Accelerator(cpu=True))
        assert caught.value.code == ExitCode.BAD_INPUT


@pytest.mark.fault("T30")
def test_a_block_that_is_computed_otherwise_is_refused(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores scaled by 2 % too much in the second block, or adapters at 1.1 times their scale, end a fused run."""
    config = replace(config, engine=EngineConfig(kind="fused"))
    assert training_of(config, Accelerator(cpu=True)).plan.is_fused
    real = language_model.FusedDecoder.__init__

    def wrong_scores(self: Any, *arguments: Any) -> None:
        real(self, *arguments)
        inner = self.attend_for
        self.attend_for = lambda batch: {None: lambda q, k, v, _: inner(batch)[None](q * 1.02, k, v)}

    def wrong_adapters(self: Any, *arguments: Any) -> None:
        real(self, *arguments)
        down = self.stack.blocks[1].mlp.down
        down.scales = [scale * 1.1 for scale in down.scales]

    def wrong_embedding(self: Any, *arguments: Any) -> None:
        real(self, *arguments)
        self.embedding_scale = 1.1

    def wrong_norm(self: Any, *arguments: Any) -> None:
        real(self, *arguments)
        self.stack.norm = replace(self.stack.norm, eps=1.0)

    for part, fault in (("embedding", wrong_embedding), ("last norm", wrong_norm)):
        monkeypatch.setattr(language_model.FusedDecoder, "__init__", fault)
        with pytest.raises(ExitWith, match=f"the {part} of the fused engine differs"):
            training_of(config, Accelerator(cpu=True))
    for number, fault in enumerate((wrong_scores, wrong_adapters)):
        monkeypatch.setattr(language_model.FusedDecoder, "__init__", fault)
        with pytest.raises(ExitWith, match=f"block {number} on the fused engine differs from transformers'"):
            training_of(config, Accelerator(cpu=True))


@pytest.mark.fault("T30")
def test_layers_that_carry_their_state_are_not_packed(config: Config, tmp_path: Path) -> None:
    """A convolution and a recurrence across packed samples are refused; padded rows of the same models train."""
    shapes = (
        T.Lfm2Config(**SIZES | {"num_hidden_layers": 2}, layer_types=["conv", "full_attention"]),
        T.Qwen3_5TextConfig(
            **SIZES,
            head_dim=16,
            layer_types=["linear_attention", "full_attention"],
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
        ),
    )
    for number, shape in enumerate(shapes):
        own = for_all_linear(config, write(tmp_path / f"base-{number}", shape))
        training_of(own, Accelerator(cpu=True))
        with pytest.raises(ExitWith, match=r"--data\.packing true: .* does not compute a packed sample as") as caught:
            training_of(packed(own), Accelerator(cpu=True))
        assert caught.value.code == ExitCode.BAD_INPUT


@pytest.mark.fault("T30")
def test_tokens_that_see_later_ones_are_refused(config: Config, tmp_path: Path) -> None:
    """A Llama that config.json makes bidirectional, and an encoder that is no decoder: not trained on their answers."""
    shape = T.LlamaConfig(**SIZES)
    shape.is_causal = False
    encoder = T.BertGenerationConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"})
    for number, own in enumerate((shape, encoder)):
        folder = write(tmp_path / str(number), own)
        with pytest.raises(ExitWith, match="its tokens see later ones"):
            training_of(for_all_linear(config, folder), Accelerator(cpu=True))


@pytest.mark.fault("T30")
def test_settings_that_the_architecture_does_not_read_are_not_applied(config: Config, tmp_path: Path) -> None:
    """A Llama with Cohere's scale and Gemma's cap in its config.json has the plain head that transformers computes."""
    folder = write(tmp_path / "base", T.LlamaConfig(**SIZES | {"logit_scale": 0.25, "final_logit_softcapping": 3.0}))
    head = training_of(for_all_linear(config, folder), Accelerator(cpu=True)).model.head
    assert (head.scale, head.cap) == (1.0, 0.0)


@pytest.mark.fault("T30")
def test_a_decoder_within_the_decoder_trains(config: Config, tmp_path: Path) -> None:
    """OPT's head reads what its own inner decoder returns."""
    shape = T.OPTConfig(
        vocab_size=SIZES["vocab_size"],
        hidden_size=64,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        dropout=0.1,
    )
    about = training_of(for_all_linear(config, write(tmp_path / "base", shape)), Accelerator(cpu=True)).model.about
    assert about.targets.counts["all-linear"] == 12
    assert about.held.total > 0


@pytest.mark.fault("T30")
@pytest.mark.parametrize("shape", [T.WhisperConfig(), T.BartConfig(), T.T5Config()], ids=lambda shape: shape.model_type)
def test_an_encoder_with_a_decoder_is_refused(shape: Any, config: Config, tmp_path: Path) -> None:
    """By config.json alone: transformers would train Whisper's decoder as a language model, without what it hears."""
    shape.save_pretrained(tmp_path)
    with pytest.raises(ExitWith, match=f"it is an encoder and a decoder \\({shape.model_type}\\)") as caught:
        training_of(for_all_linear(config, tmp_path), Accelerator(cpu=True))
    assert caught.value.code == ExitCode.BAD_INPUT


@pytest.mark.fault("T30")
def test_adapters_without_a_gradient_are_told(config: Config, tmp_path: Path) -> None:
    """A BART decoder by itself never asks its attention on an encoder; a Phi teaches all it has."""
    sizes = {"vocab_size": SIZES["vocab_size"], "d_model": 64, "decoder_ffn_dim": 96, "decoder_layers": 2}
    shape = T.BartConfig(**sizes, decoder_attention_heads=4, is_encoder_decoder=False, is_decoder=True)
    about = training_of(for_all_linear(config, write(tmp_path / "bart", shape)), Accelerator(cpu=True)).model.about
    (note,) = (note for note in about.notes if "got no gradient" in note)
    assert note.startswith("8 of its layers with adapters got no gradient from 16 tokens and may learn nothing: model")
    assert note.count("encoder_attn") == 4
    about = training_of(for_all_linear(config, write(tmp_path / "base", T.PhiConfig(**SPARSE))), Accelerator(cpu=True))
    assert not any("got no gradient" in note for note in about.model.about.notes)


@pytest.mark.fault("T30")
def test_what_is_no_language_model_is_refused_before_the_data(config: Config, tmp_path: Path) -> None:
    """By config.json: images alone, text parts without a class that serves them."""
    tokenizer = load_tokenizer(config).backend
    shapes = {
        "knows no language model of the type 'vit'": T.ViTConfig(),
        "it is multimodal \\(blip\\)": T.BlipConfig(),
        "it is multimodal \\(mllama\\)": T.MllamaConfig(),
    }
    for number, (reason, shape) in enumerate(shapes.items()):
        shape.save_pretrained(tmp_path / str(number))
        with pytest.raises(ExitWith, match=reason) as caught:
            check_fits(for_all_linear(config, tmp_path / str(number)), tokenizer)
        assert caught.value.code == ExitCode.BAD_INPUT


@pytest.mark.fault("T30")
def test_a_head_behind_another_layer_is_refused(config: Config, tmp_path: Path) -> None:
    """RemBERT's reads vectors of another width than the decoder's."""
    shape = T.RemBertConfig(**SPARSE, is_decoder=True, input_embedding_size=16, output_embedding_size=48)
    with pytest.raises(ExitWith, match=r"100\.0% of the logits that our head makes differ from transformers'"):
        training_of(for_all_linear(config, write(tmp_path / "base", shape)), Accelerator(cpu=True))


@pytest.mark.fault("T30")
def test_caps_have_other_names(config: Config, tmp_path: Path) -> None:
    """RecurrentGemma's cap of its logits is trained with."""
    shape = T.RecurrentGemmaConfig(**SIZES, lru_width=64, attention_window_size=64, logits_soft_cap=5.0)
    training = training_of(for_all_linear(config, write(tmp_path / "base", shape)), Accelerator(cpu=True))
    assert training.model.head.cap == 5.0


@pytest.mark.fault("T30")
def test_noise_of_routers_is_told(config: Config, tmp_path: Path) -> None:
    """What makes a mixture's losses random."""
    sparse = {"num_local_experts": 2, "num_experts_per_tok": 1, "router_jitter_noise": 0.01, "input_jitter_noise": 0.0}
    folder = write(tmp_path / "base", T.PhimoeConfig(**SIZES, **sparse))
    words = replace(config.lora, target_modules=("q_proj", "v_proj"))
    about = training_of(replace(on(config, folder, "none"), lora=words), Accelerator(cpu=True)).model.about
    noise = "its routers have noise of their own, which acts while training: router_jitter_noise 0.01"
    assert about.notes == [noise]


def test_names_that_transformers_changes(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters that PEFT will look for under another name are told, as Laguna's mlp.shared_experts."""
    where = "train.models.stored.get_model_conversion_mapping"
    monkeypatch.setattr(where, lambda *_, **__: [WeightRenaming("mlp.down_projection", "mlp.down_proj")])
    assert not training_of(config, Accelerator(cpu=True)).model.about.notes
    monkeypatch.setattr(where, lambda *_, **__: [WeightRenaming("mlp.down_pro.", "mlp.down_projs")])
    (note,) = training_of(config, Accelerator(cpu=True)).model.about.notes
    assert note.startswith("PEFT itself, and what serves with it, will not find 2 of the adapters in final/")
    assert "(model.layers.0.mlp.down_proj)" in note
