"""What follows training, on a finished run: compared, merged both ways, exported, and asked through llama.cpp.

    python -m benchmarks.after_training runs/glossary [--base FOLDER] [--quantize Q8_0 Q4_K_M]

Prints each command and what it said, as Markdown, and adds the figures to results/after_training.json under the run's
name. Needs llama-cpp-python: .venv/bin/pip install -c constraints.txt -e '.[gguf]'
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from train.deliver.finished import data_of, finished_run, tokenizer_of
from train.deliver.questions import questions_of

RESULTS = Path(__file__).parent / "results" / "after_training.json"
NUM_ASKED = 32


def main() -> None:
    """Runs it all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--base", help="where the base is, if it has moved")
    parser.add_argument("--quantize", nargs="+", default=["Q8_0", "Q4_K_M"])
    options = parser.parse_args()
    keep_weights_unpacked()
    moved = ["--model.name_or_path", options.base] if options.base else []
    run, record = str(options.run), {}
    if not (options.run / "compare.json").exists():  # on a CPU it takes the longest
        said("compare", run, *moved, "--num", "24", "--max-new-tokens", "128")
    record["compare"] = json.loads((options.run / "compare.json").read_text())
    for group in record["compare"]["groups"].values():
        group.pop("answers", None)  # the rows themselves
    for onto in ("dequantized", "original"):
        if not (options.run / f"merged-{onto}").exists():
            said("merge", run, *moved, "--onto", onto)
        record[f"merge {onto}"] = json.loads((options.run / f"merged-{onto}" / "receipt.json").read_text())
        said(
            "export", run, *moved, "--onto", onto, "--format", "ollama", "--quantize", *options.quantize, "--overwrite"
        )
        record[f"export {onto}"] = json.loads((options.run / "export" / "receipts.json").read_text())["files"]
        found = sorted((options.run / "export").glob("*.gguf"))
        record[f"asked {onto}"] = {path.name: asked(options.run, moved, path) for path in found}
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(known | {options.run.name: record}, indent=1) + "\n")


def said(*words: str) -> None:
    """Runs a handloop command, and prints it with what it said, without where this project lies."""
    command = [sys.executable, "-c", "import sys; from train.commands.handloop import main; sys.exit(main())", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    text = done.stdout.replace(f"{Path.cwd()}/", "").rstrip()
    print(f"```\n$ handloop {' '.join(words)}\n{text}\n```\n", flush=True)
    if done.returncode:
        raise SystemExit(done.returncode)


def keep_weights_unpacked() -> None:
    """Makes llama-cpp-python load weights as our runner does: repacked for AMX they crash some virtual machines."""
    import llama_cpp

    api: Any = llama_cpp.llama_cpp
    defaults = api.llama_model_default_params

    def without_repacking() -> Any:
        settings = defaults()
        settings.use_extra_bufts = False
        return settings

    api.llama_model_default_params = without_repacking


def asked(folder: Path, options: list[str], path: Path) -> dict[str, Any]:
    """Held-out questions put to llama.cpp as its users put them: as messages, by the template inside the file."""
    import llama_cpp

    run = finished_run(folder, options)
    validation = data_of(run)[0].validation
    assert validation is not None, "the run holds nothing out"
    questions = questions_of(validation.samples, range(len(validation.samples)), tokenizer_of(run.folder)[0], NUM_ASKED)
    model: Any = llama_cpp.Llama(str(path), n_ctx=1024, verbose=False)
    exact = stopped = 0
    for number, question in enumerate(questions):
        messages = [{"role": "user", "content": question.text}]
        choice = model.create_chat_completion(messages, temperature=0.0, max_tokens=160)["choices"][0]
        answer = choice["message"]["content"].strip()
        exact += answer == question.reference
        stopped += choice["finish_reason"] == "stop"
        if number < 2:
            print(f"{path.name}, llama.cpp: {question.text} **{answer}**\n", flush=True)
    print(
        f"{path.name}: {exact} of {len(questions)} held-out answers exact, {stopped} ended by themselves\n", flush=True
    )
    return {"questions": len(questions), "exact": exact, "stopped": stopped}


if __name__ == "__main__":
    main()
