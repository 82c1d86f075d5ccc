"""The page: its numbers are those of the run, it loads nothing, and nothing of the user's becomes markup."""

import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.run_folders import rows_of, write, write_answers, write_run
from train.report import page as page_module
from train.report.drawing import svg
from train.report.figures import charts_of, overlaid
from train.report.page import page_of, page_of_several, render
from train.report.record import read_run

VOID = {"meta", "br", "wbr", "hr", "img", "input", "link", "path", "use"}


class Elements(HTMLParser):
    """All elements with their attributes, the text of table cells, and whether every element is closed in its place."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


@pytest.fixture
def without_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws nothing, for tests of the text."""
    monkeypatch.setattr(page_module, "svg", lambda chart: "<svg></svg>")


def report(folder: Path) -> str:
    return render(page_of(read_run(folder)))


def numbers_of(page: str, caption: str) -> list[dict[str, float | None]]:
    """The rows of the table with this caption, by the names of the columns, in the numbers' exact values."""
    table = page.split(f"<caption>{caption}")[1].split("</table>")[0]
    names = re.findall(r'<th scope="col"[^>]*>([^<]*)</th>', table)
    rows = []
    for line in re.findall(r"<tr>(?!<th scope=\"col\")(.*?)</tr>", table):
        cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line)
        values = [re.search(r'value="([^"]+)"', cell) for cell in cells]
        rows.append({name: json.loads(value[1]) if value else None for name, value in zip(names, values, strict=True)})
    return rows


def test_the_numbers_are_those_of_the_run(tmp_path: Path) -> None:
    """Every number in every chart's table is the one that metrics.jsonl has at that step, to the last bit."""
    page, rows = report(write_run(tmp_path)), {each["step"]: each for each in rows_of(120)}
    titles = re.findall(r"<h3 id=\"[\w-]+-title\">([^<]+)</h3>", page)
    assert len(titles) == 8  # all but the loss scale of fp16
    seen: set[str] = set()
    for title in [*titles, "Validations"]:
        table = numbers_of(page, title)
        assert table
        for line in table:
            for name, value in line.items():
                assert rows[int(line["step"] or 0)].get(name) == value, (title, line)
                seen |= {name} if value is not None else set()
    assert {"train/loss", "train/grad_norm", "train/learning_rate", "eval/loss", "eval/path1/loss"} <= seen
    assert {"eval/general_loss", "perf/tokens_per_second", "perf/step_seconds", "memory/peak_reserved_gib"} <= seen


def test_the_curves_are_drawn_where_the_numbers_are(tmp_path: Path) -> None:
    """The points of the raw loss's path lie, up to a stretch and a shift, where metrics.jsonl has them."""
    run = read_run(write_run(tmp_path))
    chart = charts_of(run)[0]
    path = svg(chart).split('id="loss-raw-0"')[1].split('d="')[1].split('"')[0]
    drawn = [tuple(map(float, pair)) for pair in re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", path)]
    wanted = [(each["step"], each["train/loss"]) for each in run.rows if "train/loss" in each]
    assert len(drawn) == len(wanted)
    for axis in (0, 1):
        low, high = (pick(range(len(wanted)), key=lambda i: wanted[i][axis]) for pick in (min, max))
        scale = (drawn[high][axis] - drawn[low][axis]) / (wanted[high][axis] - wanted[low][axis])
        for here, there in zip(drawn, wanted, strict=True):
            assert here[axis] == pytest.approx(drawn[low][axis] + scale * (there[axis] - wanted[low][axis]), abs=1e-3)


@pytest.mark.usefixtures("without_charts")
def test_the_arithmetic_and_the_facts(tmp_path: Path) -> None:
    """The batch is said as the banner says it; resumes, plan, versions, receipts and how to load it are there."""
    folder = write_run(tmp_path, profile="a100", batch__accumulation=4)
    write_answers(folder)
    page = report(folder)
    assert "2 per device x 4 accumulated x 1 process = 8 samples a step, 400 tokens a step on average" in page
    assert "resumed after step 60; skipped: step 60; 2 checkpoints" in page
    assert "1,050: 1,000 in NF4, 50 in bf16 (head)" in page
    assert "owner/base" in page.split("from_pretrained")[1]
    assert "c0ffee" in page
    assert "50 % (10 to 90)" in page  # with its interval
    for told in ("merged-dequantized", "export/model.gguf", "handloop chat", "2.13.0", "general text", "a:1"):
        assert told in page
    # one question, as the base answers it and as two validations did
    told = page.split("Answers while training")[1].split("</dl>")[0]
    assert re.findall(r"<dt>([^<]+)", told) == ["question", "reference", "base", "step 50", "step 100"]


@pytest.mark.usefixtures("without_charts")
def test_a_multimodal_base_is_loaded_by_its_own_class(tmp_path: Path) -> None:
    """How to load the adapter names the class that serves a multimodal base, by base.json."""
    folder = write_run(tmp_path)
    write_answers(folder)
    assert "base = AutoModelForCausalLM.from_pretrained" in report(folder)
    path = folder / "final" / "base.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"served_as": "Gemma3ForConditionalGeneration"}))
    page = report(folder)
    assert "base = AutoModelForImageTextToText.from_pretrained" in page
    assert "AutoModelForCausalLM" not in page


@pytest.mark.usefixtures("without_charts")
def test_options_that_differ_from_the_profile_come_first(tmp_path: Path) -> None:
    """The changed option is in the first table with both values; an unchanged one only among all options."""
    page = report(write_run(tmp_path, optim__lr=0.5))
    first, _, rest = page.partition("Options that differ from the profile demo")[2].partition("</table>")
    assert re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", first)[3:] == ["optim.lr", "0.5", "0.003"]
    assert "optim.schedule" in rest


def test_nothing_of_the_user_s_becomes_markup(tmp_path: Path) -> None:
    """A script in a question, an answer, an option, a file's name, a warning or the folder's name is text."""
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>\x1b[31m\u202e&amp;"
    folder = write_run(tmp_path / "<script>run", data__path=[evil], model__name_or_path=evil)
    write_answers(folder, evil, evil)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 121, "train/loss": 1.0, "warning": evil}) + "\n")
    plan = json.loads((folder / "plan.json").read_text()) | {"validation_paths": [evil], "reason": evil}
    write(folder / "plan.json", plan)
    other = write_run(tmp_path / "other")
    for page in (report(folder), render(page_of_several(list(map(read_run, (folder, other)))))):
        elements = Elements(page).found
        assert not {"script", "img", "iframe", "object", "link", "form"} & {tag for tag, _ in elements}
        assert not any(name.startswith("on") for _, attributes in elements for name in attributes)
        assert "\x1b" not in page
        assert "\u202e" not in page
        assert "&lt;script&gt;alert(1)" in page
        assert "\\x1b[31m\\u202e&amp;amp;" in page


def test_the_page_loads_nothing(tmp_path: Path) -> None:
    """Links lead only to parts of the page, no style or attribute names an address, and the policy forbids loading."""
    folder = write_run(tmp_path)
    write_answers(folder, "https://example.org/a", "http://example.org/b")
    page = report(folder)
    links = [value for _, attributes in Elements(page).found for name, value in attributes.items() if "href" in name]
    assert len(links) > 10
    identities = [attributes["id"] for _, attributes in Elements(page).found if "id" in attributes]
    assert {f"#{each}" for each in identities} >= set(links)
    assert len(identities) == len(set(identities))
    assert not re.search(r"\b(src|srcset|action|data|poster)=", re.sub(r">[^<]*<", "><", page))
    assert not re.search(r"url\((?!#)|@import|https?:", re.sub(r">[^<]*<", "><", page))
    assert "default-src 'none'; style-src 'unsafe-inline'" in page


@pytest.mark.usefixtures("without_charts")
def test_no_secret_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token of the environment, one of a known form, and a password in an address are removed everywhere."""
    monkeypatch.setenv("HF_TOKEN", "s3cret<word>0123")
    folder = write_run(tmp_path, model__name_or_path="https://me:pass@host/x", data__path=["s3cret<word>0123"])
    write_answers(folder, "s3cret<word>0123", "hf_abcdefghijklmnopqrstuvwxyz")
    other = write_run(tmp_path / "other")
    for page in (report(folder), render(page_of_several(list(map(read_run, (folder, other)))))):
        assert "[secret]" in page
        for part in ("s3cret", "hf_abc", "me:pass"):
            assert part not in page


def test_the_same_folder_gives_the_same_bytes(tmp_path: Path) -> None:
    """Two pages of one folder are equal, and no run's chart depends on the one drawn before it."""
    folder = write_run(tmp_path)
    write_answers(folder)
    first = report(folder)
    render(page_of(read_run(write_run(tmp_path / "other", num_steps=30))))
    assert report(folder) == first


@pytest.mark.usefixtures("without_charts")
def test_several_runs_are_overlaid(tmp_path: Path) -> None:
    """Each run has its line, letter and numbers; of the options those that differ are compared, and no other."""
    runs = [
        read_run(write_run(tmp_path / name, num_steps=n, optim__lr=lr)) for name, n, lr in [("x", 60, 1), ("y", 90, 2)]
    ]
    page = render(page_of_several(runs))
    options = page.split("<caption>Options that differ")[1].split("</table>")[0]
    assert re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", options)[3:] == ["optim.lr", "1", "2"]
    loss = overlaid([("A", runs[0]), ("B", runs[1])])[0]
    assert [(line.label, line.series, len(line.full)) for line in loss.lines] == [("A: x", 0, 59), ("B: y", 1, 89)]
    drawn = svg(loss)
    assert 'id="loss-line-0"' in drawn
    assert 'id="loss-line-1"' in drawn
    letters = re.findall(r'<th scope="row">([AB])</th>', page.split("<caption>Training loss")[1].split("</table>")[0])
    assert set(letters) == {"A", "B"}
    same = render(page_of_several([runs[0], runs[0]]))
    assert "All options are the same" in same


def test_a_reader_without_eyes_or_mouse_can_use_it(tmp_path: Path) -> None:
    """Charts are images named by title and sentence, headings descend in order, tables have captions and headings."""
    folder = write_run(tmp_path)
    write_answers(folder)
    page = report(folder)
    elements = Elements(page).found
    identities = {attributes["id"] for _, attributes in elements if "id" in attributes}
    charts = [attributes for tag, attributes in elements if tag == "svg"]
    assert len(charts) == 8
    for chart in charts:
        assert chart["role"] == "img"
        assert set((chart["aria-labelledby"] or "").split()) <= identities
    levels = [int(tag[1]) for tag, _ in elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert page.count("<table>") == page.count("<caption>") > 10
    assert ("html", {"lang": "en"}) in elements
    assert next(attributes for tag, attributes in elements if tag == "a")["href"] == "#content"


def test_a_long_run_s_page_stays_small(tmp_path: Path) -> None:
    """3,000 steps make less than 1.5 MB, drawn with fewer points; the loss's highest step is told."""
    run = read_run(write_run(tmp_path, num_steps=3000))
    page = render(page_of(run))
    assert len(page.encode()) < 1_500_000
    drawn = page.split('id="loss-raw-0"')[1].split('d="')[1].split('"')[0]
    assert 400 < drawn.count("L ") <= 2 * 400 + 2
    highest: dict[str, Any] = max(
        (each for each in run.rows if "train/loss" in each), key=lambda each: each["train/loss"]
    )
    assert f"highest {highest['train/loss']:.4g} at step {highest['step']}" in page
