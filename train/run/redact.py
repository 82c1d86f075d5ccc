"""Removes secrets from text that is printed or stored: an exception may quote a URL, a header or a key."""

import os
import re
import sys
import traceback
from types import TracebackType

from data_tools.terminal import escaped

REMOVED = "[secret]"
# environment variables whose values are always secret
SECRET_VARIABLES = (
    "HF_TOKEN",
    "HUGGINGFACE_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "HUGGINGFACE_HUB_TOKEN",
    "WANDB_API_KEY",
    "WANDB_IDENTITY_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
)
MIN_SECRET_LENGTH = 8  # replacing shorter values would remove ordinary words
PATTERNS = (
    (re.compile(r"hf_[A-Za-z0-9]{20,}"), REMOVED),
    (re.compile(r"wandb_v\d+_[A-Za-z0-9_]{20,}"), REMOVED),
    # pathlib turns two slashes into one
    (re.compile(r"([a-z][a-z0-9+.-]+:/{1,2})[^\s/?#]*@", re.IGNORECASE), rf"\1{REMOVED}@"),
    # only with a digit, because "bearer" is also an ordinary word
    (re.compile(r"(\bbearer\s+)(?=\S*\d)[\w.~+/=-]{16,}", re.IGNORECASE), rf"\1{REMOVED}"),
    (
        re.compile(r"(\b(?:token|password|secret|api_?key|signature|credential)=)[^\s&;'\"]{8,}", re.IGNORECASE),
        rf"\1{REMOVED}",
    ),
)


def redact(text: str, keep: str = "\n") -> str:
    """`text` without tokens of known forms, passwords in URLs, and the values of SECRET_VARIABLES.

    A key of 40 hexadecimal digits looks like a commit; it is removed only if a variable holds it. Control characters
    are escaped, except those in `keep`.
    """
    for name in SECRET_VARIABLES:
        value = os.environ.get(name, "").strip()
        if len(value) >= MIN_SECRET_LENGTH:
            text = text.replace(value, REMOVED)
    for pattern, replacement in PATTERNS:
        text = pattern.sub(replacement, text)
    return escaped(text, keep)  # the text may come from a stranger


def first_line(error: BaseException) -> str:
    """What an error says, redacted, in one line."""
    return (redact(str(error)).strip().splitlines() or ["without a message"])[0]


def print_redacted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A sys.excepthook that prints the traceback without secrets."""
    print(redact("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr, flush=True)
