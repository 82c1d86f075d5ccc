"""Trains adapters: `accelerate launch train/main.py --profile NAME [--section.field VALUE ...]`."""

import gc
import json
import sys
from pathlib import Path

STOP = None
if __name__ == "__main__":  # before the imports below, which take seconds
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this folder's code, whatever is installed
    from train.begin import begin

    STOP = begin(sys.argv[1:])

from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, field, replace
from datetime import date

from accelerate import Accelerator

from data_tools.prepare import Prepared
from data_tools.terminal import fitted, seen_from_here
from train.assemble import assemble
from train.attempt_record import record_start
from train.audit_gate import counts, enforce_gate, run_audit
from train.banner import banner
from train.checkpoints.contents import Checkpoint
from train.checkpoints.copier import Copier
from train.checkpoints.elastic import kept_batch
from train.checkpoints.extension import resumed_schedule
from train.checkpoints.identity import identity
from train.checkpoints.mirror import Mirror, mirror_of, start_date
from train.checkpoints.resume import check_same_everywhere, check_same_run, choose, restore, saved_shape
from train.checkpoints.saver import Saver, check_disk
from train.checkpoints.store import CheckpointStore
from train.cli import checked, parse
from train.config import Config
from train.data import Splits, TrainingData, read_data, run_date
from train.delivery import chosen_for_final, deliver, publish
from train.ending import end_of, record_end, unrecorded_defect
from train.finished_before import was_finished
from train.layout import BatchLayout, asked_for
from train.learning_rate import Schedule
from train.loop import Boundary, training_loop
from train.models.tokenizer import Tokenizer, check_fits, load_tokenizer
from train.run.accelerator import check_training, close_group, start_accelerator
from train.run.attempts import AttemptLog
from train.run.defects import Doing
from train.run.durable import write_atomically
from train.run.environment import is_first_process
from train.run.exits import ExitCode, ExitWith
from train.run.folder import RunFolder
from train.run.hub_token import take_token
from train.run.last_words import say_end
from train.run.processes import Heartbeat, on_first_process, raise_if_stopped, say
from train.run.signals import StopRequest, leave_note, tell_launcher
from train.step import Training
from train.track.display import Display
from train.track.isolated import Isolated, Listener, Row
from train.track.metrics_file import MetricsFile
from train.track.trackers import Trackers, wanted_listeners
from train.validation.material import material_of
from train.validation.validator import Validator


def main(argv: list[str], stop: StopRequest | None = None) -> ExitCode:
    """Runs the job that `argv` describes; one message and exit.json say how it ended."""
    stop, doing = stop or StopRequest(), Doing()
    try:
        end = attempt(lambda: parse(argv), stop, doing, argv)
    except SystemExit:  # --help
        leave_note(0)
        raise
    say_end(end)
    return end.code


@dataclass(frozen=True)
class Outcome:
    """A run that ended well: finished, or saved because it was asked to stop."""

    folder: Path
    is_finished: bool
    reason: str


def run(config: Config, watch: Callable[[Row], None] | None = None, stop: StopRequest | None = None) -> Outcome:
    """Runs the job from a script or a notebook, or goes on with it: the same run.dir resumes, as on the command line.

    `watch` is called with each step's row of metrics.jsonl; one that raises is left out, and training goes on.
    `stop.request(WHO)`, from `watch` or another thread, and Ctrl-C in the main thread, save and end the run. Every
    other end raises ExitWith, with its code and reason; the process goes on, with its own signal handlers.
    """
    stop = stop or StopRequest(listens=False)
    with stop.listening():
        end = attempt(lambda: checked(config), stop, Doing(), ["train.main.run"], watch)
    if end.code not in (ExitCode.FINISHED, ExitCode.INTERRUPTED):
        raise end
    return Outcome(Path(config.run.dir), end.code == ExitCode.FINISHED, end.reason)


def attempt(
    read: Callable[[], Config],
    stop: StopRequest,
    doing: Doing,
    words: list[str],
    watch: Callable[[Row], None] | None = None,
) -> ExitWith:
    """Runs the job that `read` returns, with its folder locked; returns how it ended, which is then recorded there."""
    try:
        take_token()
        config = read()
        doing.now = "checking the machine"
        folder = RunFolder.of(config)
        with folder.locked() if is_first_process() else nullcontext(), ExitStack() as closing:
            if is_first_process():
                tell_launcher(config.run.dir, config.run.timeout_minutes)
            log = AttemptLog(folder)
            observed = Observed(stop, doing, log, closing, watch)
            end = end_of(lambda: job(config, observed), config, doing, words)
            # before the trackers are closed: a killed job may not have the seconds that this takes
            record_end(end, doing, folder, log)
        return end
    except ExitWith as refused:  # the configuration cannot be used, or another job has the run folder
        return refused
    except Exception as error:  # before there is a run folder, or behind the last word in it
        return unrecorded_defect(error, doing, words)


@dataclass(frozen=True)
class Observed:
    """Who may stop a run, and who is told about it."""

    stop: StopRequest
    doing: Doing
    log: AttemptLog
    closing: ExitStack  # what is closed at the end
    watch: Callable[[Row], None] | None
    audit: list[Row] = field(default_factory=list)  # what it counted; kept in the run folder once training begins


def job(config: Config, observed: Observed) -> str:
    """The job from data files to final/; returns why it ended early, or nothing; raises ExitWith or DataError."""
    stop, doing, closing = observed.stop, observed.doing, observed.closing
    check_training(config)
    listeners, folder, mirror = wanted_listeners(config), RunFolder.of(config), mirror_of(config)
    doing.now = "loading the tokenizer"
    tokenizer = load_tokenizer(config)
    check_fits(config, tokenizer.backend)
    doing.now = "reading the data"
    today = run_date(config, start_date(mirror, folder, config.run.resume))
    splits = read_data(config, tokenizer.backend, today)
    prepared, material = splits.training.prepared, material_of(config, tokenizer.backend, splits, today)
    doing.now = "starting the processes"
    closing.callback(close_group, together=False)
    accelerator = start_accelerator(config)
    doing.now = "choosing the checkpoint"
    store = CheckpointStore(folder, config.checkpoint.keep, material.fingerprint)
    checkpoint = choose(store, config, accelerator, mirror)
    heartbeat = Heartbeat(config, accelerator, stop)  # an earlier run has been set aside now, with its own
    asked = asked_for(config.batch)
    config = replace(config, batch=kept_batch(checkpoint, config.batch, accelerator))
    layout = BatchLayout.of(config.batch, accelerator, asked)
    data = TrainingData(splits.training.samples, config, layout, tokenizer.backend.pad_token_id)
    run_identity = identity(config, prepared, data, accelerator.device)
    check_same_everywhere(run_identity | {"validation data": material.content}, accelerator)
    schedule = schedule_of(checkpoint, config, data, run_identity, accelerator)
    if checkpoint is not None and (early := was_finished(config, checkpoint, data, accelerator)) is not None:
        return early
    if checkpoint is None:
        doing.now = "auditing the data"
        on_first_process(accelerator, lambda: report_audit(config, tokenizer, data, splits, observed))
    raise_if_stopped(config, accelerator, stop)
    doing.now = "loading the base"
    say(accelerator, f"loading {seen_from_here(config.model.name_or_path)}")
    saved = saved_shape(checkpoint, data, config.batch.merge)
    training = replace(assemble(config, accelerator, data, saved, material.longest), schedule=schedule)
    if checkpoint is not None:
        doing.now = f"restoring {checkpoint.path.name}"
        restore(training, checkpoint)
    doing.now = "preparing the first step"
    say(accelerator, banner(training, tokenizer, splits, checkpoint))
    on_first_process(accelerator, lambda: check_folder(training, store, prepared, today, mirror))
    raise_if_stopped(config, accelerator, stop)

    trackers = open_trackers(training, store, checkpoint, listeners, observed)
    closing.callback(trackers.finish)
    on_first_process(accelerator, lambda: begin_record(observed, training, prepared, checkpoint))
    trackers.tell_about(folder)
    saver = Saver.of(training, store, run_identity, trackers, checkpoint)
    copy_to(mirror, saver, observed)
    validator = Validator.of(training, material, saver.record, heartbeat)
    last = training_loop(Boundary(training, heartbeat, trackers, saver, validator, doing))
    doing.now = "publishing final/"
    close_group(together=True)
    if accelerator.is_main_process:
        step = chosen_for_final(training, store, saver.record, last)
        publish(training, tokenizer, splits, step, run_identity["model.base"])
        doing.now = "asking the questions"
        deliver(training, splits, material, trackers, stop, step)
    return validator.reason_to_end(last)


def schedule_of(
    checkpoint: Checkpoint | None,
    config: Config,
    data: TrainingData,
    run_identity: dict[str, object],
    accelerator: Accelerator,
) -> Schedule:
    """The learning rates of a fresh run, or of the one that the checkpoint is of; another run's is refused."""
    if checkpoint is None:
        return Schedule.of(config.optim, data.total_steps(config.train))
    check_same_run(checkpoint, run_identity, config, accelerator)
    return resumed_schedule(checkpoint, config, data)


def check_folder(
    training: Training, store: CheckpointStore, prepared: Prepared, today: date, mirror: Mirror | None
) -> int:
    """Looks whether checkpoints will fit, and keeps the date that templates see, if they ask for one."""
    check_disk(training, store)
    if mirror is not None:
        say(
            training.accelerator,
            f"mirror    {mirror.url}: checkpoints are copied there; {store.keep} and the best stay",
        )
    if prepared.statistics.date:
        store.folder.keep_start_date(today)  # which a resumed run is to see again
    return 0


def copy_to(mirror: Mirror | None, saver: Saver, observed: Observed) -> None:
    """Copies the run's checkpoints from now on; at its end, whatever that is, it waits for the last and says so."""
    if not saver.training.accelerator.is_main_process:
        return
    saver.store.folder.mirror.unlink(missing_ok=True)  # an earlier attempt's
    if mirror is None:
        return
    saver.copies = Copier(mirror, saver.store, saver.saved if saver.is_current else 0)

    def finish() -> None:
        if told := saver.finish_copies(observed.stop, is_stopping=False):
            say(saver.training.accelerator, f"mirror    {told}")

    observed.closing.callback(finish)


def report_audit(config: Config, tokenizer: Tokenizer, data: TrainingData, splits: Splits, observed: Observed) -> int:
    """Prints the audit's warnings; raises ExitWith(BAD_INPUT) if the data must not be trained on."""
    found = run_audit(config, tokenizer.backend, data, splits)
    for line in enforce_gate(config, found):
        print(fitted(f"data      {line}"), flush=True)
    observed.audit.extend(counts(found))
    return 0


def begin_record(observed: Observed, training: Training, prepared: Prepared, checkpoint: Checkpoint | None) -> int:
    """Writes down what begins: the attempt, and what a fresh run's audit has counted."""
    record_start(observed.log, training, prepared, checkpoint)
    if observed.audit:
        with suppress(OSError):  # trackers are told of it; a full disk is said where it matters
            lines = "".join(json.dumps(line) + "\n" for line in observed.audit)
            write_atomically(RunFolder.of(training.config).audit, lines)
    return 0


def open_trackers(
    training: Training,
    store: CheckpointStore,
    checkpoint: Checkpoint | None,
    listeners: list[Listener],
    observed: Observed,
) -> Trackers:
    """Everyone who is told about the run; only the first process tells anyone."""
    if not training.accelerator.is_main_process:
        return Trackers()
    folder = store.folder
    is_own = checkpoint is not None and store.holds(checkpoint)
    metrics = MetricsFile(folder.metrics, checkpoint.state.metrics_bytes if checkpoint and is_own else 0)
    shown = checkpoint.state.step - bool(checkpoint.state.unlogged) if checkpoint else 0
    display = Display.of(training, shown, observed.stop.is_received)
    for line in (note for listener in listeners for note in listener.notes):
        say(training.accelerator, line)
    kept = checkpoint.state.answers_bytes if checkpoint and is_own else 0
    answers = MetricsFile(folder.validation_answers, kept)
    isolated = [Isolated(listener, store.run_uid(), folder.metrics, answers.path) for listener in listeners]
    return Trackers(metrics, display, isolated, observed.watch, answers)


if __name__ == "__main__":
    gc.freeze()  # half a million objects of packages, which each collection would look through
    sys.exit(main(sys.argv[1:], STOP))
