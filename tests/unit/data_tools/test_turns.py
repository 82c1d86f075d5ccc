"""What is trained stands behind exactly the generation prompt, and ends where generation stops."""

import pytest

from data_tools.render import RenderSettings
from tests.unit.data_tools.jinja import (
    EMPTY_THOUGHT_IN_PROMPT,
    OPEN_THOUGHT_IN_PROMPT,
    PLAIN,
    THINKS,
    UNENDED,
    WHOLE,
    answer,
    call,
    conversation_of,
    marked,
    rendered,
    result,
    tokenizer_with,
    user,
)

TWO_TURNS = (user("Warm?"), answer("Yes.", reasoning="Feels so."), user("Damp?"), answer("No.", reasoning="Dry walls."))
FIRST = "<|begin|><|user|>\nWarm?\n<|assistant|>\n⟦<think>\nFeels so.\n</think>\n\nYes.<|end|>⟧\n"
LAST = (
    "<|begin|><|user|>\nWarm?\n<|assistant|>\nYes.<|end|>\n<|user|>\nDamp?\n<|assistant|>\n"
    "⟦<think>\nDry walls.\n</think>\n\nNo.<|end|>⟧\n"
)


def test_each_answer_as_it_would_be_generated() -> None:
    """Where earlier answers are rendered otherwise, each is a sample of its own: its thought is trained, too."""
    found = rendered(THINKS, *TWO_TURNS)
    assert [marked(sample) for sample in found.samples] == [FIRST, LAST]
    assert [sample.questions for sample in found.samples] == [("Warm?",), ("Damp?",)]
    assert found.num_left_out == 0


def test_the_last_answer_alone() -> None:
    """--data.history last trains it and counts the others; refuse names the first that would be left out."""
    found = rendered(THINKS, *TWO_TURNS, settings=RenderSettings(history="last"))
    assert [marked(sample) for sample in found.samples] == [LAST]
    assert found.num_left_out == 1
    with pytest.raises(ValueError, match=r"turn 2: .*--data\.history each .*last"):
        rendered(THINKS, *TWO_TURNS, settings=RenderSettings(history="refuse"))


def test_answers_that_one_text_shows_rightly_share_it() -> None:
    """After the last question nothing is rewritten: two answers in a row of one sample, the earlier in another."""
    turns = (*TWO_TURNS, answer("Quite dry.", reasoning="Sure."))
    texts = [marked(sample) for sample in rendered(THINKS, *turns).samples]
    assert texts[0] == FIRST
    assert texts[1] == LAST + "<|assistant|>\n⟦<think>\nSure.\n</think>\n\nQuite dry.<|end|>⟧\n"
    assert len(texts) == 2


def test_a_template_that_rewrites_nothing_gives_one_sample() -> None:
    """Also with an answer that is masked, and a conversation that ends with the user."""
    turns = (user("a"), answer("b", train=False), user("c"), answer("d"), user("e"))
    (sample,) = rendered(PLAIN, *turns).samples
    assert marked(sample) == (
        "<|begin|><|user|>\na\n<|assistant|>\nb<|end|>\n<|user|>\nc\n<|assistant|>\n⟦d<|end|>⟧\n<|user|>\ne\n"
    )


def test_an_empty_think_block_is_context() -> None:
    """It stands before the answer and is not trained, unless --data.empty_reasoning train says so."""
    for mode, wanted in (
        ("mask", "<|assistant|>\n<think>\n\n</think>\n\n⟦Yes.<|end|>⟧\n"),
        ("train", "<|assistant|>\n⟦<think>\n\n</think>\n\nYes.<|end|>⟧\n"),
    ):
        found = rendered(THINKS, user("Warm?"), answer("Yes."), settings=RenderSettings(empty_reasoning=mode))  # type: ignore[arg-type]
        assert marked(found.samples[0]).endswith(wanted)
        assert found.num_empty_reasonings == (mode == "mask")


def test_an_empty_think_block_is_known_without_a_switch() -> None:
    """A template without enable_thinking: the block is what it puts around a thought."""
    template = THINKS.replace("enable_thinking", "nothing_known")
    (sample,) = rendered(template, user("Warm?"), answer("Yes.")).samples
    assert marked(sample).endswith("<|assistant|>\n<think>\n\n</think>\n\n⟦Yes.<|end|>⟧\n")


def test_a_prompt_that_opens_a_thought_is_not_before_an_answer_without_one() -> None:
    """Generation would go on within the thought: refused, with what differs and the ways out."""
    with pytest.raises(
        ValueError, match=r"turn 2: .*'<think>\\n' where the turn has '5<\|end\|>\\n'.*--data\.chat_template"
    ):
        rendered(OPEN_THOUGHT_IN_PROMPT, user("2 and 3?"), answer("5"))


def test_a_prompt_with_an_empty_thought_stands_before_every_answer() -> None:
    """Though the template shows it in no turn, generation begins behind it; so do both samples."""
    found = rendered(EMPTY_THOUGHT_IN_PROMPT, user("a"), answer("b"), user("c"), answer("d"))
    assert [marked(sample) for sample in found.samples] == [
        "<|begin|><|user|>\na\n<|assistant|>\n<think></think>⟦b<|end|>⟧\n",
        "<|begin|><|user|>\na\n<|assistant|>\nb<|end|>\n<|user|>\nc\n<|assistant|>\n<think></think>⟦d<|end|>⟧\n",
    ]


def test_an_answer_ends_with_the_token_that_begins_what_follows() -> None:
    """A template that ends no turn: generation stops at the next turn's token, which is trained, also at the end."""
    (sample,) = rendered(UNENDED, user("a"), answer("b"), user("c"), answer("d")).samples
    assert marked(sample) == "<|begin|><|user|>\na<|assistant|>\n⟦b<|user|>⟧\nc<|assistant|>\n⟦d<|user|>⟧"


def test_a_prompt_in_other_white_space() -> None:
    """White space aside the prompt is the same: trained where the turn stands."""
    template = PLAIN.replace("{{ '<|assistant|>\n' }}", "{{ '  <|assistant|>\n\n' }}")
    (sample,) = rendered(template, user("a"), answer("b"), user("c"), answer("d")).samples
    assert marked(sample).endswith("c\n<|assistant|>\n⟦d<|end|>⟧\n")


def test_arguments_of_the_user_and_of_a_row() -> None:
    """--data.template_arguments reach the template, and a row's own come on top of them."""
    template = "{{ greeting or '' }}" + PLAIN
    turns, settings = (user("hot?"), answer("yes.")), RenderSettings(arguments={"greeting": "Hello. "})
    (sample,) = rendered(template, *turns, settings=settings).samples
    assert marked(sample).startswith("Hello. <|begin|>")
    own = {"chat_template_kwargs": {"greeting": "Good day. "}}
    (sample,) = rendered(template, *turns, settings=settings, **own).samples
    assert marked(sample).startswith("Good day. <|begin|>")


def test_what_is_left_out_on_purpose() -> None:
    """--data.leave_out: reasoning, the system turn and tools are neither rendered nor refused."""
    system = {"role": "system", "content": "Be brief."}
    turns = (system, user("a"), answer("b", reasoning="c"))
    settings = RenderSettings(leave_out=("reasoning", "system", "tools"))
    (sample,) = rendered(PLAIN, *turns, tools=[{"name": "f"}], settings=settings).samples
    assert marked(sample) == "<|begin|><|user|>\na\n<|assistant|>\n⟦b<|end|>⟧\n"


def test_the_prompt_is_transformers_own() -> None:
    """Token for token: before each trained answer stands what apply_chat_template gives for generation."""
    tokenizer = tokenizer_with(THINKS)
    turns = [
        user("Warm?"),
        answer("Yes.", reasoning_content="Feels so."),
        user("Damp?"),
        answer("No.", reasoning_content="Dry walls."),
    ]
    for number, sample in zip((1, 3), rendered(THINKS, *turns).samples, strict=True):
        prompt = tokenizer.apply_chat_template(turns[:number], add_generation_prompt=True, return_dict=True)
        ((start, end),) = sample.runs()
        assert sample.input_ids[:start] == prompt["input_ids"]
        whole = tokenizer.apply_chat_template(turns[: number + 1], return_dict=True)["input_ids"]
        assert sample.input_ids[:end] == whole[:end]
    assert conversation_of(*turns).messages[1].reasoning == "Feels so."


def test_a_call_whose_result_follows_stays_in_one_sample() -> None:
    """A template that renders calls as they are generated gives one sample for the steps of an agent."""
    (sample,) = rendered(
        WHOLE, user("a"), call({"x": 1}), result("b"), call({"x": 2}), result("c"), answer("d")
    ).samples
    assert len(sample.runs()) == 3


def test_a_thought_that_is_in_the_answer_is_not_lost() -> None:
    """A template with a thinking mode shows the reasoning there, though the answer has the same words elsewhere."""
    switched = (
        "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\n' }}{% if m.role == 'assistant' %}"
        "{{ '<think>' + m.reasoning_content if thinking and m.reasoning_content }}{{ '</think>' }}{% endif %}"
        "{{ m.content + (eos_token if m.role == 'assistant' else '') + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' + ('<think>' if thinking else '</think>') }}{% endif %}"
    )
    (sample,) = rendered(switched, user("How many?"), answer("5", reasoning="5")).samples
    assert marked(sample).endswith("<|assistant|>\n<think>⟦5</think>5<|end|>⟧\n")
    (sample,) = rendered(switched, user("How many?"), answer("5")).samples
    assert marked(sample).endswith("<|assistant|>\n</think>⟦5<|end|>⟧\n")


def test_a_context_that_the_last_answer_rewrites() -> None:
    """As gpt-oss: earlier thoughts vanish once an answer is there. Both are trained behind the prompt that had them."""
    vanishing = (
        "{{ bos_token }}{% set done = messages[-1].role == 'assistant' and not messages[-1].tool_calls %}"
        "{% for m in messages %}{{ '<|user|>\nresult ' if m.role == 'tool' else '<|' + m.role + '|>\n' }}"
        "{% if m.reasoning_content and (not done or loop.last) %}{{ '[' + m.reasoning_content + ']' }}{% endif %}"
        "{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ 'call ' + c.function.name + (c.function.arguments | tojson) }}"
        "{% endfor %}{{ (eos_token if m.role == 'assistant' else '') + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    turns = (user("a"), call({"x": "y"}, reasoning="hm"), result("b"), answer("c", reasoning="so"))
    (sample,) = rendered(vanishing, *turns).samples
    assert marked(sample) == (
        '<|begin|><|user|>\na\n<|assistant|>\n⟦[hm]call look_up{"x": "y"}<|end|>⟧\n<|user|>\nresult b\n<|assistant|>\n'
        "⟦[so]c<|end|>⟧\n"
    )


def test_two_answers_in_a_row_are_trained_apart() -> None:
    """The token that ends the first is the one at which generation stops, not the one that begins the second."""
    found = rendered(UNENDED, user("a"), answer("b"), answer("c"))
    assert [marked(sample) for sample in found.samples] == [
        "<|begin|><|user|>\na<|assistant|>\n⟦b<|user|>⟧",
        "<|begin|><|user|>\na<|assistant|>\nb<|assistant|>\n⟦c<|user|>⟧",
    ]
    assert [sample.questions for sample in found.samples] == [("a",), ("b",)]


def test_a_template_that_begins_another_answer_unasked() -> None:
    """Its header is not taken for the end: one token that ends a turn is found, several cannot be told apart."""
    always = PLAIN.replace("{% if add_generation_prompt %}", "{% if true %}")
    (sample,) = rendered(always, user("a"), answer("b")).samples
    assert marked(sample) == "<|begin|><|user|>\na\n<|assistant|>\n⟦b<|end|>⟧\n<|assistant|>\n"
    several = always.replace("eos_token if", "'<|end|><|pad|><|end|>' if").replace(
        "'<|assistant|>\n' }}", "'<|assistant|>' }}"
    )
    with pytest.raises(ValueError, match="begins another answer behind this one where none is asked for"):
        rendered(several, user("a"), answer("b"))


def test_an_assistant_that_begins() -> None:
    """A template without a prompt for an empty conversation: the header is not trained."""
    shy = PLAIN.replace("{% if add_generation_prompt %}", "{% if add_generation_prompt and messages %}")
    (sample,) = rendered(shy, answer("Hello."), user("a"), answer("b")).samples
    assert marked(sample).startswith("<|begin|><|assistant|>\n⟦Hello.<|end|>⟧\n")


def test_a_thought_written_into_the_content() -> None:
    """Where the prompt has the tag, it is taken out of the content; a template with a field for it gets it there."""
    opened = (
        "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\n' }}"
        "{% if m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif %}"
        "{{ m.content + (eos_token if m.role == 'assistant' else '') + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n<think>\n' }}{% endif %}"
    )
    (sample,) = rendered(opened, user("q"), answer("<think>\nhm\n</think>\n\nYes")).samples
    assert marked(sample).endswith("<|assistant|>\n<think>\n⟦hm\n</think>\n\nYes<|end|>⟧\n")
    (sample,) = rendered(PLAIN, user("q"), answer("<think>\nhm\n</think>\n\nYes")).samples
    assert marked(sample).endswith("⟦<think>\nhm\n</think>\n\nYes<|end|>⟧\n")


def test_an_empty_think_block_of_a_template_that_knows_no_thought() -> None:
    """As Kimi: it writes one before every answer; it is context all the same."""
    always = PLAIN.replace(
        "m.content + (eos", "('<think></think>' if m.role == 'assistant' else '') + m.content + (eos"
    )
    (sample,) = rendered(always, user("q"), answer("Yes")).samples
    assert marked(sample).endswith("<|assistant|>\n<think></think>⟦Yes<|end|>⟧\n")
