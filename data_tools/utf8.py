"""Where bytes are no UTF-8."""

import codecs
import gzip
import io
import re

# as TextIOWrapper reads, so that damage behind a byte that it refused is not met before that byte
STEP_BYTES = 8192
_LINE_END = re.compile(rb"\r\n?|\n")


def not_utf8(file: io.BufferedReader | gzip.GzipFile) -> tuple[int, int]:
    """(line, byte of that line) of the first byte that is not UTF-8, both from 1; the file's end where all are."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    line, byte, held = 1, 1, b""
    while True:
        chunk, is_found = file.read1(STEP_BYTES), False
        good = decoder.getstate()[0] + chunk
        try:
            decoder.decode(chunk, final=not chunk)
            good = good[: len(good) - len(decoder.getstate()[0])]  # without the beginning of a character
        except UnicodeDecodeError as error:
            good, is_found = good[: error.start], True
        good = held + good
        held = b"\r" if good.endswith(b"\r") and not is_found else b""  # a newline may follow
        good = good[: len(good) - len(held)]
        ends = [match.end() for match in _LINE_END.finditer(good)]
        line += len(ends)
        byte = len(good) - ends[-1] + 1 if ends else byte + len(good)
        if is_found or not chunk:
            return line, byte
