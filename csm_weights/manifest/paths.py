"""Rules for the paths that a manifest may name."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

from csm_weights.manifest.types import RECEIPTS
from csm_weights.untrusted import is_text

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\\:*?\"<>|]")


#: What makes up the pipeline itself: no file of a model may land there.
_OWN = frozenset(
    {
        ".ci",
        ".git",
        ".github",
        ".gitattributes",
        ".gitignore",
        ".venv",
        "benchmarks",
        "changelog.md",
        "chunks",
        "constraints.txt",
        "contributing.md",
        "csm_weights",
        "docs",
        "gnumakefile",
        "invoke.json",
        "invoke.yaml",
        "invoke.yml",
        "license",
        "makefile",
        "manifests",
        "pyproject.toml",
        "readme.md",
        "recombine.sh",
        "security.md",
        "tasks.py",
        "tests",
    }
)


#: Most bytes of a path; Linux takes 4,096 with the folders above it.
MAX_PATH = 1000


#: What Python or make take for code, and the folders from which neither does.
_CODE = (".py", ".pyc", ".pyd", ".so", ".pth", ".mk")


_NO_CODE = frozenset({"models", "output"})


def path_problem(path: str) -> str:
    """Why a relative POSIX path may not be used, or an empty string."""
    if not is_text(path) or len(path.encode()) > MAX_PATH:
        return f"not text of at most {MAX_PATH:,} bytes"
    parts = path.split("/")
    if not path or _CONTROL.search(path):
        return "empty, or a character that some file system refuses"
    if any(unicodedata.category(c) in ("Cf", "Zl", "Zp") for c in path):
        return "a character that cannot be seen"  # macOS takes .git with one in it for .git
    if path.startswith("/"):
        return "absolute"
    if any(part in {"", ".", ".."} for part in parts):
        return "an empty, '.' or '..' component"
    if any(part.endswith((".", " ")) or len(part.encode()) > 200 for part in parts):
        return "a component that is too long or ends in a dot or space"
    if {part.lower() for part in parts} & {".git", RECEIPTS}:
        return "inside a reserved folder"
    if parts[-1].endswith((".partial", ".journal", ".lock")):
        return "a name kept for unfinished files"
    return ""


def _folded(name: str) -> str:
    """The same for names that macOS or Windows take for one: case, and composed accents."""
    return unicodedata.normalize("NFC", name.casefold())


def _is_ours(path: Path) -> bool:
    """Whether a file there would replace the pipeline, or run when it is started next."""
    first = path.parts[0].casefold() if path.parts else ""
    is_code = path.name.casefold().endswith(_CODE) and first not in _NO_CODE
    return first in _OWN or is_code
