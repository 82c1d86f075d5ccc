"""What is called so anyway: each key for its own values alone, and all others told with a reason."""

from pathlib import Path

import pytest

from tests.unit.commands.test_import_config import translated
from train.foreign.reasons import ANYWAY, why

# key: values with which it is so here anyway, and with which it is not
VALUES: dict[str, tuple[tuple[object, ...], tuple[object, ...]]] = {
    "adam_beta1": ((0.9, "0.9"), (0.999, 1e-8)),
    "adam_beta2": ((0.999,), (0.9, 1e-8)),
    "adam_epsilon": ((1e-8, "1e-8"), (0.9, 1)),
    "task_type": (("CAUSAL_LM", "causal_lm", "TaskType.CAUSAL_LM"), ("SEQ_CLS", "TaskType.SEQ_2_SEQ_LM")),
    "peft_type": (("LORA", "PeftType.LORA"), ("IA3", "XLORA")),
    "fan_in_fan_out": ((False,), (True,)),
    "lora_fan_in_fan_out": (("false",), ("true",)),
    "bias": (("none",), ("all", "lora_only", True)),
    "lora_bias": ((False,), (True,)),
    "stage": (("sft",), ("dpo", "pt", True)),
    "metric_for_best_model": (("eval_loss", "loss"), ("accuracy", True)),
    "greater_is_better": ((False,), (True, "loss")),
    "bnb_4bit_quant_type": (("nf4",), ("fp4", "bnb")),
    "quantization_method": (("bnb", "QuantizationMethod.BNB"), ("hqq", "nf4")),
    "packing_strategy": (("bfd",), ("wrapped", "bfd_split")),
    "train_on_eos": (("turn",), ("all", "last")),
    "roles_to_train": ((["assistant"], ["gpt", "assistant"], "assistant"), ("all", ["user", "assistant"], True)),
    "plugins": (
        (["axolotl.integrations.liger.LigerPlugin", "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"],),
        (["axolotl.integrations.liger.LigerPlugin", "axolotl.integrations.kd.KDPlugin"], {"a": 1}),
    ),
    "s2_attention": ((False,), (True,)),
    "shift_attn": ((False,), (True,)),
    "dataloader_drop_last": ((False,), (True,)),
    "skip_prepare_dataset": ((False,), (True,)),
    "tokenized_path": ((False,), ("saved",)),
    "accelerator_config": (({"split_batches": False, "even_batches": True},), ({"split_batches": True},)),
    "ignore_data_skip": ((False,), (True,)),
    "eval_delay": ((0, "0"), (100,)),
    "model_type": (("LlamaForCausalLM", "AutoModelForCausalLM", "llama"), ("AutoModelForSequenceClassification",)),
    "use_fast_tokenizer": ((True,), (False,)),
    "wandb_mode": (("online",), ("disabled", "offline")),
    "wandb_log_model": (("false",), ("checkpoint", "end")),
    "loss_watchdog_threshold": ((), (5.0,)),
}


@pytest.mark.parametrize("name", VALUES)
def test_each_key_has_values_of_its_own(name: str) -> None:
    """Those of another key are not its own, and a value that is not so is told with a reason, also where it is off."""
    so, otherwise = VALUES[name]
    for value in so:
        reason = why(name, value)
        assert reason, value
        assert reason.is_so_anyway, value
        assert reason.text
    for value in otherwise:
        reason = why(name, value)
        assert reason, value
        assert not reason.is_so_anyway, value
        assert reason.text, value


def test_every_row_says_something() -> None:
    """A row that does not hold for all values has words for the others."""
    rows = [row for row in ANYWAY if row[1].__name__ != "_always"]
    assert len(rows) > 20
    assert [pattern for pattern, _, so, otherwise in rows if not (so and otherwise)] == []


def test_an_adapter_of_another_task(tmp_path: Path) -> None:
    """It is told, as are layers that are stored the other way."""
    text = '{"peft_type": "LORA", "task_type": "SEQ_CLS", "fan_in_fan_out": true, "inference_mode": true}'
    _, result = translated(tmp_path, text, "adapter_config.json")
    assert [key for key, *_ in result.missing] == ["task_type", "fan_in_fan_out"]
    assert [key for key, _ in result.anyway] == ["peft_type", "inference_mode"]
