"""The claims of docs/SECURITY.md: no foreign code is executed, no data controls the terminal, packages are pinned."""

import ast
import builtins
import io
import json
import os
import re
import shutil
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from data_tools import render
from data_tools.prepare import PrepareSettings, cache_root, prepare
from data_tools.readers import HubData
from data_tools.records import DataError, Report, find_sources, read_records
from launch.lock import pins
from tests.conftest import BUNDLED_BASE, ROOT, tokenizer_at, write_shape
from train.cli import parse
from train.commands.handloop import main as command
from train.config import Config, MemoryConfig, ModelConfig
from train.deliver.compare import Answer, show_answers
from train.engine.plan import reference_plan
from train.models.base import model_shape
from train.models.fingerprint import base_fingerprint
from train.models.language_model import load_model
from train.models.tokenizer import load_tokenizer
from train.run.durable import publish
from train.run.exits import ExitCode, ExitWith
from train.run.redact import redact

PLAN = reference_plan(1, MemoryConfig())
SOURCES = sorted(p for folder in ("train", "data_tools", "benchmarks", "demo") for p in (ROOT / folder).rglob("*.py"))
GOOD = '{"prompt": "What is AOG?", "response": "Aircraft on ground."}\n'

# Modules that unpickle or execute their input, with all their submodules.
BANNED_MODULES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "runpy"}
BANNED_MODULES |= {f"torch.{part}" for part in ("jit", "hub", "package", "serialization", "distributed.checkpoint")}
BANNED_NAMES = {"torch.load", "torch.save", "os.system", "os.popen", "numpy.load"}
BANNED_NAMES |= {f"yaml.{name}" for name in ("load", "load_all", "full_load", "unsafe_load", "Loader", "UnsafeLoader")}
BANNED_NAMES |= {f"builtins.{name}" for name in ("eval", "exec", "compile", "__import__")}
# last parts of names: accelerate's checkpoints, and collectives that pickle
BANNED_SUFFIXES = (
    "save_state",
    "load_state",
    "register_for_checkpointing",
    "to_pickle",
    "read_pickle",
    "add_safe_globals",
)
OBJECT_COLLECTIVE = re.compile(r"(broadcast|gather|scatter|send|recv|all_gather)_object(_list)?")
MUST_BE_FALSE = ("shell", "trust_remote_code", "allow_pickle", "use_gather_object")


def imported(tree: ast.Module) -> list[tuple[int, str, str]]:
    """(line, local name, full name) of every import."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.asname or alias.name, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.lineno, alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def full_name(node: ast.AST, aliases: dict[str, str]) -> str:
    """The full name of `a.b.c`, whatever alias it was imported under."""
    if isinstance(node, ast.Attribute):
        return f"{full_name(node.value, aliases)}.{node.attr}"
    if isinstance(node, ast.Name):
        return aliases.get(node.id, f"builtins.{node.id}" if hasattr(builtins, node.id) else f"?{node.id}")
    return "?"


def is_banned(name: str) -> bool:
    """Whether this full name unpickles or executes; our own functions may share names with accelerate's."""
    end = name.rpartition(".")[2]
    if name.startswith(("train.", "data_tools.")):
        return False
    of_module = any(name == module or name.startswith(f"{module}.") for module in BANNED_MODULES)
    return of_module or name in BANNED_NAMES or end in BANNED_SUFFIXES or bool(OBJECT_COLLECTIVE.fullmatch(end))


def is_unsafe_option(node: ast.AST, aliases: dict[str, str]) -> bool:
    """Whether an option that must be False may be something else, or getattr fetches a function from a module."""
    if isinstance(node, ast.keyword) and node.arg in MUST_BE_FALSE:
        return not (isinstance(node.value, ast.Constant) and node.value.value is False)
    if isinstance(node, ast.Constant):
        return node.value in MUST_BE_FALSE[1:]
    is_getattr = isinstance(node, ast.Call) and full_name(node.func, aliases) == "builtins.getattr"
    return is_getattr and isinstance(node.args[0], ast.Name) and node.args[0].id in aliases


def offences(source: str) -> list[str]:
    """The lines of a source that could execute what they read."""
    tree = ast.parse(source)
    imports = imported(tree)
    aliases = {local: name for _, local, name in imports if "." not in local}
    aliases |= {local.partition(".")[0]: local.partition(".")[0] for _, local, _ in imports if "." in local}
    found = [f"line {line}: {name}" for line, _, name in imports if is_banned(name)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and is_banned(full_name(node, aliases)):
            found.append(f"line {node.lineno}: {full_name(node, aliases)}")
        elif is_unsafe_option(node, aliases):
            found.append(f"line {getattr(node, 'lineno', 0)}: {ast.unparse(node)}")
    return found


EVASIONS = (
    "import pickle",
    "from pickle import loads as read",
    "import torch as t\nt.load('x')",
    "from torch import load\nload('x')",
    "from torch import save as keep",
    "import torch.distributed.checkpoint as dcp",
    "from torch.distributed import checkpoint",
    "from torch.jit import load",
    "import numpy as np\nnp.load('x', allow_pickle=True)",
    "import torch\ngetattr(torch, 'lo' + 'ad')('x')",
    "from yaml import load, Loader",
    "import yaml as y\ny.unsafe_load('x')",
    "eval('1')",
    "run = exec",
    "__import__('pickle')",
    "import subprocess\nsubprocess.run('ls', shell=True)",
    "import subprocess\nsubprocess.run('ls', shell=option)",
    "import os\nos.system('ls')",
    "AutoModel.from_pretrained('x', trust_remote_code=option)",
    "AutoModel.from_pretrained('x', **{'trust_remote_code': True})",
    "from accelerate.utils import broadcast_object_list as tell",
    "import torch.distributed as dist\ndist.all_gather_object(a, b)",
    "accelerator.gather_for_metrics(x, use_gather_object=True)",
    "accelerator.save_state('x')",
    "import marshal, shelve",
    "def f():\n    from joblib import load",
)
HARMLESS = (
    "from safetensors.torch import load, save\nload(b'')",
    "import safetensors.torch\nsafetensors.torch.load(b'')",
    "model.eval()",
    "AutoModel.from_pretrained('x', trust_remote_code=False)",
    "import json, yaml\nyaml.compose('x')\njson.load(file)",
    "import re\nre.compile('x')",
    "wrap(tokenizer_object=tokenizer)",
)


def test_nothing_unpickles_or_runs_foreign_code() -> None:
    """No source has pickle under any name, eval, a shell, remote code or object collectives."""
    assert len(SOURCES) > 40
    found = {str(path.relative_to(ROOT)): offences(path.read_text(encoding="utf-8")) for path in SOURCES}
    assert {path: what for path, what in found.items() if what} == {}


@pytest.mark.parametrize("source", EVASIONS)
def test_the_scan_finds(source: str) -> None:
    """The scan finds each of these evasions."""
    assert offences(source)


@pytest.mark.parametrize("source", HARMLESS)
def test_the_scan_lets_pass(source: str) -> None:
    """The scan accepts harmless code that looks similar."""
    assert offences(source) == []


def test_every_load_of_a_base_forbids_its_code_and_its_pickles() -> None:
    """Each from_pretrained has trust_remote_code=False, and those of weights also use_safetensors=True."""
    calls = []
    for path in (p for p in SOURCES if p.relative_to(ROOT).parts[0] in ("train", "data_tools", "benchmarks", "demo")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "from_pretrained"
                and ast.unparse(node.func.value) != "GenerationConfig"  # reads only a JSON file
            ):
                given = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
                assert given.get("trust_remote_code") is False, f"{path.name}:{node.lineno}"
                if "Model" in ast.unparse(node.func):
                    assert given.get("use_safetensors") is True, f"{path.name}:{node.lineno}"
                calls.append(ast.unparse(node.func))
    assert {"AutoTokenizer.from_pretrained", "AutoModelForCausalLM.from_pretrained"} <= set(calls)


def test_no_option_trusts_code_or_takes_a_secret() -> None:
    """`--model.trust_remote_code` and `--model.hub_token` do not exist, and their refusal does not print the secret."""
    secret = "hf_" + "a1B2" * 8
    for option in ("--model.trust_remote_code true", f"--model.hub_token {secret}", f"--track.api_key={secret}"):
        with pytest.raises(ExitWith, match="no such option") as caught:
            parse(["--profile", "demo", *option.split()])
        assert caught.value.code == ExitCode.BAD_INPUT
        assert secret not in caught.value.reason
    sections = {name: fields for name, fields in vars(parse(["--profile", "demo"])).items() if name != "profile"}
    names = [f"{section}.{name}" for section, fields in sections.items() for name in vars(fields)]
    assert len(names) > 30
    assert not [name for name in names if re.search(r"trust|remote|secret|password|(token|key)$", name)]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A complete base folder with a tiny Llama."""
    folder = tmp_path / "base"
    shutil.copytree(BUNDLED_BASE, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    write_shape(folder, json.loads((BUNDLED_BASE / "config.json").read_text())["vocab_size"])
    LlamaForCausalLM(LlamaConfig.from_pretrained(folder)).save_pretrained(folder)
    return folder


def on(config: Config, folder: Path) -> Config:
    """The configuration with this base."""
    return replace(config, model=ModelConfig(name_or_path=str(folder), quantization="none"))


def test_a_base_of_pickles_alone_is_refused(config: Config, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base with pytorch_model.bin and no safetensors is 78, and torch.load is not called."""
    calls: list[object] = []
    torch.save({"w": torch.zeros(1)}, base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    monkeypatch.setattr(torch, "load", lambda *given, **options: calls.append(given))
    with pytest.raises(ExitWith, match=r"cannot read safetensors weights.*\n.*\*\.safetensors") as caught:
        load_model(on(config, base), torch.device("cpu"), PLAN)
    assert caught.value.code == ExitCode.BAD_INPUT
    assert not calls


@pytest.mark.parametrize("named", ["pytorch_model.bin", "../other.safetensors", 7])
def test_an_index_names_safetensors_alone(
    named: object, config: Config, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would follow an index to any file; one that names anything but safetensors beside it is 78."""
    calls: list[object] = []
    torch.save({"w": torch.zeros(1)}, base / "pytorch_model.bin")
    (base / "model.safetensors").rename(base.parent / "other.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": named}}))
    monkeypatch.setattr(torch, "load", lambda *given, **options: calls.append(given))
    with pytest.raises(ExitWith, match=r"model\.safetensors\.index\.json") as caught:
        load_model(on(config, base), torch.device("cpu"), PLAN)
    assert caught.value.code == ExitCode.BAD_INPUT
    assert not calls


def test_a_base_cannot_name_a_kernel(config: Config, base: Path) -> None:
    """With `kernels` installed, transformers would fetch a binary from the hub and run it."""
    edit(base / "config.json", _attn_implementation="somebody/kernel")
    with pytest.raises(ExitWith, match="names the attention kernel 'somebody/kernel' of the hub"):
        load_model(on(config, base), torch.device("cpu"), PLAN)


BROKEN_BASES = {
    "weights": {"model.safetensors": b"\xff" * 100},
    "weights cut off": {"model.safetensors": (2**20).to_bytes(8, "little") + b"{"},
    "a list": {"config.json": b"[]"},
    "a wrong type": {"config.json": b'{"model_type": "llama", "vocab_size": "x"}'},
}


@pytest.mark.parametrize("name", BROKEN_BASES)
def test_a_broken_base_is_refused_in_one_message(name: str, config: Config, base: Path) -> None:
    """Damaged weights and a broken config.json are 78 from everything that reads them."""
    for file, content in BROKEN_BASES[name].items():
        (base / file).write_bytes(content)
    for read in (base_fingerprint, lambda c: load_model(c, torch.device("cpu"), PLAN)):
        with pytest.raises(ExitWith, match="cannot read") as caught:
            read(on(config, base))
        assert caught.value.code == ExitCode.BAD_INPUT


def edit(path: Path, **changes: object) -> None:
    """Changes fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("model_type", ["llama", "unheard_of"])
def test_code_in_a_base_is_never_executed(model_type: str, config: Config, base: Path) -> None:
    """With classes of evil.py in auto_map, a known type loads without them, and an unknown one is 78."""
    canary = base / "canary"
    (base / "evil.py").write_text(
        f"open({str(canary)!r}, 'w')\nfrom transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class C(LlamaConfig): pass\nclass M(LlamaForCausalLM): pass\nclass T(PreTrainedTokenizerFast): pass\n"
    )
    classes = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", "evil.T"]}
    edit(base / "config.json", auto_map=classes, model_type=model_type)
    if model_type != "llama":
        edit(base / "tokenizer_config.json", tokenizer_class="T")
    edit(base / "tokenizer_config.json", auto_map=classes)
    if model_type == "llama":
        load_tokenizer(on(config, base))
        assert isinstance(
            load_model(on(config, base), torch.device("cpu"), PLAN).adapted.get_base_model(), LlamaForCausalLM
        )
    else:
        for load in (load_tokenizer, lambda c: model_shape(c.model)):
            with pytest.raises(ExitWith, match="custom code") as caught:
                load(on(config, base))
            assert caught.value.code == ExitCode.BAD_INPUT
    assert not canary.exists()


TEMPLATES = {
    "globals": "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "function": "{{ lipsum.__globals__['os'].system('touch CANARY') }}",
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "format": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "change": "{{ messages.append(1) }}",
    "file": "{% include '/etc/passwd' %}",
    "range": "{% for i in range(10 ** 9) %}x{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "division": "{{ 1 / 0 }}",
    "large": "{{ 'x' * 200000 }}",
}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A file with two good rows."""
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD * 2)
    return path


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_template_stays_in_the_sandbox(
    name: str, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A template reaches no Python attribute, file or process, and its error names the row."""
    monkeypatch.setattr(render, "MAX_RENDERED_CHARACTERS", 100_000)
    tokenizer = tokenizer_at()
    canary = tmp_path / "canary"
    tokenizer.chat_template = TEMPLATES[name].replace("CANARY", str(canary))
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the chat template (refuses this|renders 200,000 char)"):
        prepare(PrepareSettings((str(rows),)), tokenizer)
    assert not canary.exists()


def test_a_chat_template_that_does_not_end_is_stopped(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nested loops end at the first row by the time limit, even with on_error skip."""
    monkeypatch.setattr(render, "MAX_TEMPLATE_SECONDS", 0.2)
    tokenizer = tokenizer_at()
    tokenizer.chat_template = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the chat template did not end within 0\.2 s"):
        prepare(PrepareSettings((str(rows),), on_error="skip"), tokenizer)


def test_scripts_in_data_are_never_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set with a script owner/name/name.py is read as a folder of rows, and refused as a hub data set."""
    folder, canary = tmp_path / "owner" / "name", tmp_path / "canary"
    folder.mkdir(parents=True)
    (folder / "name.py").write_text(f"open({str(canary)!r}, 'w')\n")
    (folder / "data.jsonl").write_text(GOOD)
    report = Report()
    assert len(list(read_records(find_sources([str(folder)], "auto"), report))) == 1
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert list(HubData("owner/name").rows(report.add)) == []
    assert "scripts are no longer supported" in report.lines[0]
    assert not canary.exists()


def test_a_folder_does_not_lead_out_of_itself(tmp_path: Path) -> None:
    """A link to a file outside the folder is refused; a link within it is read."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "private.txt").write_text("a key")
    (folder / "one.txt").write_text("a text")
    (folder / "two.txt").symlink_to(folder / "one.txt")
    assert len(find_sources([str(folder)], "auto")) == 2
    (folder / "three.txt").symlink_to(tmp_path / "private.txt")
    with pytest.raises(DataError, match=r"1 problem(.|\n)*three\.txt: is a link to a file outside the folder"):
        find_sources([str(folder)], "auto")


def test_checkpoints_and_prepared_data_are_for_their_owner_alone(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders of checkpoints, final/ and the cache are 0700 under any umask."""
    before = os.umask(0)
    try:
        monkeypatch.setenv("HANDLOOP_CACHE", str(tmp_path / "cache"))
        with publish(tmp_path / "checkpoints" / "step-0000000001") as folder:
            (folder / "file").touch()
        prepared = prepare(PrepareSettings((str(rows),)), tokenizer_at())
    finally:
        os.umask(before)
    for folder in (tmp_path / "checkpoints" / "step-0000000001", cache_root() / prepared.fingerprint):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700, folder


def test_a_damaged_cache_is_made_again(rows: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache that is truncated, has other columns or is not JSON is replaced by the same samples."""
    monkeypatch.setenv("HANDLOOP_CACHE", str(tmp_path / "cache"))
    settings, tokenizer = PrepareSettings((str(rows),)), tokenizer_at()
    prepared = prepare(settings, tokenizer)
    content, folder = prepared.dataset.to_list(), cache_root() / prepared.fingerprint
    other = tmp_path / "other"
    datasets.Dataset.from_dict({"path": ["/etc/passwd"] * 2}).save_to_disk(str(other))
    samples = (folder / "samples.arrow").read_bytes()
    damages: dict[str, bytes] = {"samples.arrow": samples[: len(samples) // 2], "statistics.json": b"[]"}
    for name, damage in (*damages.items(), ("samples.arrow", next(other.glob("*.arrow")).read_bytes())):
        (folder / name).write_bytes(damage)
        assert prepare(settings, tokenizer).dataset.to_list() == content


TITLE, CLEAR, C1, TURN = "\x1b]0;owned\x07", "\x1b[2J", "\x9b31m", "\u202e"
HOSTILE = TITLE + CLEAR + C1 + TURN
HOSTILE_FILES: dict[str, Any] = {
    "content": {"prompt": f"why {HOSTILE}", "response": f"because {HOSTILE}"},
    "field names": {f"q{HOSTILE}": "a", f"r{HOSTILE}": "b"},
    "an unread field": {"prompt": "a", "response": "b", f"x{HOSTILE}": 1},
    "a role": {"messages": [{"role": HOSTILE, "content": "a"}]},
    "a repeated field": GOOD.replace("response", f"prompt{HOSTILE}").replace("prompt\"", f"prompt{HOSTILE}\""),
    "broken": "{" + HOSTILE,
}  # fmt: skip


@pytest.mark.parametrize("words", [["preview"], ["audit"], ["audit", "--data.on_error", "skip"]], ids=" ".join)
@pytest.mark.parametrize("name", HOSTILE_FILES)
def test_data_cannot_steer_the_terminal(name: str, words: list[str], tmp_path: Path, capfd: Any) -> None:
    """Escape sequences in contents, fields, roles and file names are printed only in escaped form."""
    content = HOSTILE_FILES[name]
    path = tmp_path / f"rows{HOSTILE.replace('/', '')}.jsonl"
    path.write_text((content if isinstance(content, str) else json.dumps(content)) + "\n" + GOOD)
    code = command([*words, "--profile", "demo", "--data.path", str(path), "--data.validation_fraction", "0"])
    said = "".join(capfd.readouterr())
    assert code in (0, ExitCode.BAD_INPUT)
    assert "owned" in said
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", said)


def test_answers_are_shown_as_they_are() -> None:
    """The table prints brackets literally, and its cells cannot control the terminal."""
    written = io.StringIO()
    console = Console(file=written, width=200)
    answer = f"see [/etc/hosts] [bold]list[0] {HOSTILE}"
    show_answers(console, "answers", [Answer(answer, answer, answer, answer, True, True, True, True)])
    said = written.getvalue()
    assert said.count("see [/etc/hosts] [bold]list[0] ") == 3
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", said)
    assert redact(f"one\ntwo {TITLE}") == "one\ntwo \\x1b]0;owned\\x07"


def locked(name: str) -> dict[str, list[str]]:
    """`name==version` -> hashes, from a lock file."""
    hashes = r"((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)"
    blocks = re.findall(rf"^(\S+==\S+) \\\n{hashes}", (ROOT / name).read_text(), re.MULTILINE)
    return {pin: re.findall(r"[0-9a-f]{64}", hashes) for pin, hashes in blocks}


def test_the_locks_hold_every_pin_with_its_hashes() -> None:
    """requirements.lock has every pin of constraints.txt with hashes; CUDA's libraries are in their own file."""
    names = ("constraints.txt", "requirements.lock", "requirements-cuda.lock")
    tested, lock, cuda = (pins((ROOT / name).read_text()) for name in names)
    assert len(tested) > 70
    assert lock == tested
    assert not set(lock) & set(cuda)
    assert {"triton", "nvidia-nccl-cu13"} <= set(cuda)
    for name, pinned in (("requirements.lock", lock), ("requirements-cuda.lock", cuda)):
        assert set(locked(name)) == {f"{package}=={version}" for package, version in pinned.items()}
    # with it, bitsandbytes and transformers fetch binaries from the hub and run them
    assert "kernels" not in {*lock, *cuda}
    project = (ROOT / "pyproject.toml").read_text()
    wanted = re.findall(r'"([a-z-]+)[>=]=', project)
    assert {"torch", "pytest", "setuptools"} <= set(wanted)
    assert set(wanted) <= set(lock)


def test_the_scripts_install_only_what_the_locks_name() -> None:
    """Every pip install in launch/ checks hashes and builds nothing, except for the project itself."""
    script = (ROOT / "launch" / "_common.sh").read_text()
    assert re.search(r"^    install\(\) \{ .* -m pip install .*--no-deps \"\$@\"; \}$", script, re.MULTILINE)
    others = [line.strip() for line in script.splitlines() if re.match(r"\s*install ", line)]
    assert len(others) == 4
    assert [line for line in others if "--require-hashes" not in line] == [
        "install --no-build-isolation -e . # with the setuptools of the lock"
    ]
    assert script.count("pip install") == 1


def test_every_claim_names_a_test_that_exists() -> None:
    """Every test that docs/SECURITY.md names exists."""
    text = (ROOT / "docs" / "SECURITY.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+)`", text)
    assert len(named) > 20
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name in named if f"def {name}(" not in sources] == []
