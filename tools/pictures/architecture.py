"""Draw the rooms of the package in their layers, with the way of the data through them."""

from __future__ import annotations

import ast
import re
import textwrap
import tomllib
from dataclasses import dataclass
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "architecture.md"
PICTURE = PAGE.with_suffix(".svg")

#: Sizes in pixels; CHARACTER is the mean width of one in a line of small text.
WIDTH, MARGIN, LEFT, GAP, LINE, CHARACTER = 860, 16, 44, 12, 16, 6.1

#: One room that is described as several files: the layer that everybody may import.
GROUND = "ground"

#: A line of the list on the page: "5. **store** *installs* a verified file".
_STEP = re.compile(r"^(\d+)\. \*\*(\w+)\*\* \*(\w+)\*", re.MULTILINE)

#: A number on the way of the data, and the verb that it stands for.
Step = tuple[str, str]

_STYLE = """text { font: 12px system-ui, sans-serif; fill: #374151 }
.name { font-size: 15px; font-weight: bold; fill: #111827 }
.step { font-weight: bold; fill: white; text-anchor: middle }
.verb { fill: #2563eb; text-anchor: end }
.room { fill: #eff6ff; stroke: #2563eb }
.outside { fill: #f9fafb; stroke: #6b7280 }"""


@dataclass(frozen=True)
class Box:
    """One room: its name, what it is for, and the steps of the data that it takes."""

    name: str
    sentence: str
    steps: tuple[Step, ...]


def layers(root: Path = ROOT) -> list[list[str]]:
    """Return the rooms of each layer, from the top, as the contract in pyproject.toml has them."""
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = settings["tool"]["importlinter"]["contracts"]
    rows = [re.split(r" [|:] ", layer) for layer in contract["layers"]]
    return [[name.removeprefix("csm_weights.") for name in row] for row in rows]


def steps(page: str) -> dict[str, tuple[Step, ...]]:
    """Return the steps of each room, from the numbered list of the page."""
    found: dict[str, tuple[Step, ...]] = {}
    for number, room, verb in _STEP.findall(page):
        found[room] = (*found.get(room, ()), (number, verb))
    return found


def draw(root: Path = ROOT) -> str:
    """Return the picture as SVG."""
    taken = steps((root / PAGE.relative_to(ROOT)).read_text(encoding="utf-8"))
    *rooms, ground = layers(root)
    rows = [
        [Box(name, _sentence(root, name), taken.get(name, ())) for name in row] for row in rooms
    ]
    rows[0].insert(0, Box("tasks.py", _first_line(root / "tasks.py"), ()))
    rows.append([Box(GROUND, "Single files that every room may import: " + ", ".join(ground), ())])
    y, parts = MARGIN, []
    for row in rows:
        height = 44 + LINE * max(len(_wrapped(box, len(row))) for box in row)
        parts += [_box(box, place, len(row), y, height) for place, box in enumerate(row)]
        y += height + GAP
    return _page(parts, y - GAP + MARGIN)


def _sentence(root: Path, name: str) -> str:
    path = root / "csm_weights" / name
    return _first_line(path / "__init__.py" if path.is_dir() else path.with_suffix(".py"))


def _first_line(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]


def _width(count: int) -> float:
    """Return the width of one of `count` boxes in a row."""
    return (WIDTH - LEFT - MARGIN - GAP * (count - 1)) / count


def _wrapped(box: Box, count: int) -> list[str]:
    return textwrap.wrap(box.sentence.replace("`", ""), int((_width(count) - 24) / CHARACTER))


def _box(box: Box, place: int, count: int, y: int, height: int) -> str:
    width = _width(count)
    x = LEFT + place * (width + GAP)
    kind = "outside" if box.name in ("tasks.py", "api", GROUND) else "room"
    name = "api.py" if box.name == "api" else box.name
    lines = [
        f'<rect class="{kind}" x="{x:.0f}" y="{y}" width="{width:.0f}" height="{height}" rx="6"/>',
        f'<text class="name" x="{x + 12:.0f}" y="{y + 24}">{escape(name)}</text>',
    ]
    for index, line in enumerate(_wrapped(box, count)):
        text = escape(line, quote=False)
        lines.append(f'<text x="{x + 12:.0f}" y="{y + 46 + LINE * index}">{text}</text>')
    at = x + width - 20
    for number, verb in reversed(box.steps):
        lines.append(f'<circle cx="{at:.0f}" cy="{y + 19}" r="10" fill="#2563eb"/>')
        lines.append(f'<text class="step" x="{at:.0f}" y="{y + 23}">{number}</text>')
        lines.append(f'<text class="verb" x="{at - 15:.0f}" y="{y + 23}">{verb}</text>')
        at -= 44 + len(verb) * CHARACTER
    return "\n".join(lines)


def _page(parts: list[str], height: int) -> str:
    foot = height - MARGIN
    arrow = (
        f'<path d="M22 {MARGIN}V{foot}m-5 -10l5 10l5 -10" fill="none" stroke="#6b7280"/>\n'
        f'<text transform="translate(16 {height // 2}) rotate(-90)" text-anchor="middle">'
        "may import</text>"
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}"'
            f' width="{WIDTH}">',
            f"<style>{_STYLE}</style>",
            f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
            arrow,
            *parts,
            "</svg>\n",
        ]
    )
