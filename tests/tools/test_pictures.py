"""The pictures of docs/ are current, and the tables of docs/architecture.md are true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools.pictures import architecture, terminal

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_the_picture_of_the_rooms_is_current() -> None:
    """docs/architecture.svg is what `python -m tools.pictures` draws."""
    drawn = architecture.PICTURE.read_text(encoding="utf-8")
    assert drawn == architecture.draw(), "run: python -m tools.pictures"


def test_the_picture_of_the_terminal_is_current() -> None:
    """docs/terminal.svg is drawn from docs/terminal.txt, a run that ended well."""
    recorded = terminal.RECORD.read_text(encoding="utf-8")
    drawn = terminal.PICTURE.read_text(encoding="utf-8")
    assert drawn == terminal.draw(recorded), "run: python -m tools.pictures"
    plain = re.sub(r"\x1b\[[\d;]*m", "", recorded)
    assert "OK: installed, verified, smoke test passed" in plain


def test_a_screen_has_what_a_terminal_would_show() -> None:
    """Redrawn bars, erased lines, steps up and colours end as on a terminal."""
    shown = "10 %\r100 %\r\nold\x1b[A\r\x1b[2Kdone\r\n\x1b[1;32mnew\x1b[0m!\b?\r\n"
    assert terminal.Screen().write(shown).text() == "done\n\x1b[1;32mnew\x1b[0m?\n"


def test_the_way_of_the_data_leads_through_rooms() -> None:
    """Each step of the list is taken by a room of the contract, and the steps are in order."""
    found = architecture.steps(PAGE)
    rooms = {room for row in architecture.layers() for room in row}
    assert found.keys() <= rooms
    numbers = sorted(int(number) for taken in found.values() for number, _ in taken)
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) > 5


_CHANGES = PAGE.partition("## To change this, go there")[2].partition("\n\n|")[2].splitlines()[2:]


@pytest.mark.parametrize(
    "line", [line for line in _CHANGES if line.startswith("|")], ids=lambda line: line.split("|")[1]
)
def test_a_change_leads_to_a_file_that_exists(line: str) -> None:
    """Each file that the table names is there, unless the table calls it a new one."""
    where = line.split("|")[2]
    named = re.findall(r"(a new )?`([\w./-]+(?:\.py|/))`", where)
    assert named
    for new, name in named:
        exists = (ROOT / name).exists() or (ROOT / "csm_weights" / name).exists()
        assert exists != bool(new), name
