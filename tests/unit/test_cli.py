"""On the command line every profile parses, and all mistakes are reported together."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import BUNDLED_BASE, ROOT, run_command
from train.cli import PATHS, parse
from train.commands import handloop
from train.config import parse_bytes
from train.profiles import FOR_4_GB, PROFILES
from train.run.exits import ExitCode, ExitWith


def refusal(*words: str) -> str:
    """The error message for an invalid command line."""
    with pytest.raises(ExitWith) as caught:
        parse(words)
    assert caught.value.code == ExitCode.BAD_INPUT
    return caught.value.reason


@pytest.mark.slow
@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_through_the_real_command(name: str) -> None:
    """`train/main.py --profile NAME --print-config` prints the complete configuration and trains nothing."""
    command = [sys.executable, str(ROOT / "train" / "main.py"), "--profile", name, "--print-config"]
    outcome = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert outcome.returncode == 0, outcome.stderr
    printed = json.loads(outcome.stdout)
    assert printed == json.loads(json.dumps(dataclasses.asdict(PROFILES[name]())))
    assert printed["profile"] == name


def test_profiles_hold_the_two_seed_recipes() -> None:
    """a100 and 4gb_tinyllama, which was 4gb, have the values of the recipes that they promise."""
    a100, small, many = PROFILES["a100"](), PROFILES["4gb_tinyllama"](), PROFILES["multi_gpu"]()
    assert (a100.lora.r, a100.lora.alpha, a100.lora.dropout, len(a100.lora.target_modules)) == (8, 64, 0.05, 7)
    assert (a100.batch.per_device, a100.batch.accumulation, a100.train.epochs) == (2, 4, 3)
    assert (a100.optim.name, a100.optim.lr, a100.model.quantization) == ("paged_adamw_8bit", 1e-4, "nf4")
    assert (a100.memory.checkpointing, a100.checkpoint.every) == ("auto", "epoch")
    assert (small.lora.r, small.lora.alpha, small.batch.per_device, small.batch.accumulation) == (8, 32, 1, 16)
    assert (small.optim.schedule, small.optim.warmup, small.optim.max_grad_norm) == ("cosine", 0.1, 0.3)
    assert (small.data.max_length, small.optim.lr, small.train.epochs) == (512, 2e-4, 10)
    assert (small.model.name_or_path, small.data.template_arguments) == ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", ())
    assert [parse_bytes(PROFILES[name]().memory.budget) for name in FOR_4_GB] == [4 * 2**30] * 3
    assert (many.lora, many.batch, many.optim) == (a100.lora, a100.batch, a100.optim)


def test_overrides_of_every_kind() -> None:
    """Strings, numbers, booleans in any case, unions, `=`, dashes, and lists given at once or repeatedly are parsed."""
    words = (
        "--profile a100 --optim.lr 2e-5 --model.random_init true --run.deterministic=False --checkpoint.every 7 "
        "--batch.per-device 3 --data.path a b --data.path=c=d --optim.max_grad_norm inf --lora.target_modules q_proj"
    )
    config = parse(words.split())
    assert config.optim.lr == 2e-5
    assert config.model.random_init is True
    assert config.run.deterministic is False
    assert config.checkpoint.every == 7
    assert config.batch.per_device == 3
    assert config.data.path == ("a", "b", "c=d")
    assert config.optim.max_grad_norm == float("inf")
    assert config.lora.target_modules == ("q_proj",)
    assert parse(["--profile=demo"]) == PROFILES["demo"]()


def test_all_mistakes_in_one_answer() -> None:
    """Unknown options (with the nearest known one) and invalid values are in one report."""
    words = (
        "--profile a100 --optim.lrr 3 --optim.lr abc --model.quantization nf5 --batch.per_device 0 "
        "--lora.dropout 1.5 --memory.budget lots --train.seed 1 --train.seed 2 --checkpoint.keep 1"
    )
    text = refusal(*words.split())
    for part in (
        "--optim.lrr: no such option; did you mean --optim.lr?",
        "--optim.lr abc: ",
        "'nf4', 'int8', 'none'",
        "--batch.per_device 0: must be at least 1",
        "--lora.dropout 1.5: must be at least 0 and less than 1",
        "--memory.budget lots: ",
        "--train.seed: given more than once",
        "--checkpoint.keep 1: must be at least 2",
    ):
        assert part in text


@pytest.mark.parametrize(
    "address",
    [
        "s3://AKIA0123:s3cret-s3cret@bucket/run",
        "s3://AKIA0123:half/s3cret-s3cret@bucket/run",
        "s3://AKIA0123:s3cret-s3cret/run",
        "s3://s3cret-s3cret@bucket/run",
        "gs://bucket/run?token=s3cret-s3cret",
    ],
)
def test_an_address_with_credentials_is_refused(address: str) -> None:
    """A mirror's address is in config.json and on the terminal, so it holds none; what is refused is not repeated."""
    text = refusal("--profile", "demo", "--checkpoint.mirror", address)
    assert f"--checkpoint.mirror {address[:2]}://...: an address holds no credentials" in text
    assert "s3cret" not in text


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("ftp://host/run", "write s3://BUCKET/PREFIX, gs://..., or file:///FOLDER"),
        ("/mnt/disk", "write s3://BUCKET/PREFIX, gs://..., or file:///FOLDER"),
        ("file://mnt/disk", "write a whole path: file:///FOLDER"),
        ("s3://bucket", "write s3://BUCKET/PREFIX, a folder for this run"),
        ("s3:///run", "write s3://BUCKET/PREFIX, a folder for this run"),
    ],
)
def test_an_address_that_is_none_is_refused(address: str, told: str) -> None:
    """Another scheme, a relative folder, a bucket without a folder in it."""
    assert f"--checkpoint.mirror {address}: {told}" in refusal("--profile", "demo", "--checkpoint.mirror", address)


def test_what_does_not_pay_is_refused_by_name() -> None:
    """Words of other trainers get a reason with its source, or the option that is meant; others the nearest."""
    told = {
        "--lora.use_dora true": "DoRA has 46.9 % in PEFT's comparison",
        "--use_dora=true": "DoRA has 46.9 %",
        "--lora.init_lora_weights pissa": "lora.init_from continues an adapter",
        "--lora.pissa true": "PiSSA: after a search of learning rates",
        "--lora.loftq_config x": "LoftQ is not in PEFT's comparison",
        "--train.neftune_noise_alpha 5": "those who rebuilt it saw the same losses",
        "--optim.galore_rank 8": "0.1 to 1 GB",
        "--lora.vera true": "VeRA 35.4",
    }
    for words, reason in told.items():
        text = refusal("--profile", "demo", *words.split())
        assert f"{words.partition('=')[0].split()[0]}: no such option: " in text
        assert reason in text
    assert "did you mean --lora.dropout?" in refusal("--profile", "demo", "--lora.dropouts", "1")


def test_tokens_and_ratios_that_cannot_be() -> None:
    """White space at a token's ends, a token twice, a ratio below 1 or without end."""
    words = ["--lora.trainable_tokens", " a", "b", "b", "--optim.lora_plus_ratio"]
    assert "--lora.trainable_tokens ' a': a token has no white space at its ends" in refusal(
        "--profile", "demo", *words, "0.5"
    )
    assert "--lora.trainable_tokens b: is there twice" in refusal("--profile", "demo", *words, "0.5")
    assert "--optim.lora_plus_ratio 0.5: must be at least 1" in refusal("--profile", "demo", *words, "0.5")
    assert "--optim.lora_plus_ratio inf: must be at most 1,000,000" in refusal("--profile", "demo", *words, "inf")


@pytest.mark.parametrize("option", ["lora.alpha", "train.epochs", "data.max_length", "batch.per_device"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_numbers_that_are_none(option: str, value: str) -> None:
    """Where a whole number is wanted, NaN and infinity are refused as any other word is."""
    assert option in refusal("--profile", "demo", f"--{option}", value)


def test_values_beyond_any_use() -> None:
    """A timeout of more than a year, ranks and ratios without end, and a run folder without a name."""
    for option, value, reason in (
        ("run.timeout_minutes", "1e21", "must be at most 525,600"),
        ("run.timeout_minutes", "inf", "must be at most 525,600"),
        ("lora.r", "999999999999999999999", "must be at most 1,048,576"),
        ("compare.num_questions", "1000000000000000000000", "must be at most 1,000,000,000"),
        ("run.dir", "", "name a folder for the run"),
        ("run.dir", str(BUNDLED_BASE), "is the base's folder"),
    ):
        assert reason in refusal("--profile", "demo", f"--{option}", value)


def test_profile_mistakes() -> None:
    """No profile, two profiles, an unknown one, and a word without an option are refused."""
    assert "--profile NAME" in refusal()
    assert "--profile NAME" in refusal("--profile", "demo", "--profile", "a100")
    assert "did you mean a100?" in refusal("--profile", "a10")
    assert "belongs to no option" in refusal("stray", "--profile", "demo")


@pytest.mark.parametrize(("text", "size"), [("4GiB", 4 * 2**30), ("3.5 GB", 3_500_000_000), ("512MiB", 2**29)])
def test_sizes(text: str, size: int) -> None:
    """Sizes with binary and decimal units are parsed."""
    assert parse_bytes(text) == size


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every option that names files or folders, written with = as with a space; elsewhere it is a character."""
    monkeypatch.setenv("HOME", "/the/home")
    for option in PATHS:
        section, name = option.split(".")
        for words in ([f"--{option}=~/a/b"], [f"--{option}", "~/a/b"]):
            value = getattr(getattr(parse(["--profile", "demo", *words]), section), name)
            assert value in ("/the/home/a/b", ("/the/home/a/b",)), option
    config = parse(["--profile", "demo", "--data.path", "a~", "~/b", "./~c", "~", "--track.project", "~/p"])
    assert config.data.path == ("a~", "/the/home/b", "./~c", "/the/home")
    assert config.track.project == "~/p"
    assert config.run.resume == "auto"
    assert "--run.dir ~nobody-here/x: there is no such user" in refusal("--profile", "demo", "--run.dir=~nobody-here/x")


def test_a_value_of_another_type_is_told_in_our_words() -> None:
    """And the option is spelled as it was written."""
    assert "--data.max_length abc: it is no whole number" in refusal("--profile", "demo", "--data.max_length", "abc")
    assert "--optim.lr fast: it is no number" in refusal("--profile", "demo", "--optim.lr", "fast")


@pytest.mark.parametrize("option", PATHS)
def test_a_name_that_no_file_has(option: str) -> None:
    """Too long for a file system or not UTF-8: refused before anything looks for it."""
    assert f"--{option} {'a' * 300}: file name too long" in refusal("--profile", "demo", f"--{option}={'a' * 300}")
    assert "its name is not UTF-8; rename it" in refusal("--profile", "demo", f"--{option}=a\udcffb")


def test_every_option_that_names_a_file_is_a_path() -> None:
    """By the first words of its documentation; a new one is added to PATHS, or documented in other words."""
    source = (ROOT / "train" / "config.py").read_text(encoding="utf-8")
    found = set()
    for section in re.split(r"\nclass ", source)[1:]:
        name = section.partition("Config")[0].lower()
        told = re.findall(r'    (\w+): .*\n    """(?:Folder|File|The run folder|Jinja file|Text file)', section)
        found |= {f"{name}.{option}" for option in told}
    assert found == set(PATHS) - {"run.resume"}  # which takes words as well


def test_a_home_through_the_real_commands(
    tmp_path: Path, shape: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--run.dir=~/x` makes no folder called ~, and base, template and data are found in the home folder."""
    home, here = tmp_path / "home", tmp_path / "here"
    here.mkdir()
    shutil.copytree(shape, home / "base")
    shutil.copy(pairs, home / "pairs.jsonl")
    words = ["--profile", "demo", "--model.name_or_path=~/base", "--model.random_init", "true", "--run.dir=~/x"]
    words += ["--data.chat_template=~/base/chat_template.jinja", "--data.path=~/pairs.jsonl", "--train.max_steps", "1"]
    words += ["--optim.warmup", "0", "--track.wandb", "off", "--compare.num_questions", "0", "--data.gate", "warn"]
    done = run_command(words, partial(os.chdir, here), HOME=str(home))
    assert done.returncode == 0, done.stderr
    assert (home / "x" / "final").is_dir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    assert handloop.main(["preview", "--html=~/page.html", *words]) == 0
    assert (home / "page.html").exists()
    assert list(here.iterdir()) == []


def test_packing_replaces_what_a_profile_sets() -> None:
    """Asked for alone it takes the place of the profile's data.group_by_length; both asked for are refused."""
    assert PROFILES["demo"]().data.group_by_length
    data = parse(["--profile", "demo", "--data.packing", "true"]).data
    assert (data.packing, data.group_by_length) == (True, False)
    assert parse(["--profile", "demo", "--data.packing", "false"]).data.group_by_length
    both = ("--data.packing", "true", "--data.group_by_length", "true")
    assert "--data.group_by_length True: packing leaves no padding to save" in refusal("--profile", "demo", *both)


def test_template_arguments_of_a_profile_are_for_templates_that_read_them(tmp_path: Path) -> None:
    """A folder or file that reads them is given them, and others where asked; the profile's base always."""
    own = ("enable_thinking=false",)
    thinks = "{% if enable_thinking is false %}{{ 'no' }}{% endif %}"
    held = {
        "jinja/chat_template.jinja": thinks,
        "config/tokenizer_config.json": json.dumps({"chat_template": thinks}),
        "several/tokenizer_config.json": json.dumps({"chat_template": [{"name": "tool_use", "template": thinks}]}),
        "processor/chat_template.json": json.dumps({"chat_template": thinks}),
        "over/chat_template.jinja": "{{ messages }}",  # in place of the one in tokenizer_config.json
        "over/tokenizer_config.json": json.dumps({"chat_template": thinks}),
        "broken/tokenizer_config.json": "[",
    }
    for name, text in held.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    for words, wanted in (
        *((f"--model.name_or_path {tmp_path / name}", own) for name in ("jinja", "config", "several", "processor")),
        *((f"--model.name_or_path {tmp_path / name}", ()) for name in ("over", "broken", "absent")),
        (f"--model.name_or_path x --data.chat_template {tmp_path / 'jinja' / 'chat_template.jinja'}", own),
        (f"--model.name_or_path {tmp_path / 'jinja'} --data.chat_template {tmp_path / 'over/chat_template.jinja'}", ()),
        (f"--model.name_or_path {tmp_path / 'jinja'} --data.template_arguments", ()),
        ("", own),
        ("--model.name_or_path Qwen/Qwen3-1.7B --data.path a.jsonl", own),
        ("--model.name_or_path demo/base", ()),
        ("--data.chat_template mine.jinja", ()),
        ("--model.name-or-path x --data.template-arguments enable_thinking=false", own),
        ("--data.template_arguments a=b", ("a=b",)),
    ):
        assert parse(["--profile", "4gb", *words.split()]).data.template_arguments == wanted, words
