"""`handloop train`: accelerate launch with a profile's topology, exit codes and signals kept."""

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from data_tools.terminal import typed_path
from train.bundled import MAIN, bundled
from train.commands.options import Options, positive_number, print_document
from train.profiles import FOR_4_GB, HELD_OUT
from train.run.exits import ExitCode, ExitWith
from train.run.folder import RunFolder
from train.run.launcher import launch
from train.run.signals import listen

if TYPE_CHECKING:
    from train.config import Config

# what accelerate launch may be told beside the configuration file: where processes run, never the recipe
PASSED_ON = {
    "num_machines": "machines in all; the same command runs on each",
    "machine_rank": "which of them this is, from 0",
    "main_process_ip": "address of machine 0",
    "main_process_port": "port on machine 0; 0 takes a free one",
    "gpu_ids": "the GPUs of this machine to use, such as 0,1",
    "rdzv_backend": "how the machines find each other: static, c10d",
    "rdzv_conf": "settings of that, such as timeout=900",
    "num_cpu_threads_per_process": "OMP_NUM_THREADS of each process",
}
STDERR = 2


def main(words: list[str]) -> int:
    """Trains, or goes on with a run; returns the trainer's exit code."""
    before = listen(_stop_before_training)
    try:
        return _train(words)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop_before_training(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    raise ExitWith(ExitCode.INTERRUPTED, f"stopped by {name} before training began")


def _train(words: list[str]) -> int:
    own = _options()
    if {"-h", "--help"} & set(words) and len(words) > 1:
        own.config(words)  # prints the page on the recipe that is asked for
    options, rest = own.parse_known_args(words)
    config = own.config(rest)  # refused before accelerate is started, which takes seconds
    if config.profile in HELD_OUT and not any(word.startswith("--data.") for word in rest):
        rest += ["--data.validation_path", HELD_OUT[config.profile]]
    if "OMP_WAIT_POLICY" not in os.environ:  # as in launch/_common.sh, which says why
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    topology = _topology(options, config)
    code, reason = launch(["--quiet", *topology, str(MAIN), *rest], STDERR if options.json else None)
    if options.json:
        print_document(outcome(code, reason, RunFolder(Path(config.run.dir))))
    return code


def _options() -> Options:
    own = Options("train", "Trains with a profile; the same command again goes on with a run that was interrupted.")
    own.epilog = (
        "`handloop train --help all` lists the options of the recipe, with --profile NAME their values in this "
        "profile; --print-config prints them as JSON."
    )
    own.add_argument(
        "--config_file",
        type=typed_path,
        metavar="FILE",
        help="a configuration of accelerate; default: a bundled one for the device and the number of processes",
    )
    own.add_argument(
        "--num_processes",
        type=positive_number,
        metavar="N",
        help="processes on all machines, one a GPU; default 1, of the profile multi_gpu all GPUs of this machine",
    )
    for name, what in PASSED_ON.items():
        own.add_argument(f"--{name}", metavar="X", help=what)
    own.add_argument("--json", action="store_true", help="print how it ended as JSON; all else goes to stderr")
    return own


def _topology(options: argparse.Namespace, config: "Config") -> list[str]:
    """The arguments of accelerate launch; raises ExitWith(BAD_INPUT) where there is no such file, or too few GPUs."""
    words = [word for name in PASSED_ON if (value := getattr(options, name)) for word in (f"--{name}", value)]
    if options.config_file is not None:
        if not options.config_file.is_file():
            reason = f"--config_file {options.config_file}: there is no such file; `accelerate config` writes one"
            raise ExitWith(ExitCode.BAD_INPUT, f"{reason}, and without the option a bundled one is taken")
        count = options.num_processes
        return ["--config_file", str(options.config_file), *(("--num_processes", str(count)) if count else ()), *words]
    count = options.num_processes or (_count_gpus() if config.profile == "multi_gpu" else 1)
    file = bundled("accelerate_configs") / configuration_for(config, count)
    return ["--config_file", str(file), "--num_processes", str(count), *words]


def configuration_for(config: "Config", num_processes: int) -> str:
    """The bundled configuration of accelerate for a device and a number of processes."""
    if num_processes > 1:
        return "multi_gpu_ddp.yaml"
    if config.run.device == "cpu":
        return "cpu.yaml"
    return "single_4gb_cpu_offload.yaml" if config.profile in FOR_4_GB else "single_a100.yaml"


def _count_gpus() -> int:
    """The GPUs that torch finds, asked in another process, so that this one never holds one."""
    command = [sys.executable, "-P", "-c", "import torch; print(torch.cuda.device_count())"]
    count = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    if count < 2:
        reason = f"the profile multi_gpu needs two or more GPUs, and torch finds {count}; for one write --profile a100"
        raise ExitWith(ExitCode.BAD_INPUT, f"{reason}, or say --num_processes")
    return count


def outcome(code: int, reason: str, folder: RunFolder) -> dict[str, Any]:
    """How training ended, and what the run folder now says of the run."""
    # imported here because it takes a moment, for which nobody should wait before training
    from train.report.record import read_run
    from train.report.summary import summary_of

    told = summary_of(read_run(folder.path)).as_json()
    names = ("step", "total_steps", "loss_last", "loss_best", "eval_loss_best", "eval_loss_best_step", "seconds")
    names += ("tokens_per_second", "peak_reserved_gib", "num_attempts", "notes")
    is_complete = code in (ExitCode.FINISHED, ExitCode.DELIVERY_FAILED) and folder.final.is_dir()
    answers = folder.asked if is_complete else {}
    return {
        "code": int(code),
        "name": ExitCode(code).name.lower() if code in list(ExitCode) else "",
        "reason": reason,
        "run": str(folder.path.absolute()),
        **{name: told[name] for name in names},
        "final": str(folder.final.absolute()) if is_complete else None,
        "answers": {kind: counted for kind, path in answers.items() if (counted := _count_answers(path))},
    }


def _count_answers(path: Path) -> dict[str, int]:
    """Of the answers in a file, how many are right word for word, without the adapters and with them."""
    try:
        rows: Sequence[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none were asked, or the file is damaged
        return {}
    return {
        "total": len(rows),
        "exact_before": sum(bool(row.get("before_exact")) for row in rows),
        "contained_before": sum(bool(row.get("before_contained")) for row in rows),
        "contained_after": sum(bool(row.get("contained")) for row in rows),
        "exact_after": sum(bool(row.get("exact")) for row in rows),
        "ended_after": sum(bool(row.get("stopped")) for row in rows),
    }
