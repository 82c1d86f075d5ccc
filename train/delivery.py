"""What is made of a run that is trained: final/, and the questions asked of it."""

import json

from rich.console import Console

from train.checkpoints.contents import step_of
from train.checkpoints.store import CheckpointStore
from train.data import Splits
from train.deliver.compare import as_rows, compare, show_answers
from train.deliver.final import publish_final, publish_model
from train.deliver.generation import Generator
from train.deliver.questions import questions_of
from train.early_stop import ValidationRecord
from train.models.fingerprint import content_fingerprint
from train.models.language_model import adapter_config, load_adapters
from train.models.shape import POSITIONS, trained_settings
from train.models.tokenizer import Tokenizer
from train.run.durable import write_atomically
from train.run.exits import ExitCode, ExitWith
from train.run.folder import RunFolder
from train.run.signals import StopRequest
from train.step import Training
from train.track.trackers import Trackers
from train.validation.material import Material


def chosen_for_final(training: Training, store: CheckpointStore, record: ValidationRecord, last: int) -> int:
    """The step whose weights become final/, by validate.final; where it is not the last, they are loaded.

    By `record` the last may be the best though it could not be saved. Raises ExitWith(NO_VALID_CHECKPOINT) where the
    best checkpoint is damaged.
    """
    if training.config.validate.final == "last" or (record.best_loss is not None and record.best_step == last):
        return last
    best = store.best()
    if best is None:
        print("no checkpoint has a validation loss on these samples, so final/ is made of the last step", flush=True)
        return last
    folder, loss = best
    lowest = f"with the lowest validation loss ({loss:.4f})"
    if record.best_loss is not None and record.best_loss < loss:
        lowest += f" of those saved: step {record.best_step} had {record.best_loss:.4f}, and has no checkpoint"
    elif step_of(folder) == last:
        return last
    try:
        chosen = store.load(folder)
    except ExitWith as damaged:
        raise ExitWith(damaged.code, f"{damaged.reason}; --validate.final last makes final/ of step {last}") from None
    print(f"final/ is made of step {step_of(folder)}, {lowest}", flush=True)
    load_adapters(training.model, chosen.adapters)
    return step_of(folder)


def publish(training: Training, tokenizer: Tokenizer, splits: Splits, step: int, fingerprint: object) -> None:
    """Publishes final/, with the base's fingerprint and the step; raises ExitWith(SAVE_FAILED) where it cannot."""
    final, end_token_ids = RunFolder.of(training.config).final, splits.training.prepared.statistics.end_token_ids
    model = training.model
    content = content_fingerprint(training.config)
    base = {**model.about.identity(), "fingerprint": fingerprint, "content": content, "step": step}
    if training.config.lora.trainable_tokens:  # what the reader gives to resize_token_embeddings
        base |= {"vocabulary": model.head.weight.shape[0]}
    if training.config.model.max_positions:
        base |= {POSITIONS: training.config.model.max_positions}
    try:
        if training.config.train.method == "full":
            settings = trained_settings(training.config.model)
            publish_model(final, model, tokenizer.backend, end_token_ids, base, settings)
        else:
            publish_final(final, training.parameters, adapter_config(model), tokenizer.backend, end_token_ids, base)
    except OSError as error:
        raise ExitWith(ExitCode.SAVE_FAILED, f"{final} could not be written: {error}") from None


def deliver(
    training: Training, splits: Splits, material: Material, trackers: Trackers, stop: StopRequest, step: int
) -> None:
    """Answers questions of the data without and with the adapters as they were after `step`.

    final/ stands, so nothing undoes the training: what fails here is ExitWith(DELIVERY_FAILED). A base that was trained
    whole is asked nothing: it cannot answer without.
    """
    trackers.rest()
    if training.config.train.method == "full":
        print("the base is gone, so no questions are asked")
        return
    try:
        ask(training, splits, material, trackers, stop, step)
    except ExitWith:
        raise
    except Exception as error:
        final, reason = RunFolder.of(training.config).final, f"{type(error).__name__}: {error}"
        raise ExitWith(
            ExitCode.DELIVERY_FAILED,
            f"training is finished and {final} is complete, but asking the questions failed: {reason}\n"
            "repeat the command to ask again, or with --compare.num_questions 0 to ask none",
        ) from error


def ask(
    training: Training, splits: Splits, material: Material, trackers: Trackers, stop: StopRequest, step: int
) -> None:
    """Answers trained, held-out and general questions; raises ExitWith(INTERRUPTED) when stopped."""
    config, folder, console = training.config, RunFolder.of(training.config), Console()
    tokenizer, end_token_ids = material.tokenizer, splits.training.prepared.statistics.end_token_ids
    generator = Generator(training.model, tokenizer, end_token_ids, config.compare.max_new_tokens)
    count = config.compare.num_questions
    data, validation = training.data, splits.validation
    visited = data.visited_samples(step)
    paths = config.data.path
    asked = [("trained", questions_of(data.samples, visited, tokenizer, count), folder.answers, paths)]
    if validation is not None:
        held_out = questions_of(validation.samples, range(len(validation.samples)), tokenizer, count)
        asked.append(("held out", held_out, folder.held_out_answers, config.data.validation_path or paths))
    asked.append(("general", list(material.general_questions), folder.general_answers, ()))
    for kind, questions, path, sources in asked:
        if not questions:
            continue
        console.print(f"asking {len(questions)} {kind} questions, without and with the adapters", highlight=False)
        answers = compare(generator, questions, stop.is_received)
        if stop.is_received():
            reason = f"stopped by {stop.received}; {folder.final} is complete; repeat the command to ask on"
            raise ExitWith(ExitCode.INTERRUPTED, reason)
        rows = as_rows(answers, sources)
        write_atomically(path, json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
        trackers.table(path.stem, rows)
        show_answers(console, f"{kind} questions", answers)
