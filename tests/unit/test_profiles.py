"""What the profiles set for their own base reaches it, and is not lost without a word for another."""

from datetime import date
from pathlib import Path

import pytest

from data_tools.messages import Message
from data_tools.prompts import PromptRenderer
from data_tools.render import RenderSettings
from tests.unit.data_tools.jinja import THINKS, answer, marked, rendered, tokenizer_with, user
from train.banner import _template_arguments
from train.cli import parse
from train.config import parse_argument
from train.data import prepare_settings
from train.profiles import PROFILES


@pytest.mark.parametrize("name", ["4gb", "qwen3_4b_4gb"])
def test_qwen3_is_asked_as_it_is_trained(name: str) -> None:
    """The prompt that a server makes with the profile's arguments is the text before the answer in training."""
    arguments = dict(map(parse_argument, PROFILES[name]().data.template_arguments))
    settings = RenderSettings(arguments=arguments)
    (sample,) = rendered(THINKS, user("Warm?"), answer("Yes."), settings=settings).samples
    tokenizer = tokenizer_with(THINKS)
    turns = [{"role": "user", "content": "Warm?"}]
    served = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **arguments)
    assert served.endswith("<think>\n\n</think>\n\n")
    assert marked(sample).startswith(f"{served}⟦Yes.")
    assert tokenizer.decode(PromptRenderer(tokenizer, settings).ids([Message("user", "Warm?")])) == served


def test_qwen3_in_a_folder_is_rendered_as_on_the_hub(tmp_path: Path) -> None:
    """A row and a question of a run with the base in a folder are those of a run with the base's name on the hub."""
    (tmp_path / "chat_template.jinja").write_text(THINKS, encoding="utf-8")
    hub, here = (
        prepare_settings(parse(["--profile", "4gb", *words]), (), date(2026, 1, 1)).render
        for words in ([], ["--model.name_or_path", str(tmp_path)])
    )
    assert here == hub
    assert here.arguments == {"enable_thinking": False}  # which chat, compare and what serves it are given, too
    samples = [rendered(THINKS, user("Warm?"), answer("Yes."), settings=each).samples for each in (hub, here)]
    assert marked(samples[0][0]) == marked(samples[1][0])
    with pytest.raises(ValueError, match="turn 2"):  # as docs/RUNS.md says of rows with a reasoning
        rendered(THINKS, user("Warm?"), answer("Yes.", reasoning_content="It is."), settings=here)


def test_arguments_that_are_left_out_are_said() -> None:
    """The banner has a line where another base was named, and none for the profile's own or for other profiles."""
    assert "enable_thinking=false is left out" in "".join(
        _template_arguments(parse(["--profile", "4gb", "--model.name_or_path", "demo/base"]))
    )
    for words in (["4gb"], ["4gb_tinyllama", "--model.name_or_path", "demo/base"], ["demo"]):
        assert _template_arguments(parse(["--profile", *words])) == []
