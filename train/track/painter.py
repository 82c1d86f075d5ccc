"""Keeps a few lines at the bottom of a terminal, and writes only what has changed of them."""

import sys
from collections.abc import Callable, Sequence

from rich.console import Console, ConsoleRenderable
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType, Segment, Segments

from train.track.screen import BLANK, Line, columns_of


class Painter(Live):
    """rich's Live with a painting of its own: the lines stay at the bottom, what others print goes above them.

    Live erases all lines and writes them again, 1.7 kB at 80x24, which flickers over a slow connection, and leaves
    pieces behind where a narrower terminal has wrapped what stood there. Here unchanged lines are passed over, changed
    ones are written over without being erased first, and the rows that wrapped lines take are counted. The cursor
    stays visible, as a killed run could not show it again.
    """

    def __init__(self, console: Console, is_frozen: Callable[[], bool]) -> None:
        """From when `is_frozen` says so nothing moves any more: somebody writes to the terminal past this class."""
        is_shared = sys.stderr is not None and sys.stderr.isatty()  # what goes to a file is to stay there
        super().__init__(console=console, auto_refresh=False, transient=True, redirect_stderr=is_shared)
        self.is_frozen = is_frozen
        self.is_left = False  # frozen, and the cursor put below the lines
        self.wanted: Sequence[Line] = ()
        self.shown: Sequence[Line] = ()
        self.shown_width = console.width

    def show(self, lines: Sequence[Line]) -> None:
        """Shows these lines from now on."""
        if not self.is_started:
            self.start()
            self.console.show_cursor(True)
        self.wanted = lines
        if lines != self.shown or self.console.width != self.shown_width:
            self.refresh()

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """Puts what is to be printed above the lines."""
        if self.is_frozen():
            below = [Segments([Segment.line()])] if self.shown and not self.is_left else []
            self.is_left = True
            return [*below, *renderables]
        printed = [one for one in renderables if not isinstance(one, Control)]
        wanted = self.wanted if self.is_started else ()
        width, height = self.console.size
        rows = self.shown
        if width != self.shown_width:  # terminals wrap lines that are longer than their new width
            count = sum(max(1, -(-columns_of(line) // width)) for line in self.shown)
            rows = [(("?", ""),)] * min(count, height)  # equal to no line, so that all are written
        before: list[ConsoleRenderable] = []
        if printed:
            before, rows = [self._painted(rows, ()), *printed], ()
        self.shown, self.shown_width = wanted, width
        return [*before, self._painted(rows, wanted)]

    def _painted(self, old: Sequence[Line], new: Sequence[Line]) -> Segments:
        """From the last of the old lines to the last of the new ones, or to the first row where there is none."""
        if old == new:
            return Segments([])
        up = max(len(old) - 1, 0)
        found = [Control(ControlType.CARRIAGE_RETURN, *([(ControlType.CURSOR_UP, up)] if up else [])).segment]
        erase_rest = Control((ControlType.ERASE_IN_LINE, 0)).segment
        for place in range(max(len(old), len(new))):
            found += [Segment.line()] if place else []
            line = new[place] if place < len(new) else BLANK
            if place >= len(old) or place >= len(new) or old[place] != line:
                found += [Segment(text, self.console.get_style(style)) for text, style in line]
                found.append(erase_rest)
        surplus = len(old) - max(len(new), 1)
        back = [(ControlType.CURSOR_UP, surplus)] if surplus > 0 else []
        # a ^C that the terminal echoes then stands behind the last line, not in it
        end = (ControlType.CURSOR_MOVE_TO_COLUMN, columns_of(new[-1]) if new else 0)
        return Segments([*found, Control(*back, end).segment])
