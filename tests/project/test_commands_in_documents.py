"""Every command that README, CONTRIBUTING and docs/ show is executed with small stand-ins, or marked with why not."""

import contextlib
import functools
import importlib.util
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from launch.serving import make_command
from tests.conftest import BUNDLED_BASE, ROOT, run_command
from tests.project.documents import BLOCKS, COMMANDS, DOCUMENTS, OTHERS, SHELL, Block, Command, blocks
from train.cli import parse
from train.commands.handloop import COMMANDS as TOOLS
from train.commands.handloop import main
from train.deliver import receipt
from train.profiles import PROFILES

# What the documents name and another branch brings; to be taken out of here when it is there, which a test demands.
SERVERS = {f"launch/serve_{name}.sh": name for name in ("vllm", "sglang", "llama_cpp", "ollama")}
FOREIGN = {"docker", "mkdir", "pip", "pipx", "pre-commit"}  # other people's commands: looked at by the shell alone
UNKNOWN = "--no-such.option"
# in the place of what takes long: a command's option and a small value
SHORT = {"--num": "2", "--max-new-tokens": "8", "--loss-tokens": "300"}
SHORT_RUN = {"--run.device": "cpu", "--train.max_steps": "1", "--compare.num_questions": "1", "--track.wandb": "off"}
SHORT_RUN |= {"--compare.max_new_tokens": "8", "--validate.num_questions": "0"}
SHORT_RUN |= {"--validate.at_start": "false", "--validate.general_text": "off"}
# models that the documents name; each is the bundled base, in the folder of that name
MODELS = ("meta-llama/Llama-3.1-8B", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "SmolLM2-135M-Instruct")
MODELS += ("runs/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct", "MERGED_FOLDER")
TRAINED: list[list[str]] = []  # what has ended with 0; several documents show the same
RUNS = ("glossary", "gsm8k", "demo", "a", "b")


def training_of(words: Sequence[str]) -> list[str] | None:
    """The words of train/main.py that a command trains with, or None where it does not train."""
    if words[0] == "bash" and (match := re.fullmatch(r"launch/(\w+)\.sh", words[1])) and match[1] in PROFILES:
        given = [word for word in words[2:] if word != "--tiny"]
        return ["--profile", match[1], *given]
    if words[:2] == ["handloop", "train"]:
        return list(words[2:])
    if words[0] == "sbatch":
        return list(words[words.index("launch/slurm.sbatch") + 1 :])
    if words[0] in ("accelerate", "python") and "train/main.py" in words:
        return list(words[words.index("train/main.py") + 1 :])
    return None


def problems_of(text: str) -> list[str]:
    """What is wrong with a block's commands by the parsers that would read them; for commands that are not executed."""
    words = shlex.split(text, comments=True)
    while re.match(r"[A-Z_]+=", words[0]):  # variables of the command
        words = words[1:]
    if (training := training_of(words)) is not None:
        with contextlib.suppress(SystemExit):  # --help and --print-config
            parse(training)
        return []
    if words[0] == "handloop":
        return tool_problems(words[1:])
    if words[0] == "docker" and words[1] == "run":
        return image_problems(words[words.index("handloop") + 1 :])
    if words[0] == "bash":
        return [] if subprocess.run(["bash", "-n", ROOT / words[1]], check=False).returncode == 0 else [f"{words[1]}"]
    if words[:2] == ["python", "-m"]:
        return [] if importlib.util.find_spec(words[2]) else [f"there is no module {words[2]}"]
    if words[0] in FOREIGN:
        checked = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
        return checked.stderr.splitlines()
    return [f"nothing here reads {words[0]}"]


def tool_problems(words: Sequence[str]) -> list[str]:
    """What a command's own parser says beside the option that it cannot know, before which it does nothing."""
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
        code = main([*words, UNKNOWN])
    said = told.getvalue()
    wrong = re.findall(
        r"--?[\w.-]+(?=: (?:no such|invalid))|(?<=unrecognized arguments: ).*|.*(?:expected|required).*", said
    )
    others = [word for words in wrong for word in words.split() if word != UNKNOWN]
    return others if code == 78 and UNKNOWN in said else [f"{' '.join(words)}: not refused for {UNKNOWN}: {said}"]


def image_problems(words: Sequence[str]) -> list[str]:
    """The words behind the image's name: nothing, a profile with options, or a command."""
    if not words:
        return []
    return problems_of(" ".join([f"bash launch/{words[0]}.sh", *words[1:]] if words[0] in PROFILES else words))


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the documents' commands name: data, models, and runs, one of which has really been."""
    folder = tmp_path_factory.mktemp("workplace")
    for name in ("train", "accelerate_configs", "demo"):
        (folder / name).symlink_to(ROOT / name)
    for name in MODELS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(BUNDLED_BASE)
    qwen3 = folder / "Qwen" / "Qwen3-1.7B"
    shutil.copytree(BUNDLED_BASE, qwen3)
    with (qwen3 / "chat_template.jinja").open("a", encoding="utf-8") as template:
        template.write("{% if enable_thinking %}{% endif %}")  # read as by Qwen3's, without an effect
    rows = (BUNDLED_BASE.parent / "glossary.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "pairs.jsonl").write_text("".join(rows[:24]), encoding="utf-8")
    (folder / "mine.txt").write_text("What does AOG mean?\n", encoding="utf-8")
    terms = (BUNDLED_BASE.parent / "glossary.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "terms.csv").write_text("".join(terms[:9]), encoding="utf-8")
    (folder / "config.yml").write_text("base_model: TinyLlama/TinyLlama-1.1B-Chat-v1.0\nadapter: lora\nnum_epochs: 2\n")
    (folder / "training_args.json").write_text('{"learning_rate": 2e-4, "num_train_epochs": 2}\n')
    (folder / "reports").mkdir()
    for number in range(2):
        (folder / "reports" / f"{number}.txt").write_text("A report about a part that failed. " * 40, encoding="utf-8")
    words = ["--profile", "a100", "--data.path", "pairs.jsonl", "--data.validation_fraction", "0.2"]
    assert train(words, folder, "runs/a100") == (0, "")
    for name in RUNS:
        shutil.copytree(folder / "runs/a100", folder / "runs" / name)
    return folder


def train(words: Sequence[str], folder: Path, run_dir: str = "") -> tuple[int | None, str]:
    """Exit code and, unless it is 0, what was said, of train/main.py in `folder`: a step on the CPU."""
    if "--run.dir" in words:
        place = words.index("--run.dir")
        words = [*words[:place], *words[place + 2 :]]
    number = len(list(folder.glob("runs/new-*")))  # a folder of its own: some commands train what another has trained
    added = {**SHORT_RUN, "--run.dir": run_dir or f"runs/new-{number}"}
    words = [*words, *(word for name, value in added.items() if name not in words for word in (name, value))]
    outcome = run_command(words, functools.partial(os.chdir, folder), HANDLOOP_CACHE=str(folder / "cache"))
    return outcome.returncode, outcome.stderr if outcome.returncode else ""


def shortened(words: Sequence[str]) -> list[str]:
    """A command of handloop with less to ask, and without quantisation where llama.cpp, which does it, is missing."""
    found = [SHORT.get(before, word) for before, word in zip(["", *words], words, strict=False)]
    if "--quantize" in found and importlib.util.find_spec("llama_cpp") is None:
        start = found.index("--quantize")
        end = next((at for at in range(start + 1, len(found)) if found[at].startswith("--")), len(found))
        del found[start:end]
    wanted = {"compare": tuple(SHORT), "chat": ("--max-new-tokens",)}.get(found[0], ())
    found += [word for name in wanted if name not in found for word in (name, SHORT[name])]
    return found


def execute(command: Command, folder: Path) -> None:
    """Does what the command says; an AssertionError says what came of it instead."""
    words = command.words
    if (training := training_of(words)) is not None:
        if training not in TRAINED:
            assert train(training, folder) == (0, ""), command
            TRAINED.append(training)
    elif words[0] == "handloop" and words[1] in TOOLS:
        assert main(shortened(words[1:])) == 0, command
    elif words[0] == "bash" and words[1] in SERVERS:
        export = folder / "runs/a100/export"  # a server of GGUF files is not started, so none is read
        export.mkdir(exist_ok=True)
        for name in ("a100-F16.gguf", "Modelfile"):
            (export / name).write_text("FROM ./a100-F16.gguf\n")
        options = [word for word in words[2:] if word != "--dry-run"]
        served, _, _ = make_command([SERVERS[words[1]], *options, "--dry-run"])
        assert served, command
    else:
        pytest.fail(f"{command.where}: nothing here executes {command.text!r}; write <!-- not run: WHY --> before it")


EXECUTED = [block for block in BLOCKS if block.language in SHELL and block.reason is None]


@pytest.fixture
def here(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the workplace as the working directory, and receipts of a few rows."""
    folder = tmp_path / "here"
    shutil.copytree(workplace, folder, symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.stdin", io.StringIO("What does AOG mean?\n"))
    for name, value in (("MAX_ROWS", 4), ("NUM_QUESTIONS", 1), ("MAX_NEW_TOKENS", 8)):
        monkeypatch.setattr(receipt, name, value)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("block", EXECUTED, ids=lambda block: block.where)
def test_the_commands_work(block: Block, here: Path) -> None:
    """Each command that a document shows, and does not mark, ends with 0, in the block's order."""
    for command in COMMANDS:
        if command.where == block.where:
            execute(command, here)


def test_every_block_is_known_or_marked_with_a_reason() -> None:
    """A block is typed, of a known language, or says in words why it is not run; a marker stands before a block."""
    assert len(EXECUTED) > 15
    for block in BLOCKS:
        assert block.language in SHELL | OTHERS, f"{block.where}: the language {block.language!r}"
        assert block.reason is None or len(block.reason.split()) >= 3, f"{block.where}: says not why"
        assert block.reason is None or block.language in SHELL, f"{block.where}: only commands are marked"
    marked = sum(block.reason is not None for block in BLOCKS)
    pages = "\n".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    written = len(re.findall(r"^\s*<!-- not run", pages, re.MULTILINE))
    assert marked == written, "a marker that no block follows"


@pytest.mark.parametrize(
    "command", [command for command in COMMANDS if command.reason is not None], ids=lambda command: command.where
)
def test_what_is_not_run_is_read_by_its_parser(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """A marked command has options that there are, by its own parser; a script and a module exist."""
    monkeypatch.chdir(ROOT)
    assert problems_of(command.text) == []


def test_every_script_that_is_named_is_one() -> None:
    """Scripts in commands and texts of the documents exist and are read by bash, but for those that are to come."""
    named = {
        match for block in BLOCKS for match in re.findall(r"\b(?:launch|docker)/\w+\.sh\b", block.path.read_text())
    }
    assert len(named) > 8
    for name in named:
        subprocess.run(["bash", "-n", ROOT / name], check=True)


def test_what_is_neither_run_nor_marked_fails() -> None:
    """The collector joins lines, finds what is typed among output, and knows a marker, also one without a reason."""
    text = "a\n<!-- not run: needs a GPU -->\n\n```\nx \\\n  -y\n# note\n```\n"
    text += "<!-- not run: -->\n```console\n$ one\nout\n```\n```\nlast\n```\n"
    first, second, third = blocks(text, Path("page.md"))
    assert (first.reason, first.commands) == ("needs a GPU", ["x    -y"])
    assert (second.reason, second.commands) == ("", ["one"])
    assert (third.reason, third.commands) == (None, ["last"])
    for wrong, said in (
        ("handloop plan --profile a100 --gpus 4GiB", "--gpus"),
        ("handloop runs --jsno", "--jsno"),
        ("python -m benchmarks.nothing", "no module"),
        ("make", "nothing here reads"),
        ("pip install $(x", "unexpected"),
    ):
        assert any(said in problem for problem in problems_of(wrong)), wrong


@pytest.mark.slow
def test_python_in_documents(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Python blocks compile, and that of docs/DELIVER.md answers a question; docs/PYTHON.md's are run elsewhere."""
    found = {block.where: block for block in BLOCKS if block.language == "python"}
    for where, block in found.items():
        compile(block.text, where, "exec")
    (answered,) = [block for block in found.values() if block.path.name == "DELIVER.md"]
    (here / "answer.py").write_text(answered.text.replace("max_new_tokens = 256", "max_new_tokens = 8"))
    runpy.run_path(str(here / "answer.py"))
    assert capsys.readouterr().out.strip()
