"""Record a run in a terminal, and draw its screen.

`python -m tools.pictures.terminal` runs `make weights MODEL=csm-tiny` in a fresh clone, on a
terminal of 80 columns, and writes docs/terminal.txt: the screen at the end, with its colours
as escape sequences. `python -m tools.pictures` draws docs/terminal.svg from it.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shutil
import struct
import tempfile
import termios
from html import escape
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "docs" / "terminal.txt"
PICTURE = RECORD.with_suffix(".svg")

COMMAND = ("make", "weights", "MODEL=csm-tiny")
COLUMNS, ROWS = 80, 60

#: Pixels of the drawing: one character cell, the margin, the bar above.
CELL, LINE, MARGIN, BAR = 8.4, 19, 16, 28

#: Colours of the drawing by the number of the escape sequence that selects them.
COLOURS = {
    "31": "#f87171",
    "32": "#4ade80",
    "33": "#facc15",
    "34": "#60a5fa",
    "35": "#e879f9",
    "36": "#22d3ee",
}
TEXT, DIM, BACKGROUND = "#e5e7eb", "#9ca3af", "#111827"

_TOKEN = re.compile(r"\x1b\[([\d;?]*)([A-Za-z])|(\r\n|[\r\n\b])|(.)", re.DOTALL)


class Cell(NamedTuple):
    """A character and the numbers of its style."""

    character: str
    style: tuple[str, ...]


class Screen:
    """The part of a terminal that programs here use: lines, colours, and going back."""

    def __init__(self) -> None:
        self.lines: list[list[Cell]] = [[]]
        self._row = self._column = 0
        self._style: tuple[str, ...] = ()

    def write(self, text: str) -> Screen:
        """Put text on the screen, and return the screen."""
        for numbers, command, control, character in _TOKEN.findall(text):
            if command:
                self._sequence(numbers, command)
            elif control:
                self._control(control)
            else:
                self._put(character)
        return self

    def text(self) -> str:
        """Return the screen as text, with the colours as escape sequences."""
        lines = []
        for line in self.lines:
            runs = groupby(line, key=lambda cell: cell.style)
            words = [(style, "".join(cell.character for cell in cells)) for style, cells in runs]
            lines.append("".join(_styled(style, word) for style, word in words).rstrip())
        return "\n".join(lines).rstrip("\n") + "\n"

    def _sequence(self, numbers: str, command: str) -> None:
        count = int(numbers) if numbers.isdigit() else 1
        if command == "m":
            new = tuple(number for number in numbers.split(";") if number not in ("", "0"))
            self._style = (*self._style, *new) if new else ()
        elif command == "A":
            self._row = max(0, self._row - count)
        elif command == "K":
            del self.lines[self._row][0 if numbers == "2" else self._column :]

    def _control(self, control: str) -> None:
        if control == "\b":
            self._column = max(0, self._column - 1)
            return
        self._column = 0
        if control != "\r":
            self._row += 1
            if self._row == len(self.lines):
                self.lines.append([])

    def _put(self, character: str) -> None:
        line = self.lines[self._row]
        line += [Cell(" ", ())] * (self._column + 1 - len(line))
        line[self._column] = Cell(character, self._style)
        self._column += 1


def _styled(style: tuple[str, ...], text: str) -> str:
    return f"\x1b[{';'.join(style)}m{text}\x1b[0m" if style else text


def draw(recorded: str) -> str:
    """Return a recorded screen as SVG."""
    lines = Screen().write(recorded).lines[:-1]
    width, height = COLUMNS * CELL + 2 * MARGIN, BAR + len(lines) * LINE + 2 * MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}"'
        f' width="{width:.0f}">',
        f'<rect width="{width:.0f}" height="{height}" rx="8" fill="{BACKGROUND}"/>',
    ]
    for index, colour in enumerate(("#f87171", "#facc15", "#4ade80")):
        parts.append(f'<circle cx="{20 + 20 * index}" cy="18" r="6" fill="{colour}"/>')
    parts.append(
        f'<g font-family="ui-monospace, Menlo, Consolas, monospace" font-size="14" fill="{TEXT}"'
        ' xml:space="preserve">'
    )
    for row, line in enumerate(lines):
        y = BAR + MARGIN + LINE * row + 14
        column = 0
        for style, cells in groupby(line, key=lambda cell: cell.style):
            word = "".join(cell.character for cell in cells)
            if word.strip():
                x = MARGIN + column * CELL
                length = f' textLength="{len(word) * CELL:.1f}" lengthAdjust="spacing"'
                text = escape(word, quote=False)
                parts.append(f'<text x="{x:.1f}" y="{y}"{length}{_attributes(style)}>{text}</text>')
            column += len(word)
    return "\n".join([*parts, "</g>", "</svg>\n"])


def _attributes(style: tuple[str, ...]) -> str:
    colour = next((COLOURS[number] for number in style if number in COLOURS), "")
    colour = colour or (DIM if "2" in style else "")
    bold = ' font-weight="bold"' if "1" in style else ""
    return (f' fill="{colour}"' if colour else "") + bold


def record() -> str:
    """Run the command in a fresh clone on a terminal, and return the screen at its end."""
    from tests.support.clone import Clone

    folder = Path(tempfile.mkdtemp())
    try:
        clone = Clone.make(folder / "csm-weights")
        shown = _run(clone.root, clone.environment() | {"TERM": "xterm-256color"})
    finally:
        shutil.rmtree(folder)
    home = shown.replace(str(clone.root), "~/csm-weights")
    return Screen().write(f"\x1b[32m$\x1b[0m {' '.join(COMMAND)}\r\n{home}").text()


def _run(root: Path, environment: dict[str, str]) -> str:
    pid, terminal = pty.fork()
    if not pid:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("4H", ROWS, COLUMNS, 0, 0))
        os.chdir(root)
        os.execvpe(COMMAND[0], COMMAND, environment)
    shown = bytearray()
    while block := _read(terminal):
        shown += block
    os.close(terminal)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 0, shown.decode()
    return shown.decode()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # the program has ended
        return b""


if __name__ == "__main__":
    RECORD.write_text(record(), encoding="utf-8")
    PICTURE.write_text(draw(RECORD.read_text(encoding="utf-8")), encoding="utf-8")
