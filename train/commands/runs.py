"""`handloop runs`."""

from pathlib import Path

from data_tools.terminal import typed_path
from train.commands.options import Options, print_document, table_console
from train.report.record import is_run, read_run
from train.run.exits import ExitCode, ExitWith

RUNS = "runs"


def main(words: list[str]) -> int:
    """Lists the runs below folders; several run folders themselves are compared."""
    own = Options("runs", "Lists the runs at or below folders; two or more run folders are compared with each other.")
    own.usage = "handloop runs [FOLDER ...] [--json]"
    own.epilog = "loss: of the last step, and the lowest; eval best: the lowest validation loss; tokens/s: the median."
    own.add_argument("folders", nargs="*", type=typed_path, metavar="FOLDER", help=f"default {RUNS}/")
    own.add_argument("--json", action="store_true", help="print a JSON list instead, with what does not fit here")
    options = own.parse_args(words)
    folders = options.folders or [Path(RUNS)]
    for folder in folders:
        if not folder.is_dir():
            reason = (
                "no such folder" if options.folders else "there is none here; name the folder that your runs are in"
            )
            raise ExitWith(ExitCode.BAD_INPUT, f"{folder}: {reason}")
    # imported here because it takes a moment, for which --help should not wait
    from train.report.run_table import show_differences, show_runs
    from train.report.summary import read_runs, summary_of

    is_comparison = len(folders) > 1 and all(map(is_run, folders))
    runs = [(str(path), read_run(path)) for path in folders] if is_comparison else read_runs(folders)
    if options.json:
        print_document([summary_of(run, name).as_json() for name, run in runs])
    elif is_comparison:
        show_differences(table_console(), runs)
    elif runs:
        show_runs(table_console(), [summary_of(run, name) for name, run in runs])
    else:
        print(f"no runs in {', '.join(map(str, folders))}")
    return 0
