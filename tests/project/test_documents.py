"""README, CHANGELOG and the pages in docs/ say what is there."""

import json
import re
import tomllib

from benchmarks.faults import FAULTS
from tests.conftest import ROOT
from tests.project.documents import DOCUMENTS
from tests.project.sources import SOURCES
from train.not_offered import reason_for
from train.profiles import PROFILES

# What README names and another branch brings; to be taken out of here when it is there, which a test demands.
EXTRA_TREES = {"shared", "mlruns", "mlflow.db"}  # beside a checkout, or written by a run's trackers


def block_of(path: str, heading: str) -> str:
    """The first block of text behind a heading."""
    text = (ROOT / path).read_text(encoding="utf-8")
    return text.partition(f"{heading}\n")[2].partition("```text\n")[2].partition("```")[0]


def test_the_tree_of_modules() -> None:
    """docs/CODE.md names every package and module, and nothing that is not there."""
    tree = block_of("docs/CODE.md", "# Where is it in the code?")
    sections = dict(re.findall(r"^(\S+/) (.*(?:\n +.*)*)", tree, re.MULTILINE))
    packages = {f"train/{path.name}/" for path in (ROOT / "train").iterdir() if (path / "__init__.py").exists()}
    assert packages | {"data_tools/"} <= set(sections)
    for path in SOURCES:
        name = path.relative_to(ROOT).as_posix()
        if path.name == "__init__.py":
            continue
        if path.parent == ROOT / "train":
            assert name in tree, name
        else:
            words = re.findall(r"\w+", sections[f"{path.parent.relative_to(ROOT).as_posix()}/"])
            assert path.stem in words, name
    named = re.findall(r"(?<!\S)(?:train|data_tools)/\S+", tree)
    assert all((ROOT / name).exists() for name in named), named


def test_readme_shows_the_tree_by_package() -> None:
    """README's *The tree* names every file and folder at the top, every package of train/, and nothing else."""
    tree = block_of("README.md", "## The tree")
    named = set(re.findall(r"(?<![\w./])[\w.-]+(?:/|\.md|\.toml|\.txt|\.lock)|LICENSE|setup\.py", tree))
    ignored = {line.rstrip("/") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()}
    there = {path for path in ROOT.iterdir() if not path.name.startswith(".") and path.name not in ignored}
    there = {path for path in there if path.suffix != ".egg-info" and path.name not in EXTRA_TREES}
    packages = [path for path in (ROOT / "train").iterdir() if (path / "__init__.py").exists()]
    wanted = {path.name + "/" * path.is_dir() for path in [*there, *packages]}
    assert len(wanted) > 25
    assert named == wanted


def test_readme_is_short() -> None:
    """At most 120 lines, for a reader who has a minute; what belongs elsewhere is in docs/."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_links_lead_somewhere() -> None:
    """Files that README, CONTRIBUTING and docs/ link to are there, and so are the headings; each page is linked."""
    linked, missing = set(), set()
    for path in DOCUMENTS:
        text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith("http"):
                continue
            name, _, anchor = target.partition("#")
            file = (path.parent / name).resolve() if name else path
            linked.add(file)
            if not file.exists():
                missing.add(file.relative_to(ROOT).as_posix())
            elif anchor:
                headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
                anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
                assert anchor in anchors, f"{path.name}: {target}"
    assert missing == set()
    assert set(DOCUMENTS) - linked - {ROOT / "README.md"} == set(), "pages that nothing leads to"


def test_the_figures_of_readme_are_measured() -> None:
    """Each speed and peak in README's table is a row of the results that its line names."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Speed")[2].partition("\n## ")[0]
    lines = re.findall(r"^\| (?:8B|TinyLlama).*\]\((\S+)\) \|$", text, re.MULTILINE)
    assert len(lines) == 6
    for line in text.splitlines():
        if not (source := re.search(r"\]\((\S+\.json)\) \|$", line)):
            continue
        rows = json.loads((ROOT / source[1]).read_text(encoding="utf-8"))["rows"]
        measured = {(round(row["tokens_per_second"], -1), f"{row['peak_gib']:.1f}") for row in rows}
        quoted = re.findall(r"([\d,]{5,}) in ([\d.]+)", line)
        assert quoted, line
        for speed, peak in quoted:
            assert (round(int(speed.replace(",", "")), -1), peak) in measured, (speed, peak)


def test_messages_in_troubleshooting_are_the_program_s() -> None:
    """What docs/TROUBLESHOOTING.md quotes in its first column, if it is words of a message, is in the source."""
    page = (ROOT / "docs" / "TROUBLESHOOTING.md").read_text(encoding="utf-8")
    seen = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| ")]
    quoted = [words for cell in seen for words in re.findall(r"`([^`]+)`", cell) if " " in words]
    source = "".join(re.sub(r'"\s*\n\s*f?"', "", path.read_text(encoding="utf-8")) for path in SOURCES)
    assert len(quoted) > 25
    assert [words for words in quoted if words not in source] == []


def test_the_changelog_knows_the_version() -> None:
    """CHANGELOG has a section for the package's version, below the one for what is not released."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    sections = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sections[:2] == ["Unreleased", version]


def test_the_options_of_the_page_on_tuning_exist() -> None:
    """Every `section.option` that docs/TUNING.md names is one, and every option that only it explains is there."""
    text = (ROOT / "docs" / "TUNING.md").read_text(encoding="utf-8")
    demo = vars(PROFILES["demo"]())
    named = re.findall(rf"`(?:--)?({'|'.join(demo)})\.(\w+)", text)
    assert [name for section, name in named if name not in vars(demo[section])] == []
    ways = {"rslora", "init_from", "trainable_tokens", "modules_to_save", "lora_plus_ratio", "method", "quantization"}
    assert ways <= {name for _, name in named}
    for word in ("DoRA", "PiSSA", "LoftQ", "NEFTune", "AdaLoRA", "VeRA", "GaLore"):
        assert word in text.partition("## What is not offered")[2]
        assert reason_for(f"lora.{word}"), word


def test_the_log_can_be_used() -> None:
    """Newest first, a verdict an idea; each constant's entry exists, and so does each file of standing results."""
    log = (ROOT / "docs" / "LOG.md").read_text(encoding="utf-8")
    dates = re.findall(r"^## (\d{4}-\d\d-\d\d)$", log, re.MULTILINE)
    assert len(dates) >= 4
    assert dates == sorted(dates, reverse=True)
    known = {"kept", "deleted", "failed", "not built", "mended", "measured", "superseded"}
    assert known <= set(re.findall(r"\*\*([a-z ]+)\*\* \(", log.partition("## Standing results")[0].replace("\n", " ")))
    headings = re.findall(r"^### (.+)$", log, re.MULTILINE)
    assert len(headings) > 50
    for heading in headings:
        assert heading.rpartition(": ")[2].partition(",")[0] in known, heading
    constants = log.partition("## Where the constants come from")[2].partition("\n## ")[0]
    entries = re.findall(r"\| \*(.+)\* \|$", constants, re.MULTILINE)
    assert len(entries) > 15
    for entry in entries:
        assert any(heading.startswith(entry) for heading in headings), entry
    standing = log.partition("## Standing results")[2].partition("\n## ")[0]
    files = set(re.findall(r"\w+\.json", standing))
    assert files == {path.name for path in (ROOT / "benchmarks" / "results").glob("*.json")}


def test_every_fault_has_a_test_and_a_row() -> None:
    """The faults that tests are marked with are those of the table in docs/RELIABILITY.md, T1 to T30."""
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "faults").glob("test_*.py")]
    marked = {number for source in sources for number in re.findall(r'pytest\.mark\.fault\("(T\d+)"\)', source)}
    assert marked == set(FAULTS) == {f"T{number}" for number in range(1, 31)}
    results = json.loads((ROOT / "benchmarks" / "results" / "faults.json").read_text(encoding="utf-8"))
    table = (ROOT / "docs" / "RELIABILITY.md").read_text(encoding="utf-8")
    for row in results["rows"]:
        assert f"| {row['test']} | {FAULTS[row['test']]} | {row['count']:,} | {row['failures']} |" in table


def test_every_claim_names_a_test_that_exists() -> None:
    """Every test that docs/SECURITY.md names exists."""
    text = (ROOT / "docs" / "SECURITY.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+)`", text)
    assert len(named) > 20
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name in named if f"def {name}(" not in sources] == []
