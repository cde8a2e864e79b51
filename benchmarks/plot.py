"""A bar chart as SVG, which GitHub shows as it is: no library, no pixels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from xml.sax.saxutils import escape

#: Pixels: a bar and the room it has, the space for names, for bars and for figures.
BAR, PITCH, NAMES, BARS, FIGURES = 18, 30, 230, 400, 90

OURS, OTHERS, TEXT = "#2563eb", "#9ca3af", "#374151"


def bars(title: str, values: Mapping[str, float], path: Path) -> None:
    """Writes one bar a value, the largest first; those called "ours" stand out."""
    rows = sorted(values.items(), key=lambda item: -item[1])
    width, height = NAMES + BARS + FIGURES, PITCH * (len(rows) + 1) + 10
    most = max(values.values())
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
        f' width="{width}" font-family="sans-serif" font-size="13" fill="{TEXT}">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="10" y="22" font-size="15" font-weight="bold">{escape(title)}</text>',
    ]
    for index, (name, value) in enumerate(rows, start=1):
        top = PITCH * index + 10
        colour = OURS if name.startswith("ours") else OTHERS
        length = BARS * value / most
        base = top + BAR - 5
        lines += [
            f'<text x="{NAMES - 8}" y="{base}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{NAMES}" y="{top}" width="{length:.1f}" height="{BAR}" fill="{colour}"/>',
            f'<text x="{NAMES + length + 6:.1f}" y="{base}">{value:.3g}</text>',
        ]
    path.write_text("\n".join([*lines, "</svg>"]) + "\n")
