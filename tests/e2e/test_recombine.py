"""recombine.sh: chunk files to weight files, without Python."""

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
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from csm_weights.commands.split import split_file, write_chunk_list
from csm_weights.hashing import blob_id
from csm_weights.manifest.parse import load
from csm_weights.manifest.render import render
from csm_weights.manifest.types import Artifact, Manifest
from csm_weights.pipeline import apply
from csm_weights.pipeline.request import Request
from csm_weights.verify.sums import render_chunk_list
from tests.support.names import NAMES
from tests.support.privileges import UNPRIVILEGED

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "recombine.sh"
SHIPPED = ("csm-1b", "csm-tiny")
HELP = "git restore chunks, copy the file again, or make weights MODEL=csm-1b"
ACCESS_PAGE = b"Access to model sesame/csm-1b is restricted. You must have access to it."


@dataclass
class Model:
    """One joined file of the fixture: its bytes, and its chunk files with theirs, in order."""

    name: str
    folder: str
    pins: tuple[str, ...]
    size: int
    chunk_size: int
    data: bytes = field(init=False)
    chunks: dict[str, bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.data = random.Random(self.name).randbytes(self.size)
        starts = range(0, self.size, self.chunk_size)
        self.chunks = {
            f"chunks/{self.folder}/{self.name}.part-a{c}": self.data[at : at + self.chunk_size]
            for c, at in zip("abcdefgh", starts, strict=False)
        }

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def list(self) -> str:
        """The SHA256SUMS beside the chunk files."""
        ids = {"sha256": self.sha256, "Hub blob id": blob_id(self.sha256, self.size)}
        pins = "".join(f", {pin} {ids[pin]}" for pin in self.pins)
        lines = [f"# {self.name}: {self.size} bytes{pins}"]
        for path, data in self.chunks.items():
            lines.append(f"{hashlib.sha256(data).hexdigest()}  {Path(path).name}")
        return "\n".join(lines) + "\n"


SAFETENSORS = Model("model.safetensors", "safetensors", ("sha256", "Hub blob id"), 300_000, 70_000)
CKPT = Model("ckpt.pt", "ckpt", ("Hub blob id",), 200_003, 80_000)


@dataclass
class Tree:
    """A checkout: the script, a manifest, and the chunk files of two formats with their lists."""

    root: Path

    def write(self, *models: Model) -> Tree:
        (self.root / "manifests").mkdir(parents=True)
        (self.root / "manifests/csm-1b.toml").write_text("# only its name counts\n")
        shutil.copy(SCRIPT, self.root)
        for model in models:
            for path, data in model.chunks.items():
                (self.root / path).parent.mkdir(parents=True, exist_ok=True)
                (self.root / path).write_bytes(data)
            self.list(model).write_text(model.list)
        return self

    def list(self, model: Model) -> Path:
        return self.root / "chunks" / model.folder / "SHA256SUMS"

    def edit(self, model: Model, old: str, new: str) -> None:
        text = self.list(model).read_text()
        assert text.count(old) == 1
        self.list(model).write_text(text.replace(old, new))

    def run(
        self,
        *arguments: str,
        path: Path | None = None,
        cwd: Path | None = None,
        before: tuple[str, ...] = (),
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*before, "bash", str(self.root / "recombine.sh"), *arguments],
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
    """Return when it holds; fail after 30 seconds."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path / "tree").write(SAFETENSORS, CKPT)


BOTH = {"model.safetensors": SAFETENSORS.data, "ckpt.pt": CKPT.data}
JOINED = [
    f"output/ckpt.pt: joined (sha256 {CKPT.sha256})",
    f"output/model.safetensors: joined (sha256 {SAFETENSORS.sha256})",
]


# ---- the lists


@pytest.mark.parametrize("name", SHIPPED)
def test_lists_say_what_the_manifest_says(name: str) -> None:
    """The SHA256SUMS beside the chunk files of a shipped model are those of its manifest."""
    artifacts = [a for a in load(REPOSITORY / f"manifests/{name}.toml").artifacts if a.pieces]
    lists = {(REPOSITORY / a.pieces[0].part).with_name("SHA256SUMS"): a for a in artifacts}

    assert len(lists) == 2
    for path, artifact in lists.items():
        assert path.read_text() == render_chunk_list(artifact)


def split_all(root: Path) -> Manifest:
    """Split a file of each name of the table into chunks/toy/, and write the manifest."""
    artifacts: list[Artifact] = []
    for name in NAMES:
        file = root / "made" / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(random.Random(name).randbytes(5000))
        artifact = split_file(file, root, "chunks/toy", 2000, lambda _: None)
        # The bytes are random, and a group has few letters.
        artifacts.append(replace(artifact, group=f"g{len(artifacts)}", format="opaque"))
        write_chunk_list(root, artifact)
    manifest = Manifest("toy", "output/toy", "models/toy", tuple(artifacts))
    (root / "manifests").mkdir()
    (root / "manifests/toy.toml").write_text(render(manifest))
    return manifest


def test_any_name_passes_split_weights_and_recombine(tmp_path: Path) -> None:
    """A file of each name in the table is split, joined by the script, and installed by weights."""
    manifest = split_all(tmp_path)
    shutil.copy(SCRIPT, tmp_path)

    for check in ("sha256sum", "shasum"):
        command = [check, "--strict", "-c", "SHA256SUMS"]
        done = subprocess.run(command, cwd=tmp_path / "chunks/toy", capture_output=True, text=True)
        assert (done.returncode, done.stderr, done.stdout.count(": OK")) == (0, "", 3 * len(NAMES))
    joined = Tree(tmp_path).run("--model", "toy")
    assert joined.returncode == 0, joined.stderr
    for folder in ("output/toy", "models/toy"):
        for made in (tmp_path / "made").iterdir():
            assert (tmp_path / folder / made.name).read_bytes() == made.read_bytes()
        shutil.rmtree(tmp_path / "output")  # weights takes the chunk files, not these
        outcome = apply.weights(Request(tmp_path, "toy", ("all", ".hidden")), smoke=False)
        assert outcome.error is None
    assert len(manifest.artifacts) == len(NAMES)


@pytest.mark.parametrize("end", ["\n", "\r\n", ""], ids=["lf", "crlf", "no last line end"])
def test_line_ends_of_a_list(tree: Tree, end: str) -> None:
    """Windows line ends, and a last line without one, are read the same."""
    for model in (SAFETENSORS, CKPT):
        text = model.list.replace("\n", end) if end else model.list.rstrip("\n")
        tree.list(model).write_bytes(text.encode())

    assert tree.run().returncode == 0
    assert tree.outputs() == BOTH


def test_the_fortieth_joined_file_of_a_folder(tmp_path: Path) -> None:
    """A list may describe many files, each before its chunk files."""
    models = [Model(f"m{index}.bin", "ckpt", ("sha256",), 50, 30) for index in range(40)]
    tree = Tree(tmp_path / "tree").write(*models)
    tree.list(models[0]).write_text("# a comment\n\n".join(m.list for m in models))

    result = tree.run()

    assert result.returncode == 0, result.stderr
    assert tree.outputs() == {m.name: m.data for m in models}


FIRST = hashlib.sha256(SAFETENSORS.data[:70_000]).hexdigest()
WRONG_LISTS = {
    "no size": (f"{SAFETENSORS.size} bytes, ", ""),
    "octal size": (f"{SAFETENSORS.size} bytes", f"0{SAFETENSORS.size} bytes"),
    "endless size": (f"{SAFETENSORS.size} bytes", f"{'9' * 16} bytes"),
    "no pin": (SAFETENSORS.list.splitlines()[0], "# model.safetensors: 300000 bytes"),
    "no joined file": (SAFETENSORS.list.splitlines()[0], "# nothing"),
    "another joined file": ("# model.safetensors", "# ckpt.pt"),
    "file outside": ("# model.safetensors", "# ../model.safetensors"),
    "short digest": (FIRST, FIRST[1:]),
    "upper case": (FIRST, FIRST.upper()),
    "no hex": (FIRST, "g" + FIRST[1:]),
    "chunk file outside": ("model.safetensors.part-aa", "../safetensors/model.safetensors.part-aa"),
    "chunk file elsewhere": ("model.safetensors.part-aa", "/tmp/model.safetensors.part-aa"),
    "an option": ("model.safetensors.part-aa", "--help"),
    "another file's chunk file": ("model.safetensors.part-aa", "ckpt.pt.part-aa"),
    "git's marks": ("# model.safetensors", "<<<<<<< HEAD\n# model.safetensors"),
    "a page": (SAFETENSORS.list, "<!DOCTYPE html>\n"),
    "a pointer": (SAFETENSORS.list, f"version https://git-lfs.github.com/spec/v1\noid {FIRST}\n"),
}


@pytest.mark.parametrize("name", WRONG_LISTS)
def test_a_list_that_is_not_understood_is_not_guessed_at(tree: Tree, name: str) -> None:
    """A list with any line that split does not write stops the run before anything is written."""
    tree.edit(SAFETENSORS, *WRONG_LISTS[name])

    result = tree.run()

    assert (result.returncode, result.stdout) == (4, "")
    assert "chunks/safetensors/SHA256SUMS: malformed: " in findings(result)[0]
    assert not (tree.root / "output").exists()


def _as_fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def _as_link(path: Path, target: str) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def _as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


NO_FILES: dict[str, Callable[[Path], object]] = {
    "nothing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "folder": _as_folder,
    "fifo": _as_fifo,
    "link to a device": lambda path: _as_link(path, "/dev/zero"),
    "link to nowhere": lambda path: _as_link(path, "nowhere"),
    "link to itself": lambda path: _as_link(path, path.name),
    "link to /proc": lambda path: _as_link(path, "/proc/kmsg"),
}


@pytest.mark.parametrize("name", NO_FILES)
def test_a_list_that_is_no_file(tree: Tree, name: str) -> None:
    """Chunk files without a list, or with a pipe or device in its place, are a finding at once."""
    NO_FILES[name](tree.list(CKPT))

    result = tree.run()

    help_text = "git checkout chunks/ckpt, or chmod u+rwx chunks/ckpt"
    line = f"missing: expected a list of chunk files, found none -> {help_text}"
    assert findings(result) == [f"chunks/ckpt/SHA256SUMS: {line}"]
    assert (result.returncode, tree.outputs()) == (3, {})


@pytest.mark.parametrize("mode", [0o000, 0o100, 0o400], ids=oct)
@pytest.mark.parametrize("arguments", [(), ("all",), ("safetensors",)], ids=str)
def test_a_closed_folder_is_not_passed_over(
    tree: Tree, mode: int, arguments: tuple[str, ...]
) -> None:
    """A folder of chunk files that cannot be read is a finding, whatever was asked for."""
    folder = tree.root / "chunks/safetensors"
    folder.chmod(mode)

    result = tree.run(*arguments, before=UNPRIVILEGED)

    folder.chmod(0o755)
    assert findings(result)[0].startswith("chunks/safetensors/SHA256SUMS: unreadable: ")
    assert (result.returncode, tree.outputs()) == (4, {})


def test_names_do_not_drive_the_terminal(tree: Tree) -> None:
    """Control, bidirectional and invisible characters in a list are printed escaped."""
    evil = "\x1b]0;owned\x07\x9b2J\r\u202e\u200b.part-aa"
    (tree.root / f"chunks/ckpt/{evil}").write_bytes(b"x")
    tree.list(CKPT).write_text(
        f"# {evil[:-8]}: 1 bytes, sha256 {FIRST}\n{FIRST}  {evil}\nbad\x1b[\n"
    )

    result = tree.run("ckpt")

    assert result.returncode == 4
    assert re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", result.stderr) is None
    assert re.search("[\u200b\u202e]", result.stderr) is None
    assert r"chunks/ckpt/\E]0;owned\a\302\2332J\r\342\200\256\342\200\213.part-aa" in result.stderr


def test_letters_of_any_language_are_printed_as_they_are(tree: Tree) -> None:
    """A name in Japanese or with accents is no reason to escape."""
    name = "\u30e2\u30c7\u30eb \xe9t\xe9 \U0001f600.part-aa"
    tree.list(CKPT).write_text(f"# {name[:-8]}: 1 bytes, sha256 {FIRST}\n{FIRST}  {name}\n")
    assert f"chunks/ckpt/{name}: missing" in tree.run("ckpt").stderr


# ---- joining


@pytest.mark.parametrize("arguments", [(), ("all",), ("--model", "csm-1b"), ("--model=csm-1b",)])
def test_chunk_files_become_the_published_bytes(tree: Tree, arguments: tuple[str, ...]) -> None:
    """Both files equal the bytes that were split, and stdout has one line for each."""
    result = tree.run(*arguments)

    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == JOINED
    assert "No such file" not in result.stderr
    assert tree.outputs() == BOTH


def test_one_format_needs_only_its_own_chunk_files(tree: Tree) -> None:
    """Asked for one format, the script neither reads nor misses the other one's chunk files."""
    shutil.rmtree(tree.root / "chunks/ckpt")

    result = tree.run("safetensors")

    assert result.returncode == 0, result.stderr
    assert {"model.safetensors": SAFETENSORS.data} == tree.outputs()


def test_default_is_the_formats_that_are_here(tree: Tree) -> None:
    """Without a format, one of which there is the list but no chunk file is left out."""
    for path in SAFETENSORS.chunks:
        (tree.root / path).unlink()

    result = tree.run()

    assert result.returncode == 0, result.stderr
    assert {"ckpt.pt": CKPT.data} == tree.outputs()


def test_all_formats_need_all_chunk_files(tree: Tree) -> None:
    """Asked for all, a format of which no chunk file is here is missing."""
    for path in SAFETENSORS.chunks:
        (tree.root / path).unlink()

    result = tree.run("all")

    assert (result.returncode, tree.outputs()) == (3, {})
    assert len(findings(result)) == len(SAFETENSORS.chunks)


def test_no_chunk_file_at_all_is_missing_input(tree: Tree) -> None:
    """Without a format and without a chunk file there is nothing to do, and that is an error."""
    shutil.rmtree(tree.root / "chunks")

    result = tree.run()

    assert (result.returncode, result.stdout, findings(result)) == (3, "", [])
    assert f"no chunk files in chunks/ckpt chunks/safetensors -> {HELP}" in result.stderr


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


# ---- wrong chunk files


CHUNK = "chunks/safetensors/model.safetensors.part-ab"
DIGEST = hashlib.sha256(SAFETENSORS.chunks[CHUNK]).hexdigest()
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 70000\n"


def _flip_one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[300] ^= 1
    path.write_bytes(data)


BAD_CHUNKS: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "pointer": (
        lambda path: path.write_text(POINTER),
        3,
        "git-lfs pointer: expected a chunk file, found a pointer to it -> git lfs pull",
    ),
    "short": (
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        4,
        f"wrong digest: expected sha256 {DIGEST}, found another in 69999 bytes -> {HELP}",
    ),
    "flipped bit": (
        _flip_one_bit,
        4,
        f"wrong digest: expected sha256 {DIGEST}, found another in 70000 bytes -> {HELP}",
    ),
    "access page": (
        lambda path: path.write_bytes(ACCESS_PAGE),
        4,
        f"wrong digest: expected sha256 {DIGEST}, found another in {len(ACCESS_PAGE)} bytes"
        f" -> {HELP}",
    ),
}
for _name, _damage in NO_FILES.items():
    BAD_CHUNKS[_name] = (
        _damage,
        3,
        f"missing: expected a chunk file, found none that can be read, or an empty one -> {HELP}",
    )


def test_links_inside_the_folder_are_followed(tree: Tree, tmp_path: Path) -> None:
    """Chunk files may be links to another place in chunks/, and chunks/ one to anywhere."""
    shutil.move(tree.root / "chunks/ckpt", tree.root / "chunks/elsewhere")
    (tree.root / "chunks/ckpt").mkdir()
    for path in (tree.root / "chunks/elsewhere").iterdir():
        (tree.root / "chunks/ckpt" / path.name).symlink_to(f"../elsewhere/{path.name}")
    shutil.move(tree.root / "chunks", tmp_path / "another disk")
    (tree.root / "chunks").symlink_to(tmp_path / "another disk")

    assert tree.run("ckpt").returncode == 0
    assert {"ckpt.pt": CKPT.data} == tree.outputs()


@pytest.mark.parametrize("linked", [CHUNK, str(Path(CHUNK).parent)], ids=["file", "folder"])
def test_links_out_of_the_folder_are_refused(tree: Tree, tmp_path: Path, linked: str) -> None:
    """A link in a repository leads to none of the user's other files."""
    shutil.move(tree.root / linked, tmp_path / "elsewhere")
    (tree.root / linked).symlink_to(tmp_path / "elsewhere")

    result = tree.run()

    words = "expected a file inside chunks/, found a link out of it -> copy it there"
    assert f"{CHUNK}: path not usable: {words}" in findings(result)
    assert (result.returncode, result.stdout, tree.outputs()) == (4, "", {})


@pytest.mark.parametrize("name", BAD_CHUNKS)
def test_bad_chunk_file_is_its_own_finding(tree: Tree, name: str) -> None:
    """One bad chunk file is named with what is wrong with it, and not even output/ appears."""
    damage, code, line = BAD_CHUNKS[name]
    damage(tree.root / CHUNK)

    result = tree.run()

    assert [f"{CHUNK}: {line}"] == findings(result)
    assert (code, "") == (result.returncode, result.stdout)
    assert not (tree.root / "output").exists()


def test_unreadable_chunk_file(tree: Tree) -> None:
    """A chunk file without read permission is a finding with the exit code that `inv` has."""
    (tree.root / CHUNK).chmod(0)

    result = tree.run(before=UNPRIVILEGED)

    assert findings(result)[0].startswith(f"{CHUNK}: unreadable: ")
    assert (result.returncode, tree.outputs()) == (4, {})


def test_all_findings_at_once(tree: Tree) -> None:
    """Everything wrong in both formats is shown in one run; wrong content decides the code."""
    names = [*SAFETENSORS.chunks, *CKPT.chunks]
    damages = [damage for damage, _, _ in BAD_CHUNKS.values()][: len(names)]
    damaged = names[: len(damages)]
    for name, damage in zip(damaged, damages, strict=True):
        damage(tree.root / name)

    result = tree.run()

    assert sorted(damaged) == sorted(line.split(": ")[0] for line in findings(result))
    assert (result.returncode, tree.outputs()) == (4, {})


def test_missing_and_pointer_together_are_missing_input(tree: Tree) -> None:
    """An incomplete clone is code 3, however many chunk files are not there."""
    for path in CKPT.chunks:
        (tree.root / path).write_text(POINTER)
    (tree.root / CHUNK).unlink()

    result = tree.run()

    assert (3, len(CKPT.chunks) + 1) == (result.returncode, len(findings(result)))


def test_chunk_files_that_are_not_listed_are_not_joined(tree: Tree) -> None:
    """A file that a `cat part-*` would have taken is left out."""
    (tree.root / "chunks/ckpt/ckpt.pt.part-zz").write_bytes(b"x")

    assert tree.run().returncode == 0
    assert tree.outputs() == BOTH


# ---- the joined file


def test_git_lfs_is_advised_where_it_keeps_the_files(tmp_path: Path) -> None:
    """A missing chunk file is restored by git, or pulled where .gitattributes names git-lfs."""
    tree = Tree(tmp_path / "tree").write(SAFETENSORS)
    (tree.root / next(iter(SAFETENSORS.chunks))).unlink()
    assert "-> git restore chunks, copy" in tree.run().stderr
    (tree.root / ".gitattributes").write_text("chunks/** filter=lfs diff=lfs merge=lfs -text\n")
    assert "-> git lfs pull, copy" in tree.run().stderr


@pytest.mark.parametrize("model", [SAFETENSORS, CKPT], ids=["sha256", "Hub blob id"])
def test_joined_file_must_be_right_too(tree: Tree, model: Model) -> None:
    """Right chunk files that make a wrong whole are refused, and what was there before stays."""
    (tree.root / "output").mkdir()
    (tree.root / "output" / model.name).write_bytes(b"before")
    right = model.sha256 if model is SAFETENSORS else blob_id(model.sha256, model.size)
    tree.edit(model, right, "0" * len(right))

    result = tree.run(model.folder)

    assert result.returncode == 4
    assert f"output/{model.name}: wrong content, sha256 {model.sha256}" in result.stderr
    assert {model.name: b"before"} == tree.outputs()


PINS = [("sha256",), ("Hub blob id",), ("sha256", "Hub blob id")]
WRITES_WRONG = {
    "a_byte": 'head -c 10 "$1"; printf X; tail -c +12 "$1"; cat_rest "$@"',
    "a_byte_less": 'tail -c +2 "$1"; cat_rest "$@"',
    "a_byte_more": 'head -c 1000000 "$@" -q; printf X',
    "nothing": "",
}
REST = 'cat_rest() { shift; for f in "$@"; do tail -c +1 "$f"; done; }\n'


@pytest.mark.parametrize("pins", PINS, ids="+".join)
@pytest.mark.parametrize("fault", WRITES_WRONG)
def test_what_was_written_is_verified(tmp_path: Path, pins: tuple[str, ...], fault: str) -> None:
    """A disk that keeps other bytes than it was given is noticed, by whichever digest is pinned."""
    tree = Tree(tmp_path / "tree").write(Model("ckpt.pt", "ckpt", pins, 100_000, 40_000))

    bad = tree.run(path=tool(tmp_path / "bin", "cat", REST + WRITES_WRONG[fault]))
    assert (bad.returncode, tree.outputs()) == (4, {}), bad.stderr

    good = tree.run()
    assert (good.returncode, list(tree.outputs())) == (0, ["ckpt.pt"])


def test_good_output_is_kept(tree: Tree) -> None:
    """A second run verifies the files that are there and leaves them alone."""
    tree.run()
    before = tree.fingerprints()

    result = tree.run()

    assert [line.replace("joined", "already right, kept") for line in JOINED] == (
        result.stdout.splitlines()
    )
    assert result.returncode == 0
    assert tree.fingerprints() == before


@pytest.mark.parametrize("old", [b"short", bytes(300_000)], ids=["other_size", "same_size"])
def test_wrong_output_is_replaced(tree: Tree, old: bytes) -> None:
    """A wrong file under the final name gives way to the verified one."""
    (tree.root / "output").mkdir()
    (tree.root / "output/model.safetensors").write_bytes(old)

    assert tree.run().returncode == 0
    assert tree.outputs() == BOTH


def test_wrong_output_stays_while_chunk_files_are_bad(tree: Tree) -> None:
    """Nothing is taken away from a person before there is something better."""
    tree.run("safetensors")
    (tree.root / "output/ckpt.pt").write_bytes(b"old")
    (tree.root / CHUNK).unlink()

    result = tree.run()

    assert (result.returncode, result.stdout) == (3, "")
    assert tree.outputs() == {"ckpt.pt": b"old", "model.safetensors": SAFETENSORS.data}


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["directory", "fifo"])
def test_something_under_the_final_name(tree: Tree, make: Callable[[Path], None]) -> None:
    """What is no file under a final name is an error; nothing is moved into it or over it."""
    (tree.root / "output").mkdir()
    make(tree.root / "output/ckpt.pt")

    result = tree.run()

    assert "output/ckpt.pt: path not usable -> move it away" in result.stderr
    assert (result.returncode, result.stdout, tree.outputs()) == (4, "", {})


def test_directory_that_appears_under_the_final_name(tree: Tree, tmp_path: Path) -> None:
    """A directory made while the file is written is not taken for a place to move it into."""
    path = tool(tmp_path / "bin", "cat", 'mkdir -p output/ckpt.pt; tail -q -c +1 "$@"')

    result = tree.run("ckpt", path=path)

    assert (result.returncode, result.stdout, tree.outputs()) == (4, "", {})
    assert "output/ckpt.pt: path not usable" in result.stderr


# ---- partial files


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
    """Run the script after a command that gets the name its own partial will have as $1."""
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


def test_directory_under_a_partial_name(tree: Tree, dead: int) -> None:
    """A directory under the name of a killed run's partial stays, and harms nothing."""
    partial(tree, dead).mkdir()

    assert tree.run().returncode == 0
    assert tree.outputs() == BOTH
    assert partial(tree, dead).is_dir()


def test_directory_under_the_own_partial_name(tree: Tree) -> None:
    """A directory under the very name that this run would write is an error."""
    result = run_with_partial(tree, 'mkdir "$1"')

    assert "output/ckpt.pt: cannot be written" in result.stderr
    assert (result.returncode, result.stdout, tree.outputs()) == (7, "", {})


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
        "ckpt.pt.recombine-partial.N",
        "ckpt.pt model.safetensors.recombine-partial.N",
        "ckpt.pt model.safetensors",
    ]


def test_two_runs_at_once(tree: Tree, tmp_path: Path) -> None:
    """A run that starts and ends while another one writes does not disturb it."""
    wait = 'head -c 1000 "$1"; : >waiting; while [[ ! -e go ]]; do sleep 0.02; done'
    path = tool(tmp_path / "bin", "cat", f'{REST}{wait}; tail -c +1001 "$1"; cat_rest "$@"')
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
    assert second.stdout.splitlines() == JOINED
    assert stdout.splitlines() == [JOINED[0], JOINED[1].replace("joined", "already right, kept")]
    assert tree.outputs() == BOTH


def test_tool_that_fails_stops_the_run(tree: Tree, tmp_path: Path) -> None:
    """A broken head does not pass for an empty list."""
    result = tree.run(path=tool(tmp_path / "bin", "head", "echo broken >&2; exit 2"))

    assert (result.returncode, "broken" in result.stderr, tree.outputs()) == (3, True, {})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_interrupted_run_leaves_nothing_behind(
    tree: Tree, tmp_path: Path, number: signal.Signals
) -> None:
    """Ctrl-C in the middle of writing removes the partial file; the code is 130."""
    # A shell that is interrupted while its child ends by itself would go on without the trap.
    slow = 'trap "exit 130" INT TERM; head -c 1000 "$1"; while :; do sleep 0.1; done'
    path = tool(tmp_path / "bin", "cat", slow)
    with subprocess.Popen(
        ["bash", str(tree.root / "recombine.sh")],
        env=environment(path),
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        half = tree.root / f"output/ckpt.pt.recombine-partial.{process.pid}"
        wait_for(lambda: half.exists() and half.stat().st_size == 1000)
        os.killpg(process.pid, number)
        _, stderr = process.communicate(timeout=30)

    assert process.returncode == 130, stderr
    assert tree.outputs() == {}


@pytest.mark.parametrize(("name", "about"), [("readlink", "*.part-*"), ("sha256sum", "*")])
def test_an_interrupt_while_a_chunk_file_is_looked_at_is_130(
    tree: Tree, tmp_path: Path, name: str, about: str
) -> None:
    """Bash keeps it until the command ends; that must still be one that it can read."""
    told = f'[[ $* != {about} ]] || kill -INT "$SCRIPT"; exec {shutil.which(name)} "$@"'
    path = tool(tmp_path / "bin", name, told)
    result = subprocess.run(
        ["bash", "-c", "export SCRIPT=$$; exec bash ./recombine.sh"],
        cwd=tree.root,
        env=environment(path),
        capture_output=True,
        text=True,
    )

    assert result.returncode == 130, result.stderr
    assert "interrupted" in result.stderr and "unexpected" not in result.stderr
    assert tree.outputs() == {}


def test_disk_that_takes_no_more(tree: Tree) -> None:
    """A write that fails half way leaves no file and is a disk error."""
    result = subprocess.run(
        ["bash", "-c", "ulimit -f 100; exec bash ./recombine.sh"],
        cwd=tree.root,
        capture_output=True,
        text=True,
    )

    assert result.returncode == 7, result.stderr
    assert "output/ckpt.pt: cannot be written" in result.stderr
    assert tree.outputs() == {}


# ---- tools and words


TOOLS = ["bash", "cat", "cut", "dirname", "grep", "head", "mkdir", "mv", "rm", "sync", "wc"]


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
    assert (tree.outputs(), result.stdout.splitlines()) == (BOTH, JOINED)


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
    shutil.copy(tree.root / "manifests/csm-1b.toml", tree.root)

    result = tree.run(*arguments)

    assert (result.returncode, result.stdout, tree.outputs()) == (2, "", {})
    assert "recombine.sh: " in result.stderr


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help(tree: Tree, option: str) -> None:
    """The help is a result, on stdout, and names every option and exit code."""
    result = tree.run(option)

    assert (result.returncode, result.stderr) == (0, "")
    assert [w for w in ("--model", "130", "safetensors") if w not in result.stdout] == []


def test_script_is_short_executable_and_shellcheck_clean() -> None:
    """A person can read the script, call it as it is, and shellcheck has nothing to say."""
    shellcheck = shutil.which(
        "shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (it comes with the test extra)")

    result = subprocess.run([shellcheck, str(SCRIPT)], capture_output=True, text=True)

    assert (result.returncode, result.stdout) == (0, "")
    assert os.access(SCRIPT, os.X_OK)
    assert len(SCRIPT.read_text().splitlines()) <= 120
