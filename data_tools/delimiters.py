"""What separates the columns of a CSV file: a comma, or what spreadsheets write in its place."""

import csv
import io

OTHERS = ";\t|"
NAMES = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}


def delimiter_of(beginning: str) -> str:
    """The character between columns: the comma unless another one divides all lines of `beginning` alike.

    csv.Sniffer proposes it. The first line must then have no comma, and each line as many columns, two at least.
    """
    header = beginning.partition("\n")[0]
    if "," in header or not any(other in header for other in OTHERS):
        return ","
    try:
        found = csv.Sniffer().sniff(beginning, OTHERS).delimiter
        widths = {
            len(row) for row in csv.reader(io.StringIO(beginning, newline=""), delimiter=found, strict=True) if row
        }
    except csv.Error:
        return ","
    return found if found in header and len(widths) == 1 and min(widths) > 1 else ","


def misread(names: list[str]) -> str:
    """What to say of a first line with one column whose name holds another delimiter; else empty."""
    held = [other for other in OTHERS if len(names) == 1 and other in names[0]]
    if not held:
        return ""
    return (
        f"one column, named {names[0]!r}: {NAMES[held[0]]} do not divide all rows alike; put texts that hold them in "
        "quotes, or save the file with commas"
    )
