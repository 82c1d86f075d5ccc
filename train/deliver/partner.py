"""Who is talked to: the model of a finished run, or a model without a run, with what its prompts need."""

from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from data_tools.prompts import PromptRenderer
from train.config import Config, LoraConfig
from train.data import prepare_settings, run_date
from train.deliver.finished import FinishedRun, device_of, inference_plan, load_tuned, today_of
from train.models.hub import locate
from train.models.language_model import LanguageModel, load_model
from train.models.shape import max_positions, model_shape, text_shape
from train.models.tokenizer import load_tokenizer
from train.run.accelerator import check_machine
from train.run.attempts import last_start
from train.run.exits import ExitCode, ExitWith


@dataclass(frozen=True)
class Partner:
    """A loaded model, and how its prompts are rendered."""

    config: Config
    model: LanguageModel
    tokenizer: Any
    end_token_ids: tuple[int, ...]
    prompts: PromptRenderer
    has_adapters: bool
    num_empty_reasonings: int | None  # in what the run trained on; None: there is no run

    @property
    def context(self) -> int:
        """Tokens that the model takes at most; 0 where config.json says no number."""
        return max_positions(self.config.model)


def partner_of_run(run: FinishedRun) -> Partner:
    """The run's model with its adapters; raises ExitWith(BAD_INPUT) as load_tuned does."""
    tuned = load_tuned(run)
    data = last_start(run.folder).get("data")
    counted = data.get("num_empty_reasonings") if isinstance(data, dict) else None
    prompts = _prompts(run.config, tuned.tokenizer, today_of(run))
    return Partner(run.config, tuned.model, tuned.tokenizer, tuned.end_token_ids, prompts, True, counted)


def with_stored_quantization(config: Config) -> Config:
    """The configuration of a model without a run: as its files hold the weights, and adapters of no effect.

    LanguageModel always has adapters; these are as small as can be and stay zero.
    """
    shape: Any = model_shape(config.model)
    stored = (
        getattr(shape, "quantization_config", None) or getattr(text_shape(shape), "quantization_config", None) or {}
    )
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    kind: Any = "nf4" if stored.get("load_in_4bit") else "int8" if stored.get("load_in_8bit") else "none"
    model = replace(config.model, quantization=kind)
    return replace(config, model=model, lora=LoraConfig(r=1, target_modules=("all-linear",)))


def partner_of_model(config: Config) -> Partner:
    """The model that the configuration names; raises ExitWith(BAD_INPUT) where it cannot be loaded or asked."""
    check_machine(config)
    tokenizer: Any = load_tokenizer(config).backend
    device = device_of(config)
    prompts = _prompts(config, tokenizer, run_date(config, date.today()))
    try:
        ends = {prompts.end_token()}
    except ValueError as error:
        raise ExitWith(ExitCode.BAD_INPUT, f"{config.model.name_or_path}: {error}") from None
    ends |= _own_ends(locate(config.model).folder)
    model = load_model(config, device, inference_plan(config, device))
    return Partner(config, model, tokenizer, tuple(sorted(ends)), prompts, False, None)


def _own_ends(folder: Path) -> set[int]:
    """The end tokens in a model's generation_config.json; none where it has no such file."""
    try:
        found: Any = GenerationConfig.from_pretrained(str(folder)).eos_token_id
    except (OSError, ValueError, TypeError):
        return set()
    return set(found) if isinstance(found, list) else set() if found is None else {int(found)}


def _prompts(config: Config, tokenizer: Any, today: date) -> PromptRenderer:
    return PromptRenderer(tokenizer, prepare_settings(config, (), today).render)
