"""recombine.sh: parts to weight files without Python."""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "recombine.sh"
MANIFESTS = sorted((REPOSITORY / "manifests").glob("*.toml"))
COPY_AGAIN = "git lfs pull, or copy the part again"
ACCESS_PAGE = b"Access to model sesame/csm-1b is restricted. You must have access to it."


@dataclass
class Model:
    """One artifact of the fixture: its bytes, and its parts with their bytes, in order."""

    path: str
    group: str
    pins: tuple[str, ...]
    length: int
    part_size: int
    data: bytes = field(init=False)
    parts: dict[str, bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.data = random.Random(self.path).randbytes(self.length)
        starts = range(0, self.length, self.part_size)
        self.parts = {
            f"chunks/{self.group}/{self.path}.part-a{letter}": self.data[at : at + self.part_size]
            for letter, at in zip("abcdefgh", starts, strict=False)
        }

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def blob_id(self) -> str:
        pointer = "version https://git-lfs.github.com/spec/v1\n"
        pointer += f"oid sha256:{self.sha256}\nsize {self.length}\n"
        return hashlib.sha1(f"blob {len(pointer)}\0{pointer}".encode()).hexdigest()

    def toml(self) -> str:
        lines = ["[[artifact]]", f'path = "{self.path}"', f'group = "{self.group}" # a format']
        lines += [f"size = {self.length} # bytes"]
        lines += [f'{pin} = "{getattr(self, pin)}"' for pin in self.pins]
        lines += ['evidence = { size = "A", sha256 = "B", pieces = "A" }', "pieces = ["]
        offset = 0
        for part, data in self.parts.items():
            digest = hashlib.sha256(data).hexdigest()
            lines += [f'  {{ part = "{part}", offset = {offset}, size = {len(data)}, ']
            lines[-1] += f'sha256 = "{digest}" }},'
            offset += len(data)
        return "\n".join([*lines, "]", ""])


SAFETENSORS = Model("model.safetensors", "safetensors", ("sha256",), 300_000, 70_000)
CKPT = Model("ckpt.pt", "ckpt", ("blob_id",), 200_003, 80_000)

HEAD = """\
# "quotes" in a comment
schema = 1
name = "csm-1b"
description = "A # that is no comment."

[layout]
staging = "output"
destination = "."

"""
HUB = f"""\
[hub]
repo = "sesame/csm-1b"
revision = "{"c9" * 20}"

"""
# Everything here must be read past.
CONFIG = '''
[[artifact]]
path = "config.json"
group = "config"
size = 9
sha256 = "00"

[[artifact.alternative]]
size = 5
text = """
[[artifact]]
path = "from-a-text"
pieces = [
\\"""
"""
sha256 = "not a digest"
'''


@dataclass
class Tree:
    """A checkout: the script, a manifest and the parts of two formats."""

    root: Path

    @property
    def manifest(self) -> Path:
        return self.root / "manifests/csm-1b.toml"

    def write(self, *models: Model) -> Tree:
        (self.root / "manifests").mkdir(parents=True)
        shutil.copy(SCRIPT, self.root)
        self.manifest.write_text(HEAD + HUB + CONFIG.join(m.toml() for m in models))
        for model in models:
            for part, data in model.parts.items():
                (self.root / part).parent.mkdir(parents=True, exist_ok=True)
                (self.root / part).write_bytes(data)
        return self

    def edit(self, old: str, new: str) -> None:
        text = self.manifest.read_text()
        assert text.count(old) == 1
        self.manifest.write_text(text.replace(old, new))

    def run(
        self, *arguments: str, path: Path | None = None, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(self.root / "recombine.sh"), *arguments],
            env=environment(path),
            cwd=cwd or self.root,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def outputs(self) -> dict[str, bytes]:
        """Every file under output/, whatever its name."""
        found = (self.root / "output").rglob("*")
        return {p.name: p.read_bytes() for p in found if p.is_file()}

    def fingerprints(self) -> dict[str, tuple[int, int]]:
        """Inode number and time of writing (ns) of every file in output/."""
        stats = {p.name: p.stat() for p in (self.root / "output").iterdir()}
        return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def environment(path: Path | None) -> dict[str, str]:
    """This environment with one directory before, or instead of, the rest of PATH."""
    if path is None:
        return dict(os.environ)
    alone = (path / "bash").exists()
    return os.environ | {"PATH": str(path) if alone else f"{path}:{os.environ['PATH']}"}


def findings(result: subprocess.CompletedProcess[str]) -> list[str]:
    return [line.strip() for line in result.stderr.splitlines() if line.startswith("  ")]


def tool(directory: Path, name: str, body: str) -> Path:
    """A directory for PATH with one command of that name, written in bash."""
    directory.mkdir(exist_ok=True)
    script = directory / name
    script.write_text(f"#!{shutil.which('bash')}\n{body}\n")
    script.chmod(0o755)
    return directory


def wait_for(condition: Callable[[], bool]) -> None:
    """Returns when it holds; fails after 30 seconds."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path / "tree").write(SAFETENSORS, CKPT)


BOTH = {"model.safetensors": SAFETENSORS.data, "ckpt.pt": CKPT.data}
ASSEMBLED = [
    f"output/model.safetensors: assembled (300000 bytes, sha256 {SAFETENSORS.sha256})",
    f"output/ckpt.pt: assembled (200003 bytes, Hub blob id {CKPT.blob_id})",
]


@pytest.mark.parametrize("arguments", [(), ("all",), ("--model", "csm-1b"), ("--model=csm-1b",)])
def test_parts_become_the_published_bytes(tree: Tree, arguments: tuple[str, ...]) -> None:
    """Both files equal the bytes that were split, and stdout has one line for each."""
    result = tree.run(*arguments)

    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ASSEMBLED
    assert "No such file" not in result.stderr
    assert tree.outputs() == BOTH


def test_one_format_needs_only_its_own_parts(tree: Tree) -> None:
    """Asked for one format, the script neither reads nor misses the other one's parts."""
    shutil.rmtree(tree.root / "chunks/ckpt")

    result = tree.run("safetensors")

    assert result.returncode == 0, result.stderr
    assert {"model.safetensors": SAFETENSORS.data} == tree.outputs()


def test_default_is_the_formats_that_are_here(tree: Tree) -> None:
    """Without a format, one of which no part is here is left out."""
    shutil.rmtree(tree.root / "chunks/safetensors")

    result = tree.run()

    assert result.returncode == 0, result.stderr
    assert {"ckpt.pt": CKPT.data} == tree.outputs()


def test_no_part_at_all_is_missing_input(tree: Tree) -> None:
    """Without a format and without a part there is nothing to do, and that is an error."""
    shutil.rmtree(tree.root / "chunks")

    result = tree.run()

    assert (result.returncode, result.stdout) == (3, "")
    assert (
        "no part of csm-1b is here -> copy the parts to chunks/safetensors/ chunks/ckpt/ or"
        in result.stderr
    )
    assert "git lfs pull" in result.stderr
    assert findings(result) == [
        f"hf download sesame/csm-1b '{path}' --revision {'c9' * 20} --local-dir 'output'"
        for path in ("model.safetensors", "ckpt.pt")
    ]


def test_no_part_of_a_model_that_is_not_on_the_hub(tree: Tree) -> None:
    """Where the manifest names no repository, no download is suggested."""
    shutil.rmtree(tree.root / "chunks")
    tree.edit(HUB, "")

    result = tree.run()

    assert (result.returncode, findings(result)) == (3, [])
    assert "no part of csm-1b is here -> " in result.stderr
    assert "hf " not in result.stderr


def test_other_directory_and_spaces(tmp_path: Path) -> None:
    """The script works on its own checkout, from anywhere, with spaces in the path."""
    tree = Tree(tmp_path / "my own  checkout").write(SAFETENSORS, CKPT)

    result = tree.run(cwd=tmp_path)

    assert result.returncode == 0, result.stderr
    assert tree.outputs() == BOTH


def test_called_through_a_symlink(tree: Tree, tmp_path: Path) -> None:
    """A chain of links to the script, relative and absolute, leads to its own checkout."""
    (tmp_path / "my bin").mkdir()
    (tmp_path / "my bin/recombine").symlink_to("../second")
    (tmp_path / "second").symlink_to(tree.root / "recombine.sh")

    result = subprocess.run(["my bin/recombine"], cwd=tmp_path, capture_output=True, text=True)

    assert result.returncode == 0, result.stderr
    assert tree.outputs() == BOTH


def test_symlinked_parts_are_parts(tree: Tree, tmp_path: Path) -> None:
    """A part may be a symlink to a file elsewhere."""
    shutil.move(tree.root / "chunks/ckpt", tmp_path / "elsewhere")
    (tree.root / "chunks/ckpt").mkdir()
    for part in (tmp_path / "elsewhere").iterdir():
        (tree.root / "chunks/ckpt" / part.name).symlink_to(part)

    assert tree.run("ckpt").returncode == 0
    assert {"ckpt.pt": CKPT.data} == tree.outputs()


PART = "chunks/safetensors/model.safetensors.part-ab"


def _replace_by_directory(part: Path) -> None:
    part.unlink()
    part.mkdir()


def _replace_by_link(part: Path, target: str) -> None:
    part.unlink()
    part.symlink_to(target)


def _flip_one_bit(part: Path) -> None:
    data = bytearray(part.read_bytes())
    data[300] ^= 1
    part.write_bytes(data)


FLIPPED = bytearray(SAFETENSORS.parts[PART])
FLIPPED[300] ^= 1
DIGEST_LINE = (
    f"wrong digest: expected sha256 {hashlib.sha256(SAFETENSORS.parts[PART]).hexdigest()}, "
    f"found {hashlib.sha256(FLIPPED).hexdigest()} -> git lfs pull, or copy it again"
)
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 70000\n"


@dataclass
class Bad:
    """One way a part goes wrong: what to do to it, and the code and finding that follow."""

    name: str
    damage: Callable[[Path], object]
    code: int
    line: str


BAD_PARTS = [
    Bad(
        "missing_part",
        lambda part: part.unlink(),
        3,
        f"missing: expected 70000 bytes, found no such file -> {COPY_AGAIN}",
    ),
    Bad(
        "dangling_link",
        lambda part: _replace_by_link(part, "nowhere"),
        3,
        f"missing: expected 70000 bytes, found no such file -> {COPY_AGAIN}",
    ),
    Bad(
        "looping_link",
        lambda part: _replace_by_link(part, part.name),
        3,
        f"missing: expected 70000 bytes, found no such file -> {COPY_AGAIN}",
    ),
    Bad(
        "lfs_pointer",
        lambda part: part.write_text(POINTER),
        3,
        f"git-lfs pointer: expected 70000 bytes, found a pointer of {len(POINTER)} bytes"
        " -> git lfs pull",
    ),
    Bad(
        "short_part",
        lambda part: part.write_bytes(part.read_bytes()[:-1]),
        4,
        f"wrong size: expected 70000 bytes, found 69999 bytes -> {COPY_AGAIN}",
    ),
    Bad(
        "empty_part",
        lambda part: part.write_bytes(b""),
        4,
        f"wrong size: expected 70000 bytes, found 0 bytes -> {COPY_AGAIN}",
    ),
    Bad("flipped_bit", _flip_one_bit, 4, DIGEST_LINE),
    Bad(
        "access_page",
        lambda part: part.write_bytes(ACCESS_PAGE),
        4,
        "access page: expected 70000 bytes, found the Hub's refusal, saved as the file"
        f" -> {COPY_AGAIN}",
    ),
    Bad(
        "directory",
        _replace_by_directory,
        4,
        f"unreadable: expected 70000 bytes, found something that is not a file -> {COPY_AGAIN}",
    ),
    Bad(
        "no_permission",
        lambda part: part.chmod(0),
        4,
        f"unreadable: expected 70000 bytes, found a file that cannot be read -> chmod u+r '{PART}'",
    ),
]


@pytest.mark.parametrize("bad", BAD_PARTS, ids=lambda bad: bad.name)
def test_bad_part_is_its_own_finding(tree: Tree, bad: Bad) -> None:
    """One bad part is named with what is wrong with it, and not even output/ appears."""
    if bad.name == "no_permission" and os.geteuid() == 0:
        pytest.skip("root reads everything")
    bad.damage(tree.root / PART)

    result = tree.run()

    assert [f"{PART}: {bad.line}"] == findings(result)
    assert (bad.code, "") == (result.returncode, result.stdout)
    assert not (tree.root / "output").exists()


@pytest.mark.parametrize("name", ["ckpt.pt.part-a", "ckpt.pt.part-ab.bak", "ckpt.pt.part-aa (1)"])
def test_extra_part_is_refused(tree: Tree, name: str) -> None:
    """A file that a `cat part-*` would have swallowed is a finding."""
    (tree.root / "chunks/ckpt" / name).write_bytes(b"x")

    result = tree.run()

    expected = f"chunks/ckpt/{name}: unexpected part: expected only the parts in "
    assert [expected + "manifests/csm-1b.toml, found one more -> move it away"] == findings(result)
    assert (result.returncode, tree.outputs()) == (4, {})


def test_all_findings_at_once(tree: Tree) -> None:
    """Everything wrong in both formats is shown in one run; wrong content decides the code."""
    names = [*SAFETENSORS.parts, *CKPT.parts]
    damages = [b.damage for b in BAD_PARTS if b.name not in ("no_permission", "looping_link")]
    damaged = names[: len(damages)]
    for name, damage in zip(damaged, damages, strict=True):
        damage(tree.root / name)
    extra = "chunks/ckpt/ckpt.pt.part-zz"
    (tree.root / extra).write_bytes(b"x")

    result = tree.run()

    assert sorted([*damaged, extra]) == sorted(line.split(": ")[0] for line in findings(result))
    assert (result.returncode, tree.outputs()) == (4, {})
    assert f"{len(damaged) + 1} finding(s)" in result.stderr


def test_missing_and_pointer_together_are_missing_input(tree: Tree) -> None:
    """An incomplete clone is code 3, however many parts are not there."""
    for part in CKPT.parts:
        (tree.root / part).write_text(POINTER)
    (tree.root / PART).unlink()

    result = tree.run()

    assert (3, len(CKPT.parts) + 1) == (result.returncode, len(findings(result)))


ARTIFACT_SHA = f'\nsha256 = "{SAFETENSORS.sha256}"'
INCONSISTENT = {
    "sizes_do_not_add_up": ("size = 300000", "size = 300001"),
    "hole": ("offset = 70000,", "offset = 70001,"),
    "overlap": ("offset = 80000,", "offset = 79999,"),
    "octal_offset": ("offset = 70000,", "offset = 070000,"),
    "underscores_in_a_size": ("size = 300000", "size = 300_000"),
    "no_size": ("size = 300000 # bytes\n", ""),
    "short_digest": (SAFETENSORS.sha256, SAFETENSORS.sha256[1:]),
    "digest_not_hex": (SAFETENSORS.sha256, "g" + SAFETENSORS.sha256[1:]),
    "digest_unquoted": (ARTIFACT_SHA, ARTIFACT_SHA.replace('"', "")),
    "key_twice": (ARTIFACT_SHA, ARTIFACT_SHA * 2),
    "blob_id_not_hex": (CKPT.blob_id, "z" * 40),
    "part_twice": ("part-ac", "part-ab"),
    "part_outside": ("chunks/ckpt/ckpt.pt.part-aa", "../ckpt.pt.part-aa"),
    "path_outside": ('path = "ckpt.pt"', 'path = "/tmp/ckpt.pt"'),
    "staging_outside": ('staging = "output"', 'staging = "../output"'),
    "no_layout": ("[layout]", "[outlay]"),
    "repo_is_an_option": ('repo = "', 'repo = "--'),
    "repo_with_a_command": ("sesame/csm-1b", "sesame/csm-1b; x"),
    "revision_is_no_commit": ("c9" * 20, "main"),
    "other_schema": ("schema = 1", "schema = 2"),
    "other_name": ('name = "csm-1b"', 'name = "csm-2b"'),
    "text_never_closed": ('\\"""\n"""', '\\"""\n'),
    "a_line_of_nothing_known": ("schema = 1", "schema = 1\n<<<<<<< HEAD"),
}


@pytest.mark.parametrize("name", INCONSISTENT)
def test_manifest_that_contradicts_itself_is_not_guessed_at(tmp_path: Path, name: str) -> None:
    """A manifest that cannot be what was published stops the run before anything is written."""
    ckpt = Model("ckpt.pt", "ckpt", ("blob_id",), 150_000, 80_000)
    tree = Tree(tmp_path).write(SAFETENSORS, ckpt)
    old, new = INCONSISTENT[name]
    tree.edit(old.replace(CKPT.blob_id, ckpt.blob_id), new)

    result = tree.run()

    assert (result.returncode, result.stdout) == (4, "")
    assert "the manifest cannot be understood" in result.stderr
    assert findings(result)[0].startswith("manifests/csm-1b.toml, line ")
    assert tree.outputs() == {}


def test_manifest_with_windows_line_ends(tree: Tree) -> None:
    """A checkout that turned line ends into CRLF is read the same."""
    tree.manifest.write_bytes(tree.manifest.read_bytes().replace(b"\n", b"\r\n"))

    assert tree.run().returncode == 0
    assert tree.outputs() == BOTH


@pytest.mark.parametrize("pin", ["sha256", "blob_id"])
def test_whole_file_must_be_right_too(tree: Tree, pin: str) -> None:
    """Right parts that make a wrong whole are refused, and what was there before stays."""
    model = SAFETENSORS if pin == "sha256" else CKPT
    (tree.root / "output").mkdir()
    (tree.root / "output" / model.path).write_bytes(b"before")
    right = getattr(model, pin)
    tree.edit(right, "0" * len(right))

    result = tree.run(model.group)

    assert result.returncode == 4
    assert f"{'0' * len(right)}, found {right}" in result.stderr
    assert {model.path: b"before"} == tree.outputs()


PINS = [("sha256",), ("blob_id",), ("sha256", "blob_id"), ()]
WRITES_WRONG = {
    "a_byte": 'head -c 10 "$1"; printf X; tail -c +12 "$1"',
    "a_byte_less": 'tail -c +2 "$1"',
    "a_byte_more": 'tail -c +1 "$1"; [[ $1 != *-ac ]] || printf X',
    "nothing": "",
}


@pytest.mark.parametrize("pins", PINS, ids="+".join)
@pytest.mark.parametrize("fault", WRITES_WRONG)
def test_what_was_written_is_proven(tmp_path: Path, pins: tuple[str, ...], fault: str) -> None:
    """A disk that keeps other bytes than it was given is noticed, by whichever digest is pinned."""
    tree = Tree(tmp_path / "tree").write(Model("ckpt.pt", "ckpt", pins, 100_000, 40_000))

    bad = tree.run(path=tool(tmp_path / "bin", "cat", WRITES_WRONG[fault]))
    assert (bad.returncode, tree.outputs()) == (4, {})

    good = tree.run()
    assert (good.returncode, list(tree.outputs())) == (0, ["ckpt.pt"])


def test_good_output_is_kept(tree: Tree) -> None:
    """A second run proves the files that are there and leaves them alone."""
    tree.run()
    before = tree.fingerprints()

    result = tree.run()

    assert [line.replace("assembled", "already right, kept") for line in ASSEMBLED] == (
        result.stdout.splitlines()
    )
    assert result.returncode == 0
    assert tree.fingerprints() == before


@pytest.mark.parametrize("old", [b"short", bytes(300_000)], ids=["other_size", "same_size"])
def test_wrong_output_is_replaced(tree: Tree, old: bytes) -> None:
    """A wrong file under the final name gives way to the proven one."""
    (tree.root / "output").mkdir()
    (tree.root / "output/model.safetensors").write_bytes(old)

    assert tree.run().returncode == 0
    assert tree.outputs() == BOTH


def test_wrong_output_stays_while_parts_are_bad(tree: Tree) -> None:
    """Nothing is taken away from a person before there is something better."""
    tree.run("safetensors")
    (tree.root / "output/ckpt.pt").write_bytes(b"old")
    (tree.root / PART).unlink()

    result = tree.run()

    assert (result.returncode, result.stdout) == (3, "")
    assert tree.outputs() == {"ckpt.pt": b"old", "model.safetensors": SAFETENSORS.data}


IN_THE_WAY = (
    "something in the way: expected a plain file or nothing, found something else -> move it away"
)


def _fifo(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("make", [Path.mkdir, _fifo], ids=["directory", "fifo"])
def test_something_under_the_final_name(tree: Tree, make: Callable[[Path], None]) -> None:
    """What is no file under a final name is a finding; nothing is moved into it or over it."""
    (tree.root / "output").mkdir()
    make(tree.root / "output/ckpt.pt")

    result = tree.run()

    assert [f"output/ckpt.pt: {IN_THE_WAY}"] == findings(result)
    assert (result.returncode, result.stdout, tree.outputs()) == (4, "", {})


def test_directory_that_appears_under_the_final_name(tree: Tree, tmp_path: Path) -> None:
    """A directory made while the file is written is not taken for a place to move it into."""
    path = tool(tmp_path / "bin", "cat", 'mkdir -p output/ckpt.pt; tail -c +1 "$1"')

    result = tree.run("ckpt", path=path)

    assert (result.returncode, result.stdout, tree.outputs()) == (4, "", {})
    assert "output/ckpt.pt: something in the way" in result.stderr


@pytest.fixture
def dead() -> int:
    """The id of a process that is no more."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def partial(tree: Tree, pid: int | str) -> Path:
    (tree.root / "output").mkdir(exist_ok=True)
    return tree.root / f"output/ckpt.pt.recombine-partial.{pid}"


def run_with_partial(tree: Tree, make: str) -> subprocess.CompletedProcess[str]:
    """Runs the script after a command that gets the name its own partial will have as $1."""
    name = partial(tree, "$$")
    return subprocess.run(
        ["bash", "-c", f'set -- "{name}"; {make}; exec bash ./recombine.sh'],
        cwd=tree.root,
        capture_output=True,
        text=True,
    )


def test_partial_of_a_killed_run_is_removed(tree: Tree, dead: int) -> None:
    """What a killed run left behind does not fill the disk for ever."""
    partial(tree, dead).write_bytes(b"half")

    assert tree.run().returncode == 0
    assert tree.outputs() == BOTH


@pytest.mark.parametrize("pid", [1, os.getpid(), "mine"], ids=["first", "this", "no number"])
def test_partial_of_a_live_process_is_kept(tree: Tree, pid: int | str) -> None:
    """What another run is writing, whoever's it is, and what is no partial, stays."""
    partial(tree, pid).write_bytes(b"half")

    assert tree.run().returncode == 0
    assert tree.outputs() == BOTH | {partial(tree, pid).name: b"half"}


def test_directory_under_the_partial_name(tree: Tree, dead: int) -> None:
    """A directory under the name of a partial is a finding, not a failure of rm."""
    partial(tree, dead).mkdir()

    result = tree.run()

    assert [f"output/{partial(tree, dead).name}: {IN_THE_WAY}"] == findings(result)
    assert (result.returncode, result.stdout, tree.outputs()) == (4, "", {})


def test_directory_under_the_own_partial_name(tree: Tree) -> None:
    """A directory under the very name that this run would write is a finding as well."""
    result = run_with_partial(tree, 'mkdir "$1"')

    assert findings(result)[0].endswith(f": {IN_THE_WAY}")
    assert (result.returncode, result.stdout, tree.outputs()) == (4, "", {})


def test_symlink_under_the_partial_name_is_not_written_through(tree: Tree) -> None:
    """What the partial name happens to point at keeps its bytes."""
    (tree.root / "precious").write_bytes(b"precious")

    result = run_with_partial(tree, 'ln -s ../precious "$1"')

    assert result.returncode == 0, result.stderr
    assert (tree.root / "precious").read_bytes() == b"precious"
    assert tree.outputs() == BOTH


def test_bytes_and_then_names_are_made_durable(tree: Tree, tmp_path: Path) -> None:
    """What is written reaches the disk before it gets its name, and the names do at the end."""
    path = tool(tmp_path / "bin", "sync", "echo $(ls output) >>synced")

    assert tree.run(path=path).returncode == 0

    seen = (tree.root / "synced").read_text().splitlines()
    assert [re.sub(r"[.]\d+", ".N", line) for line in seen] == [
        "model.safetensors.recombine-partial.N",
        "ckpt.pt.recombine-partial.N model.safetensors",
        "ckpt.pt model.safetensors",
    ]


def test_two_runs_at_once(tree: Tree, tmp_path: Path) -> None:
    """A run that starts and ends while another one writes does not disturb it."""
    wait = 'head -c 1000 "$1"; : >waiting; while [[ ! -e go ]]; do sleep 0.02; done'
    path = tool(tmp_path / "bin", "cat", f'{wait}; tail -c +1001 "$1"')
    with subprocess.Popen(
        ["bash", str(tree.root / "recombine.sh")],
        env=environment(path),
        cwd=tree.root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as first:
        wait_for((tree.root / "waiting").exists)
        second = tree.run()
        (tree.root / "go").touch()
        stdout, stderr = first.communicate(timeout=30)

    assert (second.returncode, first.returncode) == (0, 0), second.stderr + stderr
    assert second.stdout.splitlines() == stdout.splitlines() == ASSEMBLED
    assert tree.outputs() == BOTH


def test_tool_that_fails_stops_the_run(tree: Tree, tmp_path: Path) -> None:
    """A broken awk does not pass for a manifest that lists nothing."""
    result = tree.run(path=tool(tmp_path / "bin", "awk", "echo broken >&2; exit 2"))

    assert (result.returncode, result.stderr) == (2, "broken\n")
    assert tree.outputs() == {}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_interrupted_run_leaves_nothing_behind(
    tree: Tree, tmp_path: Path, number: signal.Signals
) -> None:
    """Ctrl-C in the middle of writing removes the partial file; the code is 130."""
    path = tool(tmp_path / "bin", "cat", 'head -c 1000 "$1"; exec sleep 30')
    with subprocess.Popen(
        ["bash", str(tree.root / "recombine.sh")],
        env=environment(path),
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        half = tree.root / f"output/model.safetensors.recombine-partial.{process.pid}"
        wait_for(lambda: half.exists() and half.stat().st_size == 1000)
        os.killpg(process.pid, number)
        _, stderr = process.communicate(timeout=30)

    assert process.returncode == 130, stderr
    assert tree.outputs() == {}


def test_too_little_disk(tree: Tree, tmp_path: Path) -> None:
    """Too little room is an error before anything is written, and says how much is missing."""
    row = "/dev/my disk 9000 8900 100 99% /mount/my disk"
    path = tool(tmp_path / "bin", "df", f'echo "Filesystem 1024-blocks"; echo "{row}"')

    result = tree.run(path=path)

    assert result.returncode == 7
    assert "expected 489 KiB free, found 100 KiB, 389 KiB too few" in result.stderr
    assert not (tree.root / "output").exists()


def test_disk_that_takes_no_more(tree: Tree) -> None:
    """A write that fails half way leaves no file and is a disk error."""
    result = subprocess.run(
        ["bash", "-c", "ulimit -f 100; exec bash ./recombine.sh"],
        cwd=tree.root,
        capture_output=True,
        text=True,
    )

    assert result.returncode == 7, result.stderr
    assert "output/model.safetensors: cannot be written" in result.stderr
    assert tree.outputs() == {}


TOOLS = ["bash", "awk", "cat", "cut", "df", "dirname", "grep", "head", "mkdir", "mv", "rm"]
TOOLS += ["sed", "sort", "sync", "tail", "tr", "wc"]


def test_shasum_where_sha256sum_is_absent(tree: Tree, tmp_path: Path) -> None:
    """macOS has shasum only; that is enough for sha256 and for the Hub's blob id."""
    path = tmp_path / "bin"
    path.mkdir()
    for name in TOOLS:
        (path / name).symlink_to(shutil.which(name) or pytest.fail(name))
    arguments = f'[ "$1" = -a ] && exec "{sys.executable}" -c "import hashlib, sys; '
    arguments += "print(hashlib.new('sha' + sys.argv[1], sys.stdin.buffer.read()).hexdigest(), '-')"
    tool(path, "shasum", arguments + '" "$2"')

    result = tree.run(path=path)

    assert result.returncode == 0, result.stderr
    assert (tree.outputs(), result.stdout.splitlines()) == (BOTH, ASSEMBLED)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--model", "no-such"),
        ("--model", "../csm-1b"),
        ("--model",),
        ("config",),
        ("--fast",),
        ("ckpt", "safetensors"),
    ],
    ids=" ".join,
)
def test_wrong_usage(tree: Tree, arguments: tuple[str, ...]) -> None:
    """An option, model or format that does not exist is refused and nothing is done."""
    shutil.copy(tree.manifest, tree.root)

    result = tree.run(*arguments)

    assert (result.returncode, result.stdout, tree.outputs()) == (1, "", {})
    assert "recombine.sh: " in result.stderr


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help(tree: Tree, option: str) -> None:
    """The help is a result, on stdout, and names every option and exit code."""
    result = tree.run(option)

    assert (result.returncode, result.stderr) == (0, "")
    assert [w for w in ("--model", "--list", "130", "safetensors") if w not in result.stdout] == []


def test_next_step_works_without_python(tree: Tree) -> None:
    """The commands that a successful run suggests put the files where they belong."""
    result = tree.run()

    subprocess.run(["bash", "-ec", "\n".join(findings(result))], cwd=tree.root, check=True)

    assert CKPT.data == (tree.root / "ckpt.pt").read_bytes()
    assert SAFETENSORS.data == (tree.root / "model.safetensors").read_bytes()


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.stem)
def test_list_is_what_the_manifest_says(manifest: Path) -> None:
    """The script's own reader of TOML and Python's agree on every manifest of this repository."""
    artifacts = tomllib.loads(manifest.read_text())["artifact"]
    expected = [
        f"{artifact['path']}\t{piece['part']}\t{piece['offset']}\t{piece['size']}\t{piece['sha256']}"
        for artifact in artifacts
        for piece in artifact.get("pieces", [])
        if "part" in piece
    ]

    result = subprocess.run(
        ["bash", str(SCRIPT), "--list", "--model", manifest.stem],
        capture_output=True,
        text=True,
        check=True,
    )

    assert expected == result.stdout.splitlines()


def test_csm_1b_has_twelve_parts(tmp_path: Path) -> None:
    """The published model comes in six parts for each of its two formats."""
    result = subprocess.run(
        ["bash", str(SCRIPT), "--list"], cwd=tmp_path, capture_output=True, text=True, check=True
    )

    sizes = [int(line.split("\t")[3]) for line in result.stdout.splitlines()]
    assert (len(sizes), sum(sizes)) == (12, 6_211_186_784 + 6_219_618_714)


def test_script_is_executable_and_shellcheck_clean() -> None:
    """The script can be called as it is, and shellcheck has nothing to say about it."""
    shellcheck = shutil.which(
        "shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (it comes with the test extra)")

    result = subprocess.run([shellcheck, str(SCRIPT)], capture_output=True, text=True)

    assert (result.returncode, result.stdout) == (0, "")
    assert os.access(SCRIPT, os.X_OK)
