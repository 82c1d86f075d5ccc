"""Ways to tune that others offer and that do not pay in public comparisons; docs/TUNING.md has more of each.

PEFT's comparison: Llama-3.2-3B, MetaMathQA, accuracy on GSM8K +-1.4 points (huggingface/peft, method_comparison, July
2026). Lee et al. 2026 (arXiv 2602.04998): nine variants of LoRA after a search of learning rates.
"""

import re

PEFT = "in PEFT's comparison (GSM8K, +-1.4 points)"
LEE = "after a search of learning rates it is within 1 to 2 % of LoRA (Lee et al. 2026)"
# a pattern of an option's last part -> why there is no such option, and what to use
REASONS = {
    r"(use_)?q?dora": f"DoRA has 46.9 % {PEFT} where LoRA has 47.8, and takes 26 % longer; use lora.rslora",
    r"(use_)?pissa.*": f"PiSSA: {LEE}, and its adapter belongs to a changed base; use lora.rslora, and try rates",
    r"(use_)?(milora|olora|corda|eva|lora_ga)(_.*)?": "other starts of A and B: no gain is shown there once learning "
    "rates are searched for each (Lee et al. 2026); use lora.rslora, and try rates",
    r"init_lora_weights|init_weights|init": "adapters start as in PEFT, A at random and B as zeros; other starts bring "
    "1 to 2 % at most once learning rates are searched (Lee et al. 2026). lora.init_from continues an adapter",
    r"(use_)?loftq.*": "LoftQ is not in PEFT's comparison, and its adapter belongs to a changed base; where NF4 costs "
    "too much, model.quantization none trains on the base as it is",
    r"neft.*": "NEFTune: those who rebuilt it saw the same losses (neelsjain/NEFTune#1); use lora.dropout",
    r"(use_)?(adalora|vera|pvera|boft|oft|lora_?fa|loha|lokr|ia3|randlora)(_.*)?": "LoRA has 47.8 % "
    f"{PEFT}, LoRA-FA 40.4, AdaLoRA 37.3, VeRA 35.4, BOFT 34.3",
    r"(use_)?(galore|apollo|badam|lomo|muon|lion)(_.*)?": "made for what an optimizer keeps of whole models; that "
    "of adapters takes 0.1 to 1 GB, in 8 bits a quarter of that",
}


def reason_for(option: str) -> str:
    """Why there is no such option, where others offer it; else empty."""
    last = option.rpartition(".")[2].lower()
    return next((reason for pattern, reason in REASONS.items() if re.fullmatch(pattern, last)), "")
