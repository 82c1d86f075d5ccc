"""The hub's token, which may stand in a file."""

import os
from contextlib import suppress

from dotenv import dotenv_values, find_dotenv

VARIABLES = ("HF_TOKEN", "HUGGINGFACE_TOKEN")


def take_token() -> None:
    """Makes a token that only HUGGINGFACE_TOKEN or the file .env holds known to all libraries, as HF_TOKEN.

    The environment wins over .env, which is looked for in the current folder and above; a login is the last resort,
    which the libraries know themselves.
    """
    beside: dict[str, str | None] = {}
    with suppress(OSError, ValueError):  # a file that cannot be read
        path = find_dotenv(usecwd=True)
        beside = dotenv_values(path) if path else {}
    for values in (os.environ, beside):
        for name in VARIABLES:
            token = (values.get(name) or "").strip()
            if token:
                os.environ["HF_TOKEN"] = token
                return
