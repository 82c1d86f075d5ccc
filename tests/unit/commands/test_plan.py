"""`handloop plan` for the two models that the profiles name, from config.json alone."""

import json
import re
from pathlib import Path

import pytest

from train.commands import probe
from train.commands.handloop import main


def test_both_models_fit_into_4_gib(capsys: pytest.CaptureFixture, llama31_8b: Path, tinyllama_1b: Path) -> None:
    """TinyLlama with nothing streamed, an 8B by streaming; in 2 GiB the 8B is refused with 78 and TinyLlama is not."""

    def forecast(profile: str, base: Path, size: str) -> tuple[int, bool]:
        """The exit code, and whether weights are streamed because they would not fit."""
        code = main(["plan", "--profile", profile, "--model.name_or_path", str(base), "--gpu", size])
        text = " ".join(capsys.readouterr().out.split())
        return code, bool(
            re.search(r"\d+ blocks' weights are streamed from host memory(?!, which is predicted to be faster)", text)
        )

    assert forecast("4gb", tinyllama_1b, "4GiB") == (0, False)
    assert forecast("4gb", tinyllama_1b, "2GiB") == (0, False)
    assert forecast("a100", llama31_8b, "4GiB") == (0, True)
    assert forecast("a100", llama31_8b, "2GiB")[0] == 78


def test_a_probe_s_json_is_all_that_is_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tinyllama_1b: Path
) -> None:
    """What a run says while it loads goes to standard error, so that a script can read standard output."""

    def measured(*_: object) -> dict[str, int]:
        print("engine    fused")
        return {"seconds": 1}

    monkeypatch.setattr(probe, "probe", measured)
    words = ["plan", "--profile", "4gb", "--model.name_or_path", str(tinyllama_1b), "--probe", "--json"]
    assert main(words) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"seconds": 1}
    assert printed.err == "engine    fused\n"
