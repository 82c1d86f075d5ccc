"""What a folder is that a command was given instead of a run, and which command it goes to."""

import shlex
from pathlib import Path

from train.bundled import script
from train.run.exits import ExitCode, ExitWith
from train.run.folder import RunFolder, read_object

SHOWN = 5  # runs in a folder that are named


def check_is_run(path: Path) -> None:
    """Raises ExitWith(BAD_INPUT) unless this is a run folder or its final/; it says what it is, and who takes it."""
    if is_run(path) or (path.name == RunFolder(path).final.name and is_run(path.parent)):
        return
    if not path.exists():
        reason = "no such folder; name a run folder, such as runs/demo"
    else:
        reason = f"it is no run folder{_what(path)}"
    raise ExitWith(ExitCode.BAD_INPUT, f"{path}: {reason}")


def is_run(path: Path) -> bool:
    """Whether a run has left its configuration here."""
    folder = RunFolder(path)
    return folder.config.is_file() and not folder.is_foreign(folder.config)


def _what(path: Path) -> str:
    """What it is instead, as the rest of a sentence."""
    quoted = shlex.quote(str(path))
    its_run = next((folder for folder in path.resolve().parents[:2] if is_run(folder)), None)
    where = f"its run is {its_run}" if its_run else "name the run that it was made of"
    serve = script("serve_vllm.sh")
    if path.suffix == ".gguf" or any(path.glob("*.gguf")):
        ours = script("serve_llama_cpp.sh")
        served = f"{ours} {quoted} serves it" if ours else "llama.cpp's llama-server serves it"
        return f", but an export for llama.cpp: {served}; {where}"
    if (path / "adapter_config.json").is_file():
        served = f"{serve} {quoted} serves it; " if serve else ""
        return f", but an adapter alone: {served}{where}"
    if "model_type" in read_object(RunFolder(path).config):  # a model's has the same name
        served = f", or {serve} {quoted}" if serve else ""
        return f", but a model: handloop chat {quoted}{served}; {where}"
    if runs := sorted(each.name for each in path.glob("*/") if is_run(each)):
        more = ", ..." if len(runs) > SHOWN else ""
        return f", but holds runs: name one of {', '.join(str(path / name) for name in runs[:SHOWN])}{more}"
    return ": it has no config.json of a run; name one, such as runs/demo"
