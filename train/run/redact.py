"""Takes secrets out of text that is printed or stored: an exception may quote a URL, a header or a key."""

import os
import re
import sys
import traceback
from types import TracebackType

from data_tools.terminal import escaped

REMOVED = "[secret]"
# environment variables whose values are secrets whatever they look like
VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN")
SHORTEST = 8  # a shorter value would take ordinary words out of a text
PATTERNS = (
    (re.compile(r"hf_[A-Za-z0-9]{20,}"), REMOVED),
    (re.compile(r"wandb_v\d+_[A-Za-z0-9_]{20,}"), REMOVED),
    # one slash too, which is what pathlib makes of two
    (re.compile(r"([a-z][a-z0-9+.-]+:/{1,2})[^\s/?#]*@", re.IGNORECASE), rf"\1{REMOVED}@"),
    # with a digit in it: "bearer" is a word too
    (re.compile(r"(\bbearer\s+)(?=\S*\d)[\w.~+/=-]{16,}", re.IGNORECASE), rf"\1{REMOVED}"),
    (re.compile(r"(\b(?:token|password|secret|api_?key)=)[^\s&;'\"]{8,}", re.IGNORECASE), rf"\1{REMOVED}"),
)


def redact(text: str) -> str:
    """`text` without tokens of known forms, passwords in URLs, and the values of this process's secret variables.

    A bare key of 40 hexadecimal digits looks like a commit and goes only where a variable holds it.
    """
    for name in VARIABLES:
        value = os.environ.get(name, "").strip()
        if len(value) >= SHORTEST:
            text = text.replace(value, REMOVED)
    for pattern, replacement in PATTERNS:
        text = pattern.sub(replacement, text)
    return escaped(text, keep="\n")  # what others wrote may also steer a terminal


def print_redacted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A sys.excepthook: what the interpreter says of an error that nobody foresaw, without secrets."""
    print(redact("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr, flush=True)
