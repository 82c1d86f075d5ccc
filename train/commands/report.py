"""`handloop report`."""

from pathlib import Path

from data_tools.terminal import typed_path
from train.commands.folders import check_is_run
from train.commands.options import Options, print_document
from train.report.record import is_run, read_run
from train.run.durable import write_atomically
from train.run.exits import ExitCode, ExitWith
from train.run.folder import RunFolder


def main(words: list[str]) -> int:
    """Writes one page on a run, or on several beside each other."""
    own = Options("report", "Writes a page on a run, whatever its state, or on several beside each other.")
    own.usage = "handloop report RUN [RUN ...] [--output FILE.html] [--json]"
    own.epilog = "RUN is a run folder, such as runs/demo. The page loads nothing: it can be sent as it is."
    own.add_argument("runs", nargs="+", type=typed_path, metavar="RUN", help="a run folder; several are compared")
    own.add_argument(
        "--output",
        type=typed_path,
        metavar="FILE.html",
        help="default: in the run folder; to be given for several runs",
    )
    own.add_argument("--json", action="store_true", help="print where the page is, and its runs, as JSON")
    options = own.parse_args(words)
    folders = [_run_folder(path) for path in options.runs]
    if len(folders) > 1 and options.output is None:
        own.error("several runs share no folder for their page: --output FILE.html says where it goes")
    # imported here because it takes a moment, for which --help should not wait
    from train.report.page import page_of, page_of_several, render

    runs = [read_run(folder) for folder in folders]
    page = page_of(runs[0]) if len(runs) == 1 else page_of_several(runs)
    target = options.output or runs[0].folder.report
    try:
        write_atomically(target, render(page))
    except OSError as error:
        raise ExitWith(ExitCode.BAD_INPUT, f"{target}: {error.strerror}; --output FILE.html names another") from None
    if options.json:
        print_document({"page": str(target), "runs": [str(run.folder.path) for run in runs]})
    else:
        print(target)
    return 0


def _run_folder(path: Path) -> Path:
    """The folder, or that of the final/ that was named; raises ExitWith(BAD_INPUT) where there is no run."""
    if path == RunFolder(path.parent).final and is_run(path.parent):
        return path.parent
    if not is_run(path):
        check_is_run(path)  # which asks for more, so that it says here what the folder is instead
    return path
