"""An Ollama Modelfile for an exported GGUF file."""

from collections.abc import Callable, Sequence

from data_tools.chat_template import ChatTemplate
from train.deliver.go_template import go_template

TRIPLE = '"""'


def modelfile(
    file_name: str, template: ChatTemplate, served: Callable[[str], str], end_tokens: Sequence[str]
) -> tuple[str, list[str]]:
    """(The Modelfile's text, what a user should know of it)."""
    go, reasons = go_template(template, served)
    if TRIPLE in go or go.endswith('"'):
        go, reasons = "", [f"the chat template has {TRIPLE}, which a Modelfile cannot quote"]
    lines = [f"FROM ./{file_name}"]
    if go:
        lines.append(f"TEMPLATE {TRIPLE}{go}{TRIPLE}")
        notes = [f"Modelfile: {reason}" for reason in reasons]
    else:
        instead = "Ollama reads the chat template in the GGUF file as well as it can"
        lines.append(f"# no TEMPLATE: {instead}")
        notes = [f"Modelfile: no TEMPLATE, because {'; '.join(reasons)}; {instead}"]
    lines += [f"PARAMETER stop {_quoted(token)}" for token in end_tokens]
    lines.append("# for greedy answers, such as a receipt compares:  PARAMETER temperature 0")
    return "\n".join(lines) + "\n", notes


def _quoted(text: str) -> str:
    return f"{TRIPLE}{text}{TRIPLE}" if '"' in text or "\n" in text else f'"{text}"'
