"""A chat template as Ollama wants it: in Go's template language, made of what the Jinja one puts between turns.

Ollama gives a template `.System` (the text of system messages) and `.Messages` (turns of `.Role` and `.Content`). What
is made here is one shape: a beginning with or without a system message, and fixed texts behind each question and each
answer. Whether a chat template is of that shape is tried on conversations, with an evaluator of exactly this shape.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from data_tools.chat_template import ChatTemplate

Turns = Sequence[tuple[str, str]]  # (role, content)
SYSTEM, QUESTION, ANSWER, FOLLOW_UP = "zqsys7qz", "zquser7qz", "zqanswer7qz", "zqnext7qz"
PADDED: Turns = [("user", " \n a \n ")]
TRIED: tuple[Turns, ...] = (
    [("user", "What does AOG mean?")],
    [("user", "{{ .System }} \"quoted\" 'text'\n\nand <b>more</b>")],
    [("system", "Be brief.\nAnd kind."), ("user", "Hi")],
    [("user", "One"), ("assistant", "Two,\nthree."), ("user", "Four")],
    [("system", "S"), ("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4"), ("user", "5")],
)


@dataclass(frozen=True)
class Pieces:
    """The fixed texts of a chat template."""

    begin: str  # before the first question, without a system message
    before_system: str | None  # None: it takes no system message
    after_system: str  # up to the first question
    after_question: str  # up to the answer that follows
    after_answer: str  # up to the next question
    generation: str  # behind the last question: where the answer begins

    def go(self) -> str:
        """The template for Ollama."""
        begin = _literal(self.begin)
        if self.before_system is not None:
            system = f"{_literal(self.before_system)}{{{{ .System }}}}{_literal(self.after_system)}"
            begin = f"{{{{ if .System }}}}{system}{{{{ else }}}}{begin}{{{{ end }}}}"
        question = _literal(self.generation)
        if self.after_question != self.generation:
            question = f"{{{{ if $last }}}}{question}{{{{ else }}}}{_literal(self.after_question)}{{{{ end }}}}"
        return (
            f"{begin}{{{{ range $i, $_ := .Messages }}}}"
            "{{ $last := eq (len (slice $.Messages $i)) 1 }}"
            f'{{{{ if eq .Role "user" }}}}{{{{ .Content }}}}{question}'
            '{{ else if eq .Role "assistant" }}{{ .Content }}'
            f"{{{{ if not $last }}}}{_literal(self.after_answer)}{{{{ end }}}}"
            "{{ end }}{{ end }}"
        )


def go_template(template: ChatTemplate, served: Callable[[str], str]) -> tuple[str, list[str]]:
    """(The template for Ollama, what it does otherwise); where there can be none: (empty, the reasons).

    `served` turns a rendered conversation into what is to be sent: without BOS, for example, where the server adds it.
    """
    if template.has_clock:
        return "", ["the chat template asks for the date"]
    try:
        pieces = _pieces(template, served)
        go = pieces.go()
        for turns in TRIED:
            has_system = turns[0][0] == "system"
            if has_system and pieces.before_system is None:
                continue
            if evaluate(go, turns) != served(_render(template, turns)):
                return "", ["the chat template puts more than a fixed text around each message"]
        is_trimmed = evaluate(go, PADDED) != served(_render(template, PADDED))
    except ValueError as error:
        return "", [str(error)]
    notes = ["the chat template takes no system message: one is left out"] if pieces.before_system is None else []
    return go, [*notes, *(["the chat template trims messages, and Ollama does not"] if is_trimmed else [])]


def _pieces(template: ChatTemplate, served: Callable[[str], str]) -> Pieces:
    def split(turns: Turns) -> list[str]:
        text, parts = served(_render(template, turns)), []
        for _, content in turns:
            if text.count(content) != 1:
                raise ValueError(f"the chat template writes a {turns[0][0]} message {text.count(content)} times")
            before, _, text = text.partition(content)
            parts.append(before)
        return [*parts, text]

    begin, generation = split([("user", QUESTION)])
    _, after_question, after_answer, _ = split([("user", QUESTION), ("assistant", ANSWER), ("user", FOLLOW_UP)])
    try:
        before, after, _ = split([("system", SYSTEM), ("user", QUESTION)])
    except ValueError:
        return Pieces(begin, None, "", after_question, after_answer, generation)
    return Pieces(begin, before, after, after_question, after_answer, generation)


def _render(template: ChatTemplate, turns: Turns) -> str:
    messages = [{"role": role, "content": content} for role, content in turns]
    return template.render(messages, add_generation_prompt=True)


def _literal(text: str) -> str:
    """Text as it stands in a Go template."""
    return text.replace("{{", '{{ "{{" }}')


def evaluate(go: str, turns: Turns) -> str:
    """What Ollama renders of `Pieces.go()`; raises ValueError for anything else of Go's language."""
    words = re.split(r"\{\{ (.*?) \}\}", go)
    system = "\n\n".join(content for role, content in turns if role == "system")
    return _Evaluation(words, {".System": system}, turns).block(0)[0]


@dataclass
class _Evaluation:
    """Texts at even places, actions at odd ones."""

    words: list[str]
    values: dict[str, str | bool]
    turns: Turns

    def block(self, at: int) -> tuple[str, int]:
        """(The text up to the `else` or `end` that closes the block which begins at `at`, the place of that)."""
        written = ""
        while True:
            written += self.words[at]
            at += 1
            if at == len(self.words):
                return written, at
            action = self.words[at]
            if action == "end" or action.split()[0] == "else":
                return written, at
            if action.startswith("if "):
                text, at = self.choice(action.removeprefix("if "), at + 1)
                written += text
            elif action == "range $i, $_ := .Messages":
                text, at = self.loop(at + 1)
                written += text
            elif action.startswith('"'):
                written += action[1:-1]
            elif not action.startswith("$last := "):
                written += str(self.value(action))
            at += 1

    def choice(self, condition: str, at: int) -> tuple[str, int]:
        """The text of an `if`, and the place of its `end`."""
        is_chosen, chosen = bool(self.value(condition)), ""
        is_done = is_chosen
        while True:
            text, at = self.block(at)
            chosen = text if is_chosen else chosen
            if self.words[at] == "end":
                return chosen, at
            condition = self.words[at].removeprefix("else").removeprefix(" if ").strip()
            is_chosen = not is_done and (not condition or bool(self.value(condition)))
            is_done = is_done or is_chosen
            at += 1

    def loop(self, start: int) -> tuple[str, int]:
        """The text of the `range` over the turns, and the place of its `end`."""
        written, at = "", start
        outside = dict(self.values)
        for number, (role, content) in enumerate(self.turns):
            self.values |= {".Role": role, ".Content": content, "$last": number == len(self.turns) - 1}
            text, at = self.block(start)
            written += text
        self.values = outside
        return written, at

    def value(self, expression: str) -> str | bool:
        """Of a variable, a negation or a comparison."""
        if expression.startswith("not "):
            return not self.value(expression.removeprefix("not "))
        if found := re.fullmatch(r'eq (\.\w+) "(\w+)"', expression):
            return self.value(found[1]) == found[2]
        if expression not in self.values:
            raise ValueError(f"no {expression!r} in what is evaluated here")
        return self.values[expression]
