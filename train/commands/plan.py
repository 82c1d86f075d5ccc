"""`handloop plan`: what a run needs, from config.json alone."""

import json

from rich.console import Console

from train.commands.options import Options, positive_number
from train.run.exits import ExitCode, ExitWith


def main(words: list[str]) -> int:
    """Says what a run needs, from config.json alone; 78 where it does not fit."""
    own = Options("plan", "Says what a run needs and how fast it would be, from the base's config.json alone.")
    own.add_argument("--gpu", metavar="CARD", help="a card, such as A100-40, or a size, such as 4GiB")
    own.add_argument(
        "--mean-length", type=positive_number, metavar="N", help="tokens of a row (default data.max_length)"
    )
    own.add_argument("--probe", action="store_true", help="run steps on random weights here, and compare")
    own.add_argument("--steps", type=positive_number, metavar="K", help="that a probe measures (default 5)")
    own.add_argument("--json", action="store_true", help="print one JSON object")
    options, rest = own.parse_known_args(words)
    from train.commands import forecast, probe
    from train.models.tokenizer import check_length

    config = own.config(rest)
    check_length(config)
    mean_length = options.mean_length or config.data.max_length
    if mean_length > config.data.max_length:
        raise ExitWith(ExitCode.BAD_INPUT, f"--mean-length {mean_length}: rows hold data.max_length at most")
    if options.probe and options.gpu is not None:
        raise ExitWith(ExitCode.BAD_INPUT, f"--gpu {options.gpu}: a probe runs on the GPU that is here; leave it out")
    if options.steps and not options.probe:
        raise ExitWith(ExitCode.BAD_INPUT, f"--steps {options.steps}: only --probe makes steps; write both or none")
    if options.probe:
        measured = probe.probe(config, mean_length, options.steps or 5)
        print(json.dumps(measured, indent=1) if options.json else probe.beside(measured))
        return 0
    card = forecast.default_card(config) if options.gpu is None else forecast.card_of(options.gpu)
    found = forecast.forecast(config, card, mean_length) if card else None
    # a card that is named is the one that is asked about
    others = forecast.forecasts(config, mean_length) if options.json or options.gpu is None else []
    if options.json:
        cards = {"cards": [each.as_json() for each in others]}
        print(json.dumps((found.as_json() if found else {}) | cards, indent=1))
    else:
        if found:
            forecast.show(found, Console())
        if others:
            forecast.show_known(others, Console())
    fits = found.fits if found else any(each.fits for each in others)
    return 0 if fits else int(ExitCode.BAD_INPUT)
