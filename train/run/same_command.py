"""Whether all processes were given the same: compared by name, before they exchange what only equal ones can."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict

from accelerate import Accelerator

from train.config import Config
from train.run.exits import ExitCode, ExitWith
from train.run.processes import gathered, say
from train.run.versions import source_digest, versions

# names of places, of which the content is compared where it is read: a machine may have the same files elsewhere
PLACES = (
    *("model.name_or_path", "data.path", "data.validation_path", "data.chat_template", "lora.init_from"),
    *("validate.general_text", "run.dir"),
)
OF_THE_FIRST = ("track", "compare")  # sections of which the other processes make nothing


def differing(accelerator: Accelerator, values: Mapping[str, object]) -> list[str]:
    """The names whose values are not the same in all processes; all give the same names, and get the same answer."""
    if accelerator.num_processes == 1:
        return []
    digests = [hashlib.sha256(repr(value).encode()).digest()[:6] for value in values.values()]
    found = gathered(accelerator, list(map(int.from_bytes, digests)))  # exact in fp64
    return [name for name, numbers in zip(values, zip(*found, strict=True), strict=True) if len(set(numbers)) > 1]


def check_same_command(config: Config, accelerator: Accelerator) -> None:
    """Raises ExitWith(BAD_INPUT) in all processes unless all have the same code and options; says other versions.

    Another option, such as validate.every, would let processes exchange what does not belong together, or take samples
    that another one has as well.
    """
    if accelerator.num_processes == 1:
        return
    options = compared(config)
    if differing(accelerator, {"code": (source_digest(), list(options))}):
        reason = "the processes do not run the same code; give each machine the same version of Handloop"
        raise ExitWith(ExitCode.BAD_INPUT, reason)
    if names := differing(accelerator, options):
        told = ", ".join(f"--{name}" for name in names)
        reason = f"the processes were not given the same options: {told}; start each with the same command"
        raise ExitWith(ExitCode.BAD_INPUT, reason)
    if names := differing(accelerator, versions()):
        say(accelerator, f"versions  {', '.join(names)} differ between processes, so the last bits may, too")


def compared(config: Config) -> dict[str, object]:
    """The options that have to be the same in all processes; of a mirror whether there is one."""
    sections = {name: values for name, values in asdict(config).items() if isinstance(values, dict)}
    options = {f"{section}.{name}": value for section, values in sections.items() for name, value in values.items()}
    found: dict[str, object] = {
        name: value
        for name, value in options.items()
        if name not in PLACES and name.partition(".")[0] not in OF_THE_FIRST
    }
    resume = config.run.resume
    found["run.resume"] = resume if resume in ("auto", "must", "never") else "a checkpoint"
    found["checkpoint.mirror"] = bool(config.checkpoint.mirror)
    return found
