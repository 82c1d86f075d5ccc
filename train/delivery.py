"""What is made of a run that is trained: final/, and the questions asked of it."""

import json

from rich.console import Console

from train.data import Splits
from train.deliver.compare import as_rows, compare, show_answers
from train.deliver.final import publish_final, publish_model
from train.deliver.generation import Generator
from train.deliver.questions import questions_of
from train.models.fingerprint import content_fingerprint
from train.models.language_model import adapter_config
from train.models.tokenizer import Tokenizer
from train.run.durable import write_atomically
from train.run.exits import ExitCode, ExitWith
from train.run.folder import RunFolder
from train.run.signals import StopRequest
from train.step import Training
from train.track.trackers import Trackers


def publish(training: Training, tokenizer: Tokenizer, splits: Splits, fingerprint: str) -> None:
    """Publishes final/, with the base's fingerprint; raises ExitWith(SAVE_FAILED) where it cannot be written."""
    final, end_token_ids = RunFolder.of(training.config).final, splits.training.prepared.statistics.end_token_ids
    model, prints = training.model, {"fingerprint": fingerprint, "content": content_fingerprint(training.config)}
    base = model.about.identity() | prints
    if training.config.lora.trainable_tokens:  # what the reader gives to resize_token_embeddings
        base |= {"vocabulary": model.head.weight.shape[0]}
    try:
        if training.config.train.method == "full":
            publish_model(final, model, tokenizer.backend, end_token_ids, base)
        else:
            publish_final(final, training.parameters, adapter_config(model), tokenizer.backend, end_token_ids, base)
    except OSError as error:
        raise ExitWith(ExitCode.SAVE_FAILED, f"{final} could not be written: {error}") from None


def deliver(training: Training, tokenizer: Tokenizer, splits: Splits, trackers: Trackers, stop: StopRequest) -> None:
    """Answers questions of the data without and with the adapters.

    final/ stands, so nothing undoes the training: what fails here is ExitWith(DELIVERY_FAILED). A base that was trained
    whole is asked nothing: it cannot answer without.
    """
    trackers.rest()
    if training.config.train.method == "full":
        print("the base is gone, so no questions are asked")
        return
    try:
        ask(training, tokenizer, splits, trackers, stop)
    except ExitWith:
        raise
    except Exception as error:
        final, reason = RunFolder.of(training.config).final, f"{type(error).__name__}: {error}"
        raise ExitWith(
            ExitCode.DELIVERY_FAILED,
            f"training is finished and {final} is complete, but asking the questions failed: {reason}\n"
            "repeat the command to ask again, or with --compare.num_questions 0 to ask none",
        ) from error


def ask(training: Training, tokenizer: Tokenizer, splits: Splits, trackers: Trackers, stop: StopRequest) -> None:
    """Answers questions of the trained and of the held-out samples; raises ExitWith(INTERRUPTED) when stopped."""
    config, folder, console = training.config, RunFolder.of(training.config), Console()
    end_token_ids = splits.training.prepared.statistics.end_token_ids
    generator = Generator(training.model, tokenizer.backend, end_token_ids, config.compare.max_new_tokens)
    count = config.compare.num_questions
    data, validation = training.data, splits.validation
    visited = data.visited_samples(training.total_steps)
    asked = [("trained", questions_of(data.samples, visited, tokenizer.backend, count), folder.answers)]
    if validation is not None:
        held_out = questions_of(validation.samples, range(len(validation.samples)), tokenizer.backend, count)
        asked.append(("held out", held_out, folder.held_out_answers))
    for kind, questions, path in asked:
        if not questions:
            continue
        console.print(f"asking {len(questions)} {kind} questions, without and with the adapters", highlight=False)
        answers = compare(generator, questions, stop.is_received)
        if stop.is_received():
            reason = f"stopped by {stop.received}; {folder.final} is complete; repeat the command to ask on"
            raise ExitWith(ExitCode.INTERRUPTED, reason)
        rows = as_rows(answers)
        write_atomically(path, json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
        trackers.table(path.stem, rows)
        show_answers(console, f"{kind} questions", answers)
