"""Rules for paths: what a manifest may name, and where files of a model may go.

Data goes where only data lives. A checkout takes the files of CSM-1B, by name;
every other file goes below models/, or to a folder from which no program takes
up files by itself.
"""

import functools
import os
import re
import sys
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from csm_weights.errors import Finding, Kind
from csm_weights.untrusted import is_text

#: Folder beside installed files that holds their receipts; no artifact may lie there.
RECEIPTS = ".csm-weights"

#: Most bytes of a path; Linux takes 4,096 with the folders above it.
MAX_PATH = 1000

#: What the name of a model, or of a group, is like.
NAME = r"[a-z0-9][a-z0-9._-]{0,63}"

#: The folder of chunk files, below the repository root.
CHUNKS = "chunks"

#: Folders of a checkout that hold nothing but data.
DATA_FOLDERS = ("models", "output")

#: The files of the manifests that ship, all of them data that no program takes up by
#: itself: the only ones that a checkout takes elsewhere.
SHIPPED = frozenset(
    {
        "model.safetensors",
        "ckpt.pt",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "generation_config.json",
        "preprocessor_config.json",
        "chat_template.jinja",
        *(f"prompts/conversational_{letter}.wav" for letter in "ab"),
        *(f"prompts/read_speech_{letter}.wav" for letter in "abcd"),
    }
)

#: What makes a folder the home of some program's files.
_MARKS = (
    *(".git", ".hg", "pyproject.toml", "setup.py", "setup.cfg", "tasks.py", "__init__.py"),
    *("Makefile", "GNUmakefile", "makefile", "package.json", "conftest.py", "pyvenv.cfg"),
)

#: Names that are run or read as settings: of interpreters, loaders, shells, make,
#: test runners; and hidden files.
_CODE = re.compile(
    r"(^|/)(\.|((gnu)?make|docker|container|jenkins|rake|just|vagrant|gem|tilt|snake|brew|pip)file$"
    r"|cmakelists\.txt$|scons(cript|truct)$|(package|composer|binding|tasks)\.(json|gyp)$"
    r"|(docker-)?compose\.ya?ml$|taskfile\.ya?ml$|invoke\.(ya?ml|json)$|meson\.build$|pom\.xml$"
    r"|build(\.(gradle|xml))?$|workspace$|wscript$|configure$|ld\.so\.preload$|entry_points\.txt$)"
    r"|\.(py[a-z]?|pth|so|so\.[\d.]+|dylib|dll|exe|com|bat|cmd|ps1|(ba|c|fi|k|z)?sh|mk|mak|pl|rb"
    r"|lua|[mc]?[jt]sx?|jar|cfg|ini|toml|egg(-link)?|whl|desktop|service|command|vim|el|ipynb|node"
    r"|vbs|hta|wsf|msi|scr|lnk|reg|php|gyp)$",
    re.IGNORECASE,
)

_REFUSED = re.compile(r"[\x00-\x1f\x7f-\x9f\\:*?\"<>|]")


def path_problem(path: str) -> str:
    """Return why a relative POSIX path may not be used, or an empty string."""
    if not is_text(path) or len(path.encode()) > MAX_PATH:
        return f"not text of at most {MAX_PATH:,} bytes"
    parts = path.split("/")
    if not path or _REFUSED.search(path):
        return "empty, or a character that some file system refuses"
    if not path.isascii() and any(unicodedata.category(c) in ("Cf", "Zl", "Zp") for c in path):
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


def folded(name: str) -> str:
    """Return the same for names that macOS or Windows take for one: case, composed accents."""
    return unicodedata.normalize("NFC", name.casefold())


def is_code(path: str) -> bool:
    """Return whether some program runs a file of this name, or takes its settings from it."""
    return bool(_CODE.search(path))


def data_findings(
    root: Path, destination: Path, paths: Iterable[str], option: str = "--dest"
) -> list[Finding]:
    """Return a finding for each file of a model that may not go to `destination`.

    `root` is the checkout, `option` the one that names another destination.
    """
    folder = Path(os.path.realpath(destination))
    if any(folder.is_relative_to(os.path.realpath(root / data)) for data in DATA_FOLDERS):
        return []  # models/ itself may be a link to another disk
    above = [folder, *folder.parents]
    home = next((one for one in above if one.exists() and one.samefile(root)), None)
    import_problem = functools.cache(_import_problem)
    project_problem = functools.cache(_project_problem)
    findings = []
    for path in paths:
        file, problem = folder / path, ""
        if home and file.relative_to(home).parts[0] in DATA_FOLDERS:
            continue
        if path in SHIPPED:
            # The checkout's own folder takes them, though tasks.py is in it.
            problem = "" if file.parent == home else import_problem(file.parent, folder, home)
        elif home:
            problem = "a folder of the checkout that is not for data"
        else:
            problem = import_problem(file.parent, folder, None) or project_problem(
                file.parent, folder
            )
        if problem:
            expected = "a place below models/, or in a folder of its own"
            help_text = f"{option}={DATA_FOLDERS[0]}/NAME"
            findings.append(Finding(Kind.IN_THE_WAY, str(file), expected, problem, help_text))
    return findings


def _import_problem(folder: Path, top: Path, home: Path | None) -> str:
    """Return why Python may import from `folder`, which lies in the destination `top`.

    `home` is the checkout that it is in, if any.
    """
    for entry in filter(None, sys.path):
        real = os.path.realpath(entry)
        if folder.is_relative_to(real) and not (home and home.is_relative_to(real)):
            return f"a folder that Python imports from, {entry}"
    names = {part.casefold() for part in folder.parts}
    if names & {".git", ".github", "site-packages", "dist-packages"}:
        return "a folder of git, of GitHub, or of installed packages"
    for one in (folder, *folder.parents):
        if one == (home or top.parent):
            break
        if module := next(one.glob("*.py" if home else "__init__.py"), None):
            return f"a folder that Python imports from: {module} is there"
    return ""


def _project_problem(folder: Path, top: Path) -> str:
    """Return why programs may take up files in `folder`, which lies in the destination `top`."""
    for one in (folder, *folder.parents):
        if mark := next((mark for mark in _MARKS if os.path.lexists(one / mark)), ""):
            return f"a folder of a program or project: {one / mark} is there"
        if one == top:
            break
    return ""
