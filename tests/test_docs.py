"""The pages name files, commands and options that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from csm_weights.commands import cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    if path.name not in ("CHANGELOG.md", "messages.md")
)
TASKS = cli.collection(ROOT).tasks

#: Options of Invoke itself, and tasks that tasks.py adds.
OWN = {"--list", "--help"}
MORE = {"standin"}

each_page = pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix()
)


@each_page
def test_links_lead_to_files(page: Path) -> None:
    """Each relative link of a page leads to a file or folder."""
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []


@each_page
def test_inv_commands_exist(page: Path) -> None:
    """Each `inv TASK --option` of a page is a task with these options."""
    text = page.read_text(encoding="utf-8")
    for task, rest in re.findall(
        r"(?<![\w/-])inv (?:--help )?([a-z][a-z-]+)((?: [^\n`#&|]*)?)", text
    ):
        if task in MORE:
            continue
        assert task in TASKS, f"inv {task}"
        known = {flag for spec in TASKS[task].get_arguments() for flag in _flags(spec)}
        for option in re.findall(r"(?<!\S)(--[a-z][a-z-]+)", rest):
            assert option in known | OWN, f"inv {task} {option}"


def _flags(argument: object) -> set[str]:
    names = {f"--{name.replace('_', '-')}" for name in argument.names}  # type: ignore[attr-defined]
    return names | {f"--no-{name.removeprefix('--')}" for name in names}


@each_page
def test_make_targets_exist(page: Path) -> None:
    """Each `make TARGET VARIABLE=` of a page is in the Makefile."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    known = makefile.partition("KNOWN :=")[2].partition("\n\n")[0]
    switches = makefile.partition("SWITCHES :=")[2].partition("\n")[0]
    variables = set(re.findall(r"[A-Z_]+", known + switches))
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"`make ([^`\n]+)`|^make ([^\n#]+)", text, re.MULTILINE):
        target, *words = "".join(block).split()
        assert target in targets, f"make {target}"
        for word in words:
            if name := re.match(r"([A-Z_]+)=", word):
                assert name[1] in variables, f"make {target} {word}"
