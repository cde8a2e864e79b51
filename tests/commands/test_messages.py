"""docs/messages.md: every message that a person can meet, on one page for a reader of them."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator

from csm_weights.errors import printable
from tests.support.clone import REPOSITORY

PACKAGE = REPOSITORY / "csm_weights"
PAGE = REPOSITORY / "docs" / "messages.md"

#: Set to 1 to write the page anew, as `make messages` does.
UPDATE = "UPDATE_GOLDEN"

HEAD = """# Messages

Every text of the package that a person can meet, by room and module: messages of errors, what
findings expect and find and advise, help of options, log lines, and what the screens are made of.
A word in braces is filled in. Written by `make messages`; a test holds it against the code.
"""

#: Modules whose texts go into files.
NOT_READ = {"manifest/render.py"}

#: Calls whose texts are for a parser or a program, not for a person.
NOT_SHOWN = {"compile", "fullmatch", "match", "sub", "split", "getattr", "import_module"}


def template(node: ast.expr) -> str | None:
    """Return the text of a string literal, of an f-string with its values in braces, or None."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        parts = [
            f"{{{ast.unparse(part.value)}}}"
            if isinstance(part, ast.FormattedValue)
            else str(ast.literal_eval(part))
            for part in node.values
        ]
        return "".join(parts)
    return None


def name_of(call: ast.Call) -> str:
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def label_of(call: ast.Call) -> str:
    """Return the kind of message that the texts in a call are, or "" if it is none by itself."""
    name = name_of(call)
    if name in ERRORS or name == "error_for":
        return "error"
    labels = {"log": "log", "Progress": "progress", "task": "help", "Option": "help"}
    return labels.get(name, "")


ERRORS = {
    node.name
    for node in ast.parse((PACKAGE / "errors.py").read_text(encoding="utf-8")).body
    if isinstance(node, ast.ClassDef) and node.name not in ("Kind", "Finding", "Category")
}


def messages(node: ast.AST, label: str = "text") -> Iterator[tuple[str, str]]:
    """Yield the texts below a node, each with its label, in the order of the source."""
    if isinstance(node, ast.Assert) or (
        isinstance(node, ast.Call) and name_of(node) in NOT_SHOWN and not label_of(node)
    ):
        return
    if isinstance(node, ast.Call) and name_of(node) == "Finding":
        yield "finding", finding(node)
        return
    if isinstance(node, ast.Call):
        label = label_of(node) or label
    if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "OPTIONS":
        label = "help"
    if isinstance(node, ast.expr) and (text := template(node)) is not None:
        if is_prose(text, label):
            yield label, text
        return
    for child in children(node):
        yield from messages(child, label)


def finding(call: ast.Call) -> str:
    """Return a finding on one line, with what is not written in the call in braces."""
    parts = [*call.args, *(keyword.value for keyword in call.keywords)]
    words = [text if (text := template(part)) is not None else bare(part) for part in parts]
    kind = ast.unparse(parts[0]).rpartition(".")[2].lower().replace("_", " ")
    help_text = f" -> {words[4]}" if len(words) > 4 else ""
    return f"{kind}: expected {words[2]}, found {words[3]}{help_text}" if words[3:] else kind


def bare(node: ast.expr) -> str:
    return f"{{{ast.unparse(node)}}}"


def children(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the parts of a node that may hold texts: no docstrings, but those of tasks."""
    if isinstance(node, ast.Dict):
        yield from node.values
        return
    is_task = isinstance(node, ast.Call) and name_of(node) == "task"
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns") or (is_task and name == "args"):
            continue
        items = value if isinstance(value, list) else [value]
        if name == "body" and items and is_docstring(items[0]):
            if any(ast.unparse(d).startswith("task") for d in getattr(node, "decorator_list", ())):
                yield ast.Call(ast.Name("Option"), [items[0].value], [])
            items = items[1:]
        yield from (item for item in items if isinstance(item, ast.AST))


def is_docstring(node: object) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def is_prose(text: str, label: str) -> bool:
    """Tell words for a person from keys, patterns, names of files and format codes."""
    words = re.sub(r"\{[^}]*\}", "", text)
    return (
        bool(re.search(r"[A-Za-z]{2}", words))
        and "\\" not in text
        and (label == "error" or " " in text.strip())
    )


def page() -> str:
    """Return the page as it is to be."""
    blocks, room = [HEAD], ""
    paths = {path: path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")}
    for path, below in sorted(paths.items(), key=lambda item: (len(item[1].parts) > 1, item[1])):
        if below.as_posix() in NOT_READ:
            continue
        found = list(dict.fromkeys(messages(ast.parse(path.read_text(encoding="utf-8")))))
        if not found:
            continue
        if (new := below.parts[0] if len(below.parts) > 1 else "ground") != room:
            room = new
            blocks.append(f"## {room}\n")
        lines = [printable(f"- *{label}*: {' '.join(text.split())}") for label, text in found]
        blocks.append("\n".join([f"### {below.as_posix()}\n", *lines, ""]))
    return "\n".join(blocks)


def test_the_page_of_messages_is_current() -> None:
    """docs/messages.md has every message of the package; `make messages` writes it anew."""
    current = page()
    if os.environ.get(UPDATE):
        PAGE.write_text(current, encoding="utf-8")
    written = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    assert current == written, "docs/messages.md is not current: make messages"
