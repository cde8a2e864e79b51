"""Splitting: the chunk files of split(1), the list of sha256sum(1), and back again."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csm_weights.commands.split import split as split_command
from csm_weights.commands.split import split_file as split
from csm_weights.errors import Kind, UsageError, WrongContent
from csm_weights.formats.architecture import parse_config
from csm_weights.hashing import blob_id
from csm_weights.manifest.parse import parse
from csm_weights.manifest.pin import (
    MAX_CHUNK_FILES,
    PIECE_SIZE,
    parse_size,
    recomputed,
    suffix,
    tiling,
    with_artifact,
)
from csm_weights.manifest.render import render
from csm_weights.manifest.types import Artifact, Manifest
from csm_weights.transfer.assemble import Assembly, assemble
from csm_weights.transfer.local import ChunkFiles
from csm_weights.transfer.source import FirstOf
from csm_weights.verify.sums import parse_sums, render_sums
from tools.standin.recipes import RECIPES, standin_manifest

needs_split = pytest.mark.skipif(not shutil.which("split"), reason="no split(1) here")
needs_sums = pytest.mark.skipif(not shutil.which("sha256sum"), reason="no sha256sum(1) here")


def ignore(_: int) -> None:
    """Counts nothing."""


def file_with(folder: Path, size: int, name: str = "model.bin") -> Path:
    path = folder / name
    path.write_bytes(random.Random(size).randbytes(size))
    return path


def parts_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# ---- names and sizes


@needs_split
@pytest.mark.parametrize(("size", "piece"), [(1000, 300), (900, 300), (1, 1), (1000, 17)])
def test_chunk_files_are_those_of_split(tmp_path: Path, size: int, piece: int) -> None:
    """Names and contents are just what `split -b` makes."""
    file = file_with(tmp_path, size)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    subprocess.run(["split", "-b", str(piece), file, f"{theirs}/model.bin.part-"], check=True)
    split(file, tmp_path, "ours", piece, ignore)
    assert parts_of(tmp_path / "ours") == parts_of(theirs)


@needs_split
def test_all_650_suffixes_are_those_of_split(tmp_path: Path) -> None:
    """The two-letter names run from aa to yz, as far as split(1) has two letters."""
    file = file_with(tmp_path, MAX_CHUNK_FILES)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    subprocess.run(["split", "-b", "1", file, f"{theirs}/"], check=True)
    names = sorted(path.name for path in theirs.iterdir())
    assert [suffix(index) for index in range(MAX_CHUNK_FILES)] == names


def test_more_chunk_files_than_two_letters_name_are_refused() -> None:
    """651 chunk files are a usage error that names a size that would do."""
    with pytest.raises(UsageError, match="651") as caught:
        tiling(651_000 * MAX_CHUNK_FILES, 650_000)
    assert "651,000" in str(caught.value)
    assert len(tiling(651_000 * MAX_CHUNK_FILES, 651_000)) == MAX_CHUNK_FILES


@pytest.mark.parametrize(("size", "piece"), [(0, 10), (10, 0), (-1, 10), (10, -1)])
def test_nothing_cannot_be_cut(size: int, piece: int) -> None:
    """No bytes, or chunk files of none, are a usage error."""
    with pytest.raises(UsageError, match="cannot cut"):
        tiling(size, piece)


def test_csm_1b_is_cut_as_published() -> None:
    """Chunk files of 1 GiB are five full ones and one of 842,477,664 bytes."""
    sizes = [size for _, size in tiling(6_211_186_784, PIECE_SIZE)]
    assert sizes == [1_073_741_824] * 5 + [842_477_664]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1073741824", 1 << 30),
        ("1GiB", 1 << 30),
        ("1Gi", 1 << 30),
        ("1 GiB", 1 << 30),
        (" 200KiB ", 200 << 10),
        ("500MB", 500_000_000),
        ("2G", 2_000_000_000),
        ("7", 7),
        ("7B", 7),
        ("1TiB", 1 << 40),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    """A number of bytes, with a decimal or a binary unit."""
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "1.5GiB", "-1", "1e9", "1gb", "1GiBB", "1PB", "0x10", "1 2", "5i", "5iB"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    """Anything else is a usage error that says what to write."""
    with pytest.raises(UsageError, match="1GiB"):
        parse_size(text)


# ---- split


def test_the_entry_says_what_the_file_is(tmp_path: Path) -> None:
    """Size, digests, blob id and ranges of the entry are the file's."""
    file = file_with(tmp_path, 1000, "model.safetensors")
    data, whole = file.read_bytes(), hashlib.sha256(file.read_bytes()).hexdigest()
    entry = split(file, tmp_path, "chunks", 300, ignore)
    assert (entry.path, entry.group, entry.format) == ("model.safetensors",) + ("safetensors",) * 2
    assert (entry.size, entry.sha256, entry.blob_id) == (1000, whole, blob_id(whole, 1000))
    assert [(p.part, p.offset, p.size, p.sha256) for p in entry.pieces] == [
        (
            f"chunks/model.safetensors.part-a{letter}",
            offset,
            min(300, 1000 - offset),
            hashlib.sha256(data[offset : offset + 300]).hexdigest(),
        )
        for letter, offset in zip("abcd", range(0, 1000, 300), strict=True)
    ]


@pytest.mark.parametrize(
    "name", ["ckpt.pt", "UPPER.BIN", "a b.bin", "_x.bin", ".hidden", "\xe9.bin", "x" * 80 + ".bin"]
)
def test_an_entry_of_any_name_is_a_valid_one(tmp_path: Path, name: str) -> None:
    """Whatever the file is called, the entry is accepted in a manifest."""
    entry = split(file_with(tmp_path, 10, name), tmp_path, "chunks", 7, ignore)
    text = render(Manifest("toy", "staged", "placed", (entry,), where="toy.toml"))
    assert parse(text.encode(), "toy.toml").artifacts == (entry,)


def test_every_byte_is_counted_once(tmp_path: Path) -> None:
    """The ticks of a split add up to the file's size."""
    ticks: list[int] = []
    split(file_with(tmp_path, 100_000), tmp_path, "chunks", 9_000, ticks.append)
    assert sum(ticks) == 100_000


@pytest.mark.parametrize("content", [b"precious", b"p" * 300])
def test_a_chunk_file_that_differs_is_not_overwritten(tmp_path: Path, content: bytes) -> None:
    """A chunk file of another file in the way is a finding, and kept as it is."""
    file = file_with(tmp_path, 1000)
    other = tmp_path / "chunks" / "model.bin.part-ab"
    other.parent.mkdir()
    other.write_bytes(content)
    with pytest.raises(WrongContent) as caught:
        split(file, tmp_path, "chunks", 300, ignore)
    assert [(f.kind, f.where) for f in caught.value.findings] == [(Kind.WRONG_DIGEST, str(other))]
    assert other.read_bytes() == content
    assert list(other.parent.iterdir()) == [other]


def test_a_refused_split_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    """With chunk files of another size there, no chunk file of the new split and no partial stays.

    The same where one cannot be named: those that have been named go again.
    """
    file, folder = file_with(tmp_path, 1000), tmp_path / "chunks" / "all"
    run(tmp_path, file, size="600")
    before = parts_of(folder)
    with pytest.raises(WrongContent):
        run(tmp_path, file, size="300")
    assert parts_of(folder) == before
    other = file_with(tmp_path, 900, "other.bin")
    (folder / "other.bin.part-ac").mkdir()
    with pytest.raises(WrongContent):
        run(tmp_path, other)
    assert {path.name for path in folder.iterdir()} == {*before, "other.bin.part-ac"}


def test_an_interrupted_split_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    """An interrupt while chunk files are written leaves none of them, and nothing unfinished."""

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        split(file_with(tmp_path, 1000), tmp_path, "chunks", 300, interrupt)
    assert list((tmp_path / "chunks").iterdir()) == []


def test_splitting_again_changes_nothing(tmp_path: Path) -> None:
    """Parts that are there already and right are fine, and nothing unfinished is left."""
    file = file_with(tmp_path, 1000)
    first = split(file, tmp_path, "chunks", 300, ignore)
    parts = parts_of(tmp_path / "chunks")
    assert split(file, tmp_path, "chunks", 300, ignore) == first
    assert parts_of(tmp_path / "chunks") == parts
    assert len(parts) == 4


@settings(max_examples=25, deadline=None)
@given(size=st.integers(1, 400_000), count=st.integers(1, 9))
def test_split_and_assemble_is_the_identity(size: int, count: int) -> None:
    """What is cut at any size comes back byte for byte, with the same whole digest."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        file = file_with(root, size)
        artifact = split(file, root, "chunks", -(-size // count), ignore)
        job = Assembly(artifact, root / "out" / "model.bin", FirstOf(ChunkFiles(root)))
        (made,) = assemble([job], ignore)
        assert made.path.read_bytes() == file.read_bytes()
        assert made.sha256 == artifact.sha256


# ---- the command


def run(root: Path, file: Path, **options: str) -> str:
    """Split as `inv split` does, into chunks/all/ by default."""
    asked = {"chunks": "chunks/all", "size": "300", "manifest": ""} | options
    return str(split_command(root, file, dry=False, **asked))


def test_a_second_split_keeps_the_lines_of_the_first(tmp_path: Path) -> None:
    """SHA256SUMS lists the chunk files of all files that were split into its folder, once."""
    first, second = file_with(tmp_path, 1000, "a.bin"), file_with(tmp_path, 700, "b.bin")
    for file in (first, second, first):
        run(tmp_path, file)
    listed = (tmp_path / "chunks/all/SHA256SUMS").read_text()
    parts = parts_of(tmp_path / "chunks/all").keys() - {"SHA256SUMS"}
    assert sorted(parse_sums(listed, "")) == sorted(parts)
    for file in (first, second):
        whole = hashlib.sha256(file.read_bytes()).hexdigest()
        size = file.stat().st_size
        about = f"# {file.name}: {size} bytes, sha256 {whole}, Hub blob id {blob_id(whole, size)}"
        assert listed.splitlines().count(about) == 1


def test_another_size_of_chunk_files_replaces_the_lines(tmp_path: Path) -> None:
    """The list names the chunk files of the last split of a file, and no others of it."""
    file = file_with(tmp_path, 1000, "a.bin")
    run(tmp_path, file)
    shutil.rmtree(tmp_path / "chunks/all", ignore_errors=False)
    run(tmp_path, file, size="600")
    assert len(parse_sums((tmp_path / "chunks/all/SHA256SUMS").read_text(), "")) == 2


def test_lines_that_someone_else_wrote_stay(tmp_path: Path) -> None:
    """Comments and digests of other files are kept to the letter."""
    file = file_with(tmp_path, 1000, "a.bin")
    (tmp_path / "chunks/all").mkdir(parents=True)
    mine = f"# mine\n{'0' * 64} *a.bin.partial\n{'1' * 64}  other.part-aa\n"
    (tmp_path / "chunks/all/SHA256SUMS").write_text(mine)
    run(tmp_path, file)
    assert (tmp_path / "chunks/all/SHA256SUMS").read_text().startswith(mine + "# a.bin: ")


@pytest.mark.parametrize("content", [b"\xff\xfe", None], ids=["no text", "fifo"])
def test_a_list_that_cannot_be_extended_is_left_alone(
    content: bytes | None, tmp_path: Path
) -> None:
    """Other bytes, or a pipe, under the name of the list are an error, and stay."""
    file, path = file_with(tmp_path, 1000, "a.bin"), tmp_path / "chunks/all/SHA256SUMS"
    path.parent.mkdir(parents=True)
    path.write_bytes(content) if content else os.mkfifo(path)
    with pytest.raises(WrongContent):
        run(tmp_path, file)
    assert path.is_fifo() if content is None else path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("name", ["a:b.bin", "a\x1bb.bin", "a.partial", "a ", "a\\b"])
def test_a_name_that_no_manifest_takes_is_refused(name: str, tmp_path: Path) -> None:
    """A file with such a name is misuse, and no chunk file is written."""
    with pytest.raises(UsageError, match="--file"):
        run(tmp_path, file_with(tmp_path, 10, name))
    assert not (tmp_path / "chunks").exists()


# ---- SHA256SUMS


@needs_sums
def test_sums_are_accepted_by_sha256sum(tmp_path: Path) -> None:
    """`sha256sum -c --strict` finds every line well formed and right."""
    names = ["a.bin", "prompts/b c.wav", "-dash", "été"]
    digests = {}
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
        digests[name] = hashlib.sha256(name.encode()).hexdigest()
    (tmp_path / "SHA256SUMS").write_text(render_sums(digests))
    command = ["sha256sum", "-c", "--strict", "SHA256SUMS"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.count(": OK")) == (0, 4)


@needs_sums
def test_sums_of_sha256sum_are_read(tmp_path: Path) -> None:
    """What sha256sum writes, in text and in binary mode, is read back."""
    (tmp_path / "a b.bin").write_bytes(b"a")
    digest = hashlib.sha256(b"a").hexdigest()
    for mode in ("--text", "--binary"):
        command = ["sha256sum", mode, "a b.bin"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert parse_sums(done.stdout, "SUMS") == {"a b.bin": digest}


def test_sums_read_back_as_written() -> None:
    """Rendering and parsing are inverse, with comments and empty lines left out."""
    digests = {"a.bin": "0" * 64, "prompts/b c.wav": "1" * 64}
    assert parse_sums("# sums\n\n" + render_sums(digests), "SUMS") == digests


def test_a_leading_dot_slash_is_fine() -> None:
    """`find | xargs sha256sum` writes ./ before each path."""
    assert parse_sums(f"{'0' * 64}  ./a/b\n", "SUMS") == {"a/b": "0" * 64}


ZEROS = "0" * 64


@pytest.mark.parametrize(
    "line",
    [
        f"{ZEROS}  ../a",
        f"{ZEROS}  /etc/passwd",
        f"{ZEROS}  ./../a",
        f"{ZEROS}  a/../../b",
        f"{ZEROS}  .git/config",
        f"{ZEROS}  a\x00b",
        f"{ZEROS}  a\x1b[2J",
        f"{ZEROS}  a\\b",
        f"\\{ZEROS}  a",
        f"{ZEROS} a",
        f"{ZEROS}  ",
        ZEROS,
        f"{'0' * 63}  a",
        f"{'0' * 65}  a",
        f"{'g' * 64}  a",
        "<!DOCTYPE html>",
        "Access to model sesame/csm-1b is restricted.",
    ],
)
def test_a_hostile_line_is_refused_by_its_number(line: str) -> None:
    """A line that is not DIGEST  PATH, or leaves the folder, is a finding with its line number."""
    text = f"{ZEROS}  good\n{line}\n"
    with pytest.raises(WrongContent) as caught:
        parse_sums(text, "SUMS")
    assert [f.where for f in caught.value.findings] == ["SUMS:2"]
    assert "\x1b" not in str(caught.value)


def test_two_digests_for_one_path_are_refused() -> None:
    """A path that is listed twice, with different digests, cannot be held."""
    with pytest.raises(WrongContent):
        parse_sums(f"{'0' * 64}  a\n{'1' * 64}  a\n", "SUMS")


def test_sums_of_nothing_are_refused() -> None:
    """An empty list would pass any file, so it is none."""
    with pytest.raises(WrongContent, match="SHA256SUMS"):
        parse_sums("\n", "SUMS")


# ---- manifest entries


def entry(path: str = "ckpt.pt", **changes: object) -> Artifact:
    return replace(Artifact(path, "ckpt", "torch-zip", 10), **changes)  # type: ignore[arg-type]


def test_locking_adds_the_digest_and_its_blob_id() -> None:
    """A verified file's sha256 enters the manifest, marked A, with the blob id it implies."""
    done = recomputed(entry(evidence={"size": "B"}), "5" * 64)
    assert (done.sha256, done.blob_id) == ("5" * 64, blob_id("5" * 64, 10))
    assert done.evidence == {"size": "B", "sha256": "A"}


def test_locking_keeps_what_is_pinned() -> None:
    """A digest or blob id that is there already stays, and no digest changes nothing."""
    pinned = entry(sha256="6" * 64)
    assert recomputed(pinned, "5" * 64) == pinned
    assert recomputed(entry(), "") == entry()
    assert recomputed(entry(blob_id="7" * 40), "5" * 64).blob_id == "7" * 40


def test_only_weights_are_lfs_files() -> None:
    """The blob id of a small file does not follow from its sha256, so it gets none."""
    note = Artifact("note.txt", "note", "opaque", 10)
    assert recomputed(note, "5" * 64).blob_id is None


def test_an_entry_replaces_the_one_of_its_path() -> None:
    """`with_artifact` keeps the order, and adds what is new at the end."""
    first, second = entry("a"), entry("b")
    manifest = Manifest("toy", "staged", "placed", (first, second))
    newer, third = replace(first, size=11), entry("c")
    assert with_artifact(manifest, newer).artifacts == (newer, second)
    assert with_artifact(manifest, third).artifacts == (first, second, third)


@pytest.mark.parametrize("name", RECIPES)
def test_a_stand_in_has_a_valid_manifest(name: str) -> None:
    """The manifest of a stand-in holds, and pins ckpt.pt without a sha256, as CSM-1B's does."""
    weights = [
        Artifact(path, group, kind, 10, "8" * 64, "9" * 40, evidence={"sha256": "A"})
        for path, group, kind in (
            ("model.safetensors", "safetensors", "safetensors"),
            ("config.bin", "other", "opaque"),
        )
    ]
    manifest = standin_manifest(name, RECIPES[name], weights[:1])
    assert parse(render(manifest).encode(), "") == manifest
    config = manifest.artifacts[-1]
    assert config.sha256 == hashlib.sha256((config.text or "").encode()).hexdigest()
    assert standin_manifest(name, RECIPES[name], weights).artifacts[1].sha256 is None


@pytest.mark.parametrize(
    ("name", "tensors", "parameters"),
    [("csm-1b-standin", 187, 1_552_791_552), ("csm-tiny", None, 296_640)],
)
def test_a_stand_in_is_of_the_size_it_says(name: str, tensors: int | None, parameters: int) -> None:
    """The config of a stand-in implies the published, or described, count of parameters."""
    shapes = parse_config(RECIPES[name].config.encode(), "config.json").tensor_shapes()
    total = 0
    for shape in shapes.values():
        count = 1
        for length in shape:
            count *= length
        total += count
    assert total == parameters
    assert tensors in (None, len(shapes))
