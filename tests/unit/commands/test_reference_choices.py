"""What `handloop plan` says of the reference engine is what a run's banner says."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from tests.conftest import training_of
from tests.multimodal import write_multimodal
from tests.unit.test_assemble import FailingGpu, on_a_gpu
from train.assemble import fit_to_memory
from train.batching import LengthStatistics
from train.commands.forecast import forecast
from train.commands.reference_choices import choices_ahead
from train.config import Config, EngineConfig, MemoryConfig
from train.memory.cluster import Cluster
from train.memory.gpus import known_gpu
from train.memory.outlook import Outlook
from train.memory.reference import ReferencePlan, engine_lines
from train.run.exits import ExitWith


@pytest.mark.parametrize(("merge", "checkpointing"), [("auto", "none"), ("off", "full")])
def test_choices_on_the_reference_engine_are_the_banner_s(
    merge: Any, checkpointing: Any, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a run's banner says of rows and passes, `handloop plan` says before, in its words; of kernels, why not."""
    config = replace(
        config,
        model=replace(config.model, dtype="fp32"),
        engine=EngineConfig(kind="reference", liger="off"),
        batch=replace(config.batch, merge=merge),
        memory=MemoryConfig(checkpointing=checkpointing),
    )
    training = training_of(config, Accelerator(cpu=True))
    on_a_gpu(monkeypatch, FailingGpu(failures=0))
    rows = training.data.length_statistics()
    run = fit_to_memory(training, Outlook.of(config, torch.device("cpu"), rows, None))
    assert isinstance(run.plan, ReferencePlan)
    gpu = known_gpu("GTX-1050-Ti")
    assert gpu is not None
    told = choices_ahead(Outlook.on_gpu(config, gpu, rows, gpu.usable_bytes), gpu)
    assert [told[0], told[2]] == list(run.plan.choices)
    with pytest.raises(ExitWith) as refused:
        forecast(config, gpu, rows, None, Cluster(1, 1, 25.0))
    banner = engine_lines("engine.kind reference", [told[0], "transformers' own kernels: engine.liger off", told[2]])
    assert "\n".join(banner) in refused.value.reason


def test_choices_for_the_text_part_of_a_multimodal_base(config: Config, tmp_path: Path) -> None:
    """The class that loads it is that of its text part, as in a run."""
    base = write_multimodal(tmp_path / "base", "qwen3_vl")
    config = replace(config, model=replace(config.model, name_or_path=str(base)), engine=EngineConfig(kind="reference"))
    gpu = known_gpu("H100")
    assert gpu is not None
    outlook = Outlook.on_gpu(config, gpu, LengthStatistics((9,), 9, 0.0, 9.0), gpu.usable_bytes)
    assert choices_ahead(outlook, gpu)[0].startswith("rows")
