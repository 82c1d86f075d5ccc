"""`handloop plan` for the two models that the profiles name, from config.json alone."""

import re
from pathlib import Path

import pytest

from train.commands.handloop import main


def test_both_models_fit_into_4_gib(capsys: pytest.CaptureFixture, llama31_8b: Path, tinyllama_1b: Path) -> None:
    """TinyLlama with nothing streamed, an 8B by streaming; in 2 GiB the 8B is refused with 78 and TinyLlama is not."""

    def forecast(profile: str, base: Path, size: str) -> tuple[int, bool]:
        """The exit code, and whether weights are streamed because they would not fit."""
        code = main(["plan", "--profile", profile, "--model.name_or_path", str(base), "--gpu", size])
        text = " ".join(capsys.readouterr().out.split())
        return code, bool(re.search(r"\d+ blocks' weights are streamed from host memory(?!, which is faster)", text))

    assert forecast("4gb", tinyllama_1b, "4GiB") == (0, False)
    assert forecast("4gb", tinyllama_1b, "2GiB") == (0, False)
    assert forecast("a100", llama31_8b, "4GiB") == (0, True)
    assert forecast("a100", llama31_8b, "2GiB")[0] == 78
