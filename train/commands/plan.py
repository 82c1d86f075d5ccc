"""`handloop plan`: what a run needs and how long it takes, from config.json, and the data where they are here."""

import argparse
import contextlib
import sys
from dataclasses import replace

from train.commands.options import Options, positive_number, print_document
from train.config import Config
from train.profiles import for_card
from train.run.exits import ExitCode, ExitWith

DEFAULT_STEPS = 5
DEFAULT_LINK = 25  # Gbit/s, as clouds give to machines with GPUs


def main(words: list[str]) -> int:
    """Prints what a run needs and how fast it would be; returns 78 where it does not fit."""
    own = _options()
    options, rest = own.parse_known_args(words)
    config = own.config([*_chosen_profile(options, rest), *rest])
    _check(options, config)
    # imported here because it takes seconds, for which --help and a misspelt option should not wait
    from train.layout import arranged
    from train.models.text_part import note_on
    from train.models.tokenizer import check_length

    check_length(config)
    config = replace(config, batch=arranged(config.batch, num_processes=options.gpus * options.nodes))
    for note in note_on(config.model):
        print(f"base      {note}", file=sys.stderr if options.json else sys.stdout)
    if options.probe:
        return _probe(options, config, options.mean_length or config.data.max_length)
    return _forecast(options, config)


def _chosen_profile(options: argparse.Namespace, rest: list[str]) -> list[str]:
    """A profile by the memory of the GPU that is named, where none is given; it is said which."""
    names = {word.lstrip("-").partition("=")[0] for word in rest if word.startswith("-")}
    if options.gpu is None or {"profile", "h", "help"} & names:
        return []
    from train.commands.forecast import parse_gpu

    gpu = parse_gpu(options.gpu)
    name = for_card(gpu.memory_bytes, options.gpus * options.nodes)
    said = f"profile   {name}, by the memory of {gpu.name}, since none is given; --profile NAME takes another recipe"
    print(said, file=sys.stderr if options.json else sys.stdout)
    return ["--profile", name]


def _options() -> Options:
    own = Options(
        "plan",
        "Says what a run needs, how fast it would be and how long it would take. Of the base config.json is enough; "
        "with its tokenizer the data are counted, too.",
    )
    own.add_argument("--gpu", metavar="GPU", help="a GPU, such as A100-40, or a size, such as 4GiB")
    own.add_argument(
        "--gpus", type=positive_number, default=1, metavar="N", help="so many of them in a machine (default 1)"
    )
    own.add_argument("--nodes", type=positive_number, default=1, metavar="M", help="so many machines (default 1)")
    own.add_argument(
        "--link", type=positive_number, metavar="GBIT", help=f"Gbit/s between machines (default {DEFAULT_LINK})"
    )
    own.add_argument(
        "--mean-length",
        type=positive_number,
        metavar="N",
        help="mean tokens of a row; without it those of data.path, or data.max_length where they are not here",
    )
    own.add_argument("--probe", action="store_true", help="run steps on random weights here, and compare")
    own.add_argument(
        "--steps", type=positive_number, metavar="K", help=f"steps that a probe measures (default {DEFAULT_STEPS})"
    )
    own.add_argument("--json", action="store_true", help="print one JSON object")
    return own


def _check(options: argparse.Namespace, config: Config) -> None:
    """Raises ExitWith(BAD_INPUT) where options contradict one another."""
    problem = ""
    if options.mean_length and options.mean_length > config.data.max_length:
        problem = f"--mean-length {options.mean_length}: rows hold at most data.max_length = {config.data.max_length}"
    elif options.probe and options.gpu is not None:
        problem = f"--gpu {options.gpu}: a probe runs on the GPU that is here; leave it out"
    elif options.probe and max(options.gpus, options.nodes) > 1:
        problem = f"--gpus {options.gpus} --nodes {options.nodes}: a probe runs on one GPU; leave them out"
    elif options.link and options.nodes == 1:
        problem = f"--link {options.link}: what is between machines, and there is one; give --nodes M, or leave it out"
    elif options.nodes > 1 and options.gpus % config.batch.context_parallel:
        problem = (
            f"--gpus {options.gpus} with --batch.context_parallel {config.batch.context_parallel}: the GPUs that share "
            "a row are in one machine; write a divisor of --gpus"
        )
    elif options.steps and not options.probe:
        problem = f"--steps {options.steps}: only --probe runs steps; write both or neither"
    if problem:
        raise ExitWith(ExitCode.BAD_INPUT, problem)


def _probe(options: argparse.Namespace, config: Config, mean_length: int) -> int:
    from train.commands import probe

    # with --json standard output is one JSON object; what is said while loading goes to standard error
    with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
        measured = probe.probe(config, mean_length, options.steps or DEFAULT_STEPS)
    if options.json:
        print_document(measured)
    else:
        print(probe.format_probe(measured))
    return 0


def _forecast(options: argparse.Namespace, config: Config) -> int:
    from rich.console import Console

    from train.commands import forecast, forecast_text
    from train.commands.planned_rows import planned_rows
    from train.memory.cluster import Cluster

    cluster = Cluster(options.gpus, options.nodes, float(options.link or DEFAULT_LINK))
    gpu = forecast.default_gpu(config) if options.gpu is None else forecast.parse_gpu(options.gpu)
    rows = planned_rows(config, options.mean_length, cluster)
    num_steps = rows.counted.full_steps if rows.counted else None
    found = forecast.forecast(config, gpu, rows.lengths, num_steps, cluster) if gpu else None
    is_asked_for_all = options.json or options.gpu is None
    known = forecast.forecast_known_gpus(config, rows.lengths, num_steps, cluster) if is_asked_for_all else []
    if options.json:
        others = {"data": rows.as_json(), "gpus": [each.as_json() for each in known]}
        print_document((found.as_json() if found else {}) | others)
    else:
        for line in rows.said:
            Console().print(line, highlight=False, soft_wrap=True, markup=False)
        if found:
            forecast_text.print_forecast(found, Console())
        if known:
            forecast_text.print_known_gpus(known, Console())
    fits = found.fits if found else any(each.fits for each in known)
    return 0 if fits else int(ExitCode.BAD_INPUT)
