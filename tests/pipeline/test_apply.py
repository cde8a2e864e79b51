"""The line through its public functions, on the toy repository."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from csm_weights import hashing
from csm_weights.commands import verify
from csm_weights.commands.clean import clean
from csm_weights.commands.render import text
from csm_weights.commands.render.json import render as render_json
from csm_weights.errors import CsmWeightsError, Kind, MissingInput, UsageError, WrongContent
from csm_weights.files import Fingerprint
from csm_weights.pipeline import apply, session
from csm_weights.pipeline.actions import Action, Assemble, Copy, Move, Verify
from csm_weights.pipeline.plan import Target
from csm_weights.pipeline.request import Request
from csm_weights.pipeline.session import Outcome, StatusReport
from csm_weights.progress import JsonLines
from csm_weights.store import atomic, install
from csm_weights.store.inspect import FileState, State, inspect
from csm_weights.store.journal import journal_path, partial_path
from csm_weights.store.receipts import Receipt, read_receipt, receipt_path
from tests.support.privileges import unprivileged
from tests.support.toy import NOTE, PIECE_SIZE, Toy, flip

LFS_POINTER = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 70001\n"
)
ACCESS_PAGE = (
    "Access to model sesame/csm-1b is restricted. You must have access to it and be "
    "authenticated to access it. Please log in."
)


def weights(toy: Toy, *only: str, dest: str | None = None) -> Outcome:
    return apply.weights(toy.request(*only, dest=dest), smoke=False)


def verbs(outcome: Outcome) -> list[type[Action]]:
    return [type(step) for step in outcome.actions]


def everything_is_installed(toy: Toy) -> bool:
    return all(
        toy.installed(a.path).read_bytes() == toy.good(a.path) for a in toy.manifest.artifacts
    )


class CountingHasher:
    """A SHA-256 that adds the bytes it is fed to a count."""

    def __init__(self, count: list[int], inner: hashing.Hasher | None = None) -> None:
        self._count = count
        self._inner = inner or hashlib.sha256()

    def update(self, data: memoryview, /) -> None:
        self._count[0] += len(data)
        self._inner.update(data)

    def hexdigest(self) -> str:
        return self._inner.hexdigest()

    def copy(self) -> CountingHasher:
        return CountingHasher(self._count, self._inner.copy())


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """A count of the bytes that were hashed since it was last asked."""
    count = [0]
    for module in ("hashing", "transfer.assemble", "transfer.reorder"):
        monkeypatch.setattr(f"csm_weights.{module}.sha256", lambda: CountingHasher(count))

    def take() -> int:
        taken, count[0] = count[0], 0
        return taken

    return take


def test_weights_installs_every_file_from_its_chunk_files(toy: Toy) -> None:
    """From chunk files and known text, all files come into place with the right bytes."""
    outcome = weights(toy)
    assert outcome.error is None
    assert everything_is_installed(toy)
    assert all(result.ok for result in outcome.results)


def test_weights_leaves_nothing_unfinished_behind(toy: Toy) -> None:
    """After a whole run the staging folder holds no file but the lock."""
    weights(toy)
    files = [p.name for p in (toy.root / "output").rglob("*") if p.is_file()]
    assert set(files) <= {".lock"}


def test_a_second_run_hashes_nothing(toy: Toy, hashed: Callable[[], int]) -> None:
    """When nothing changed, receipts answer and no byte is read again."""
    weights(toy)
    assert hashed() > 0
    outcome = weights(toy)
    assert (hashed(), verbs(outcome)) == (0, [])


def test_assembling_hashes_each_byte_for_its_piece_and_for_the_whole(
    toy: Toy, hashed: Callable[[], int]
) -> None:
    """Every byte is fed to its piece's digest and the whole's; the first piece's is shared."""
    apply.apply(toy.request("a.bin", "b.bin"), Target.STAGED)
    sizes = [a.size for a in toy.manifest.artifacts if a.pieces]
    assert hashed() == sum(2 * size - PIECE_SIZE for size in sizes)


def test_receipt_says_where_each_piece_came_from(toy: Toy) -> None:
    """The receipt of a installed file names the chunk file of every piece."""
    outcome = weights(toy)
    receipt = outcome.state.artifacts[0].installed.receipt
    assert receipt is not None
    assert [r.source for r in receipt.pieces] == [p.part for p in toy.artifact("a.bin").pieces]


def test_only_takes_just_what_is_named(toy: Toy) -> None:
    """With --only, the other artifacts are left alone."""
    weights(toy, "a.bin")
    assert [toy.installed(n).exists() for n in ("a.bin", "b.bin")] == [True, False]


def test_only_refuses_a_word_that_names_nothing(toy: Toy) -> None:
    """A misspelt --only is a usage error that lists the words there are."""
    with pytest.raises(UsageError, match="choose from"):
        weights(toy, "safetensor")


def test_the_hub_is_no_source_of_a_model_without_a_repository(toy: Toy) -> None:
    """--source=hf needs a repository in the manifest; with auto the other sources will do."""
    with pytest.raises(UsageError, match=r"toy\.toml names no repository of the Hub") as caught:
        apply.weights(replace(toy.request(), source="hf"), smoke=False)
    assert caught.value.exit_code == 2
    assert weights(toy).error is None


def test_unknown_model_names_those_there_are(toy: Toy) -> None:
    """A misspelt --model is a usage error that lists the manifests."""
    with pytest.raises(UsageError, match="toy"):
        apply.status(Request(toy.root, "toyy"))


def damage_missing(path: Path) -> None:
    path.unlink()


def damage_short(path: Path) -> None:
    os.truncate(path, 500)


def damage_empty(path: Path) -> None:
    os.truncate(path, 0)


def damage_pointer(path: Path) -> None:
    path.write_text(LFS_POINTER)


def damage_page(path: Path) -> None:
    path.write_text(ACCESS_PAGE)


def damage_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def damage_dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def damage_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def damage_extra(path: Path) -> None:
    path.with_name(path.name[:-2] + "zz").write_bytes(b"more")


BAD_CHUNK_FILES = [
    (damage_missing, Kind.MISSING, 3),
    (damage_pointer, Kind.LFS_POINTER, 3),
    (damage_short, Kind.WRONG_SIZE, 4),
    (damage_empty, Kind.WRONG_SIZE, 4),
    (damage_page, Kind.ACCESS_PAGE, 4),
    (flip, Kind.WRONG_DIGEST, 4),
    (damage_folder, Kind.UNREADABLE, 4),
    (damage_dangling, Kind.MISSING, 3),
    (damage_loop, Kind.MISSING, 3),
    (damage_extra, Kind.EXTRA_CHUNK_FILE, 4),
]


@pytest.mark.parametrize(("damage", "kind", "code"), BAD_CHUNK_FILES)
def test_a_bad_chunk_file_is_a_finding_of_its_own_and_gives_no_file(
    toy: Toy, damage: Callable[[Path], None], kind: Kind, code: int
) -> None:
    """Each way a chunk file can be bad has its name and exit code, and no output file appears."""
    damage(toy.chunk_file("a.bin", 2))
    with pytest.raises(CsmWeightsError) as caught:
        weights(toy)
    assert [(f.kind, caught.value.exit_code) for f in caught.value.findings] == [(kind, code)]
    assert caught.value.findings[0].help
    assert not [
        n for n in ("a.bin", "b.bin") if toy.staged(n).exists() or toy.installed(n).exists()
    ]


def test_all_findings_come_at_once(toy: Toy) -> None:
    """Several chunk files that are bad in stat are all reported in one run."""
    damage_missing(toy.chunk_file("a.bin", 0))
    damage_pointer(toy.chunk_file("a.bin", 3))
    damage_short(toy.chunk_file("b.bin", 1))
    damage_extra(toy.chunk_file("b.bin", 2))
    with pytest.raises(WrongContent) as caught:
        weights(toy)
    expected = {Kind.MISSING, Kind.LFS_POINTER, Kind.WRONG_SIZE, Kind.EXTRA_CHUNK_FILE}
    assert {f.kind for f in caught.value.findings} == expected


def test_all_wrong_digests_come_at_once(toy: Toy) -> None:
    """Chunk files that only hashing finds bad are all reported in one run, by their paths."""
    bad = [toy.chunk_file("a.bin", 1), toy.chunk_file("a.bin", 4), toy.chunk_file("b.bin", 0)]
    for part in bad:
        flip(part)
    with pytest.raises(WrongContent) as caught:
        weights(toy)
    expected = [str(part.relative_to(toy.root)) for part in bad]
    assert [f.where for f in caught.value.findings] == expected


def test_an_unreadable_chunk_file_is_reported(toy: Toy) -> None:
    """A chunk file without read permission is its own finding."""
    toy.chunk_file("a.bin", 1).chmod(0)
    with unprivileged(), pytest.raises(WrongContent) as caught:
        weights(toy)
    assert [f.kind for f in caught.value.findings] == [Kind.UNREADABLE]


def test_what_was_verified_before_a_failure_is_not_copied_again(toy: Toy) -> None:
    """After a bad chunk file is mended, verified pieces need no chunk file any more."""
    flip(toy.chunk_file("a.bin", 2))
    with pytest.raises(WrongContent):
        weights(toy)
    flip(toy.chunk_file("a.bin", 2))
    for index in (0, 1, 3, 4):
        toy.chunk_file("a.bin", index).unlink()
    weights(toy)
    assert everything_is_installed(toy)


def test_a_journaled_piece_that_rotted_is_fetched_again(toy: Toy) -> None:
    """The journal is a hint: a kept piece is hashed again, and replaced if it is wrong."""
    flip(toy.chunk_file("a.bin", 2))
    with pytest.raises(WrongContent):
        weights(toy)
    flip(toy.chunk_file("a.bin", 2))
    flip(partial_path(toy.staged("a.bin")), PIECE_SIZE + 5)
    weights(toy)
    assert everything_is_installed(toy)


@pytest.mark.parametrize("text", ["", "rubbish\n", '{"schema": 1}\n', "\x00\xff" * 100, "[" * 9999])
def test_a_damaged_journal_only_costs_time(toy: Toy, text: str) -> None:
    """Whatever the journal holds, the run ends with the right bytes."""
    flip(toy.chunk_file("a.bin", 2))
    with pytest.raises(WrongContent):
        weights(toy)
    flip(toy.chunk_file("a.bin", 2))
    journal_path(toy.staged("a.bin")).write_text(text)
    weights(toy)
    assert everything_is_installed(toy)


def test_a_partial_of_another_size_is_fine(toy: Toy) -> None:
    """A leftover partial that is too long or too short is made right."""
    partial = partial_path(toy.staged("a.bin"))
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"x" * (toy.artifact("a.bin").size + 999))
    weights(toy)
    assert everything_is_installed(toy)


def test_a_concatenated_file_is_taken_not_copied(toy: Toy) -> None:
    """What a person made with cat in output/ is verified where it lies and moved."""
    toy.staged("a.bin").parent.mkdir(parents=True)
    toy.staged("a.bin").write_bytes(toy.good("a.bin"))
    inode = toy.staged("a.bin").stat().st_ino
    outcome = weights(toy, "a.bin")
    assert verbs(outcome) == [Verify, Move]
    assert toy.installed("a.bin").stat().st_ino == inode


def test_a_file_already_in_place_is_taken(toy: Toy) -> None:
    """A good file without a receipt in the destination is verified and stays as it is."""
    toy.installed("b.bin").parent.mkdir(parents=True)
    toy.installed("b.bin").write_bytes(toy.good("b.bin"))
    outcome = weights(toy, "b.bin")
    assert verbs(outcome) == [Verify]
    assert outcome.state.artifacts[0].installed.state is FileState.VERIFIED


def test_a_wrong_file_in_place_is_reported_and_replaced(toy: Toy) -> None:
    """A damaged installed file gives way once the good one is verified, and is reported."""
    toy.installed("a.bin").parent.mkdir(parents=True)
    toy.installed("a.bin").write_bytes(toy.good("a.bin"))
    flip(toy.installed("a.bin"))
    outcome = weights(toy)
    assert [(f.kind, f.where.split(" ")[0]) for f in outcome.notes] == [
        (Kind.WRONG_DIGEST, str(toy.installed("a.bin")))
    ]
    assert everything_is_installed(toy)


def test_a_wrong_file_in_place_stays_when_there_is_no_better(toy: Toy) -> None:
    """Without a good source the damaged file is reported and left alone."""
    toy.installed("a.bin").parent.mkdir(parents=True)
    toy.installed("a.bin").write_bytes(b"the only copy")
    flip(toy.chunk_file("a.bin", 0))
    with pytest.raises(WrongContent):
        weights(toy, "a.bin")
    assert toy.installed("a.bin").read_bytes() == b"the only copy"


def test_a_good_file_survives_bad_chunk_files(toy: Toy) -> None:
    """A verified file in place is never touched by what happens to the chunk files."""
    weights(toy)
    for index in range(5):
        flip(toy.chunk_file("a.bin", index))
    assert verbs(weights(toy)) == []
    assert everything_is_installed(toy)


def test_an_edit_that_restores_the_mtime_is_noticed(toy: Toy) -> None:
    """Changed bytes under the old size and mtime do not pass for the verified file."""
    weights(toy)
    file = toy.installed("a.bin")
    before = file.stat()
    flip(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    outcome = weights(toy)
    assert [f.kind for f in outcome.notes] == [Kind.WRONG_DIGEST]
    assert everything_is_installed(toy)


@pytest.mark.parametrize("text", ["", "{}", '{"schema": 1, "pieces": 7}', "[" * 9999])
def test_a_damaged_receipt_only_costs_time(toy: Toy, text: str) -> None:
    """A receipt that cannot be understood counts as none: the file is verified again."""
    weights(toy)
    receipt_path(toy.root / "models/toy", "a.bin").write_text(text)
    assert verbs(weights(toy)) == [Verify]


def test_a_receipt_of_another_manifest_does_not_count(toy: Toy) -> None:
    """When the manifest pins other bytes, an old receipt verifies nothing."""
    weights(toy, "note.txt")
    note = toy.artifact("note.txt")

    toy.write_manifest(replace(toy.manifest, artifacts=(replace(note, alternatives=()),)))
    with pytest.raises(WrongContent):
        weights(toy)


def test_a_manifest_whose_whole_digest_is_wrong_gives_no_file(toy: Toy) -> None:
    """Pieces that are right but do not make up the pinned whole are refused."""

    lying = replace(toy.artifact("a.bin"), sha256="0" * 64)
    toy.write_manifest(replace(toy.manifest, artifacts=(lying,)))
    with pytest.raises(WrongContent) as caught:
        weights(toy)
    assert "0" * 64 in caught.value.findings[0].expected
    assert not toy.staged("a.bin").exists()


def test_a_wrong_blob_id_gives_no_file(toy: Toy) -> None:
    """The Hub blob id is held against the assembled whole."""

    lying = replace(toy.artifact("b.bin"), blob_id="0" * 40)
    toy.write_manifest(replace(toy.manifest, artifacts=(lying,)))
    with pytest.raises(WrongContent, match="blob id"):
        weights(toy)


def test_text_of_a_known_edition_is_written(toy: Toy) -> None:
    """A small file whose text is known needs no source."""
    weights(toy, "note.txt")
    assert toy.installed("note.txt").read_text() == NOTE


def test_another_accepted_edition_in_place_is_kept(toy: Toy) -> None:
    """Any edition that the manifest accepts is good as it is."""
    toy.installed("note.txt").parent.mkdir(parents=True)
    toy.installed("note.txt").write_text("another edition")
    assert verbs(weights(toy, "note.txt")) == [Verify]
    assert toy.installed("note.txt").read_text() == "another edition"


def test_fetch_stops_at_the_staging_folder(toy: Toy) -> None:
    """`fetch` brings files to output/ and `place` takes them from there."""
    apply.apply(toy.request(), Target.STAGED)
    assert (toy.staged("a.bin").exists(), toy.installed("a.bin").exists()) == (True, False)
    apply.apply(toy.request(), Target.PLACED)
    assert everything_is_installed(toy)


def test_place_without_staged_files_says_to_fetch(toy: Toy) -> None:
    """`place` alone does not assemble; it names the command that does."""
    with pytest.raises(MissingInput, match="inv fetch"):
        apply.apply(toy.request(), Target.PLACED)


@pytest.fixture
def other_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on another file system than the repository."""
    folder = Path("/dev/shm") / f"csm-weights-test-{os.getpid()}-{tmp_path.name}"
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system here")
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def test_another_file_system_gets_a_verified_copy(toy: Toy, other_disk: Path) -> None:
    """Across file systems files are copied, verified as written, and the staged ones removed."""
    outcome = weights(toy, dest=str(other_disk))
    assert Copy in verbs(outcome)
    assert {p.name: p.read_bytes() for p in other_disk.iterdir() if p.is_file()} == {
        a.path: toy.good(a.path) for a in toy.manifest.artifacts
    }
    assert not toy.staged("a.bin").exists()
    assert verbs(weights(toy, dest=str(other_disk))) == []


def test_another_edition_is_copied_to_another_file_system(toy: Toy, other_disk: Path) -> None:
    """The Hub blob id of the pinned edition says nothing of another one that is accepted."""
    note = replace(toy.artifact("note.txt"), blob_id="0" * 40)
    toy.write_manifest(replace(toy.manifest, artifacts=(note,)))
    assert Copy in verbs(weights(toy, dest=str(other_disk)))
    assert (other_disk / "note.txt").read_text() == NOTE


def test_each_leftover_is_removed_durably_before_the_next(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut between two removals finds the first one done."""
    weights(toy)
    left = [journal_path(toy.installed(name)) for name in ("a.bin", "b.bin")]
    for journal in left:
        journal.write_text("left")
    there: list[int] = []
    monkeypatch.setattr(atomic, "sync", lambda _: there.append(sum(map(Path.exists, left))))
    weights(toy)
    assert there == [1, 0]


@pytest.mark.parametrize("is_link", [False, True])
def test_the_staged_copy_of_an_installed_file_goes(toy: Toy, is_link: bool) -> None:
    """A run that was killed between copying and removing has left it; a link to the file stays."""
    weights(toy, "a.bin")
    staged, installed = toy.staged("a.bin"), toy.installed("a.bin")
    (os.link if is_link else shutil.copy)(installed, staged)
    receipt = read_receipt(installed.parent, "a.bin")
    assert receipt is not None
    for path in (installed, staged):
        now = Fingerprint.of(path.stat())
        install.record(path.parent, replace(receipt, fingerprint=now))
    outcome = weights(toy, "a.bin")
    assert (verbs(outcome), outcome.error) == ([], None)
    assert staged.exists() == receipt_path(staged.parent, "a.bin").exists() == is_link
    assert installed.read_bytes() == toy.good("a.bin")


def test_a_kept_file_with_another_name_is_told(toy: Toy, tmp_path: Path) -> None:
    """A write through that name would change it, as one to the Hub's cache does."""
    weights(toy)
    os.link(toy.installed("a.bin"), tmp_path / "other")
    weights(toy)  # a link changes the file's ctime: it is verified anew
    shown = " ".join(text.render(apply.plan(toy.request(), Target.PLACED)).split())
    assert shown.count("(linked to another file, as in the Hub's cache: chmod a-w") == 1


def test_a_run_ends_where_what_it_does_does_not_last(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program that keeps changing the files keeps no run busy for ever."""
    rounds: list[int] = []
    monkeypatch.setattr(Assemble, "apply", lambda actions, _: rounds.append(len(actions)))
    with pytest.raises(CsmWeightsError, match="the files keep changing") as caught:
        weights(toy, "a.bin")
    assert (rounds, caught.value.exit_code) == ([1] * 12, 1)


def test_verify_hashes_everything_and_passes(toy: Toy, hashed: Callable[[], int]) -> None:
    """`verify` reads every installed byte once and finds all gates open."""
    weights(toy)
    hashed()
    outcome = verify.verify(toy.request())
    assert outcome.error is None
    assert hashed() == sum(len(toy.good(a.path)) for a in toy.manifest.artifacts)


def test_verify_finds_one_flipped_byte_and_says_where(toy: Toy) -> None:
    """A flipped byte closes the digest gate with the byte range of its piece."""
    weights(toy)
    flip(toy.installed("b.bin"), PIECE_SIZE + 3)
    outcome = verify.verify(toy.request())
    assert outcome.error is not None
    piece = toy.artifact("b.bin").pieces[1]
    expected = f"{toy.installed('b.bin')} bytes {piece.offset:,} to {piece.end - 1:,}"
    assert [f.where for f in outcome.error.findings] == [expected]


def test_verify_finds_a_flipped_byte_without_receipts(toy: Toy) -> None:
    """The same holds for files that have no receipt, with and without a whole digest."""
    weights(toy)
    shutil.rmtree(toy.root / "models/toy/.csm-weights")
    for name in ("a.bin", "b.bin"):
        flip(toy.installed(name), 2 * PIECE_SIZE + 3)
    outcome = verify.verify(toy.request())
    assert outcome.error is not None
    starts = [f.where.partition("bytes ")[2].split()[0] for f in outcome.error.findings]
    assert starts == [f"{2 * PIECE_SIZE:,}"] * 2


def test_verify_of_a_missing_file_is_a_missing_input(toy: Toy) -> None:
    """A installed file that has gone is exit 3, though nothing else is wrong."""
    weights(toy)
    toy.installed("a.bin").unlink()
    outcome = verify.verify(toy.request())
    assert outcome.error is not None
    assert outcome.error.exit_code == 3


def test_verify_is_about_installed_files(toy: Toy) -> None:
    """A file that is verified in staging alone is missing."""
    apply.apply(toy.request("a.bin"), Target.STAGED)
    outcome = verify.verify(toy.request("a.bin"))
    assert outcome.error is not None and outcome.error.exit_code == 3
    (finding,) = outcome.error.findings
    assert (finding.kind, finding.where) == (Kind.MISSING, str(toy.installed("a.bin")))


def test_verify_writes_nothing(toy: Toy) -> None:
    """`verify` leaves no trace, even of files it has never seen."""
    toy.installed("a.bin").parent.mkdir(parents=True)
    toy.installed("a.bin").write_bytes(toy.good("a.bin"))
    before = sorted(toy.root.rglob("*"))
    verify.verify(toy.request("a.bin"))
    assert sorted(toy.root.rglob("*")) == before


def test_verify_writes_sums_that_it_accepts(toy: Toy) -> None:
    """--write-sums makes a SHA256SUMS of all files, and --sums holds files against it."""
    weights(toy)
    assert verify.verify(toy.request(), write_sums=True).error is None
    sums = toy.root / "models/toy/SHA256SUMS"
    assert len(sums.read_text().splitlines()) == 3
    assert verify.verify(toy.request(), sums=str(sums)).error is None


def test_verify_refuses_sums_that_differ(toy: Toy) -> None:
    """A digest in SHA256SUMS that is not the file's closes the gate."""
    weights(toy)
    sums = toy.root / "SUMS"
    sums.write_text(f"{'0' * 64}  a.bin\n")
    outcome = verify.verify(toy.request(), sums=str(sums))
    assert outcome.error is not None
    assert outcome.error.exit_code == 4


def test_status_check_is_clean_only_when_all_is_verified(toy: Toy) -> None:
    """`status --check` fails before, and passes after, the weights are in place."""
    before = apply.status(toy.request(), check=True)
    weights(toy)
    after = apply.status(toy.request(), check=True)
    assert (before.error is None, after.error is None) == (False, True)


def test_status_check_of_a_changed_file_is_wrong_content(toy: Toy) -> None:
    """A file that was touched since it was verified ends `status --check` with 4, not 3."""
    weights(toy)
    os.utime(toy.installed("a.bin"), ns=(1, 1))
    error = apply.status(toy.request(), check=True).error
    assert error is not None
    assert ([f.kind for f in error.findings], error.exit_code) == ([Kind.EDITED], 4)
    assert "changed since it was verified" in str(error) and "while read" not in str(error)


@pytest.fixture
def refused(toy: Toy) -> Toy:
    """A toy whose a.bin has the digest that is pinned, and is no safetensors file."""
    a, *rest = toy.manifest.artifacts
    toy.write_manifest(replace(toy.manifest, artifacts=(replace(a, format="safetensors"), *rest)))
    return toy


def test_what_the_gates_refuse_is_not_installed(refused: Toy) -> None:
    """It stays in staging, and every command says the same of it, as often as it is asked."""
    request = refused.request("all")
    assert apply.apply(request, Target.STAGED).error is None
    for target in (Target.BOTH, Target.PLACED, Target.BOTH):
        with pytest.raises(WrongContent) as caught:
            apply.apply(request, target)
        assert [f.kind for f in caught.value.findings] == [Kind.MALFORMED]
    assert not any(refused.installed(a.path).exists() for a in refused.manifest.artifacts)
    assert refused.staged("a.bin").read_bytes() == refused.good("a.bin")
    report = apply.status(request, check=True)
    assert report.error is not None and report.refused == {"a.bin"}
    assert [f.kind for f in report.error.findings] == [Kind.MALFORMED]


def test_status_check_says_what_verify_says(refused: Toy) -> None:
    """Of a file that someone has put in place, though its receipt is good."""
    refused.installed("a.bin").parent.mkdir(parents=True)
    refused.installed("a.bin").write_bytes(refused.good("a.bin"))
    request = refused.request("a.bin")
    results: list[Outcome | StatusReport] = [apply.weights(request, smoke=False) for _ in "12"]
    results += [verify.verify(request), apply.status(request, check=True)]
    errors = [result.error for result in results]
    assert [error.exit_code for error in errors if error] == [4, 4, 4, 4]
    assert len(set(map(str, errors))) == 1
    checked = results[-1]
    assert "keep" not in text.render(checked) and "refused  a.bin" in text.render(checked)
    assert json.loads(render_json(checked))["ok"] is False
    assert refused.installed("a.bin").read_bytes() == refused.good("a.bin")


@pytest.fixture
def opened(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all files below the repository that are opened from now on."""
    names: list[str] = []

    def watched(real: Any) -> Any:
        def opening(path: Any, *rest: Any, **options: Any) -> Any:
            if str(path).startswith(str(toy.root)):
                names.append(Path(path).name)
            return real(path, *rest, **options)

        return opening

    monkeypatch.setattr(os, "open", watched(os.open))
    monkeypatch.setattr(io, "open", watched(io.open))
    return names


def test_status_and_dry_runs_read_the_content_of_no_file(toy: Toy, opened: list[str]) -> None:
    """Neither chunk files nor files in place are opened, though one of them is missing."""
    toy.installed("b.bin").parent.mkdir(parents=True)
    shutil.copy(toy.chunk_file("b.bin", 0), toy.installed("b.bin"))
    os.truncate(toy.installed("b.bin"), toy.artifact("b.bin").size)
    toy.chunk_file("a.bin", 0).unlink()
    opened.clear()
    apply.status(toy.request(), check=True)
    for target in Target:
        with pytest.raises(MissingInput):
            apply.plan(toy.request(), target)
    assert {name for name in opened if ".bin" in name and not name.endswith(".json")} == set()
    assert "toy.toml" in opened


@pytest.fixture
def inspections(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One item for each inspection of the disk."""
    count: list[int] = []

    def counted(*arguments: Any) -> State:
        count.append(1)
        return inspect(*arguments)

    monkeypatch.setattr(session, "inspect", counted)
    return count


def test_the_disk_is_inspected_once_a_round(toy: Toy, inspections: list[int]) -> None:
    """Before the lock, for each kind of action, and at the end; a second run inspects once."""
    outcome = weights(toy, "a.bin")
    assert verbs(outcome) == [Assemble, Move]
    assert len(inspections) == 1 + len(outcome.actions) + 1
    inspections.clear()
    weights(toy, "a.bin")
    assert len(inspections) == 1


def test_what_is_missing_is_looked_for_three_times(toy: Toy, inspections: list[int]) -> None:
    """Another run may be moving it just then."""
    toy.chunk_file("a.bin", 0).unlink()
    with pytest.raises(MissingInput):
        weights(toy, "a.bin")
    assert len(inspections) == 3


def works(toy: Toy, *only: str, act: Callable[[Request], object] | None = None) -> list[Any]:
    """Each work that a run tells, with its bytes."""
    told = io.StringIO()
    with JsonLines("weights", told):
        (act or (lambda request: apply.weights(request, smoke=False)))(toy.request(*only))
    lines = [json.loads(line) for line in told.getvalue().splitlines()]
    return [(line["label"], line["total"]) for line in lines if line["event"] == "begin"]


def test_each_work_is_told_with_its_bytes(toy: Toy) -> None:
    """What is done to which file, or to how many; a second run takes receipts for digests."""
    a, b = (toy.artifact(name).size for name in ("a.bin", "b.bin"))
    gates = [("verifying 3 files", None)]
    assert works(toy) == [
        ("write note.txt", None),
        ("assemble 2 files", None),
        ("assembling 2 files", a + b),
        *gates,
        ("install 3 files", None),
        *gates,
    ]
    assert works(toy) == gates
    os.utime(toy.installed("b.bin"))
    verifying = [("verify b.bin", None), ("verifying b.bin", b)]
    assert works(toy) == [*verifying, *gates]
    flip(toy.installed("a.bin"))
    assert works(toy, "a.bin")[:2] == [("verify a.bin", None), ("verifying a.bin", a)]
    assert works(toy, act=verify.verify) == [("verifying 3 files", a + b + len(NOTE))]
    toy.installed("b.bin").unlink()
    verified = works(toy, act=verify.verify)
    assert verified == [("verifying 2 files", a + len(NOTE))]


def test_status_writes_nothing(toy: Toy) -> None:
    """Inspecting leaves no trace, and without a check what is missing is no error."""
    before = sorted(toy.root.rglob("*"))
    assert apply.status(toy.request()).error is None
    assert sorted(toy.root.rglob("*")) == before


def test_too_little_disk_is_reported_before_anything_is_written(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With too little room the run ends with exit 7 and no file, saying how much is missing."""
    usage = shutil.disk_usage(toy.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(CsmWeightsError) as caught:
        weights(toy)
    assert (caught.value.exit_code, caught.value.findings[0].kind) == (7, Kind.NO_SPACE)
    assert not (toy.root / "output").exists()


@pytest.mark.parametrize("folder", ["/", "//", "/tmp/.."])
def test_the_root_of_the_file_system_is_no_destination(toy: Toy, folder: str) -> None:
    """`--dest /` is misuse: the files go to a folder of their own."""
    with pytest.raises(UsageError, match="a folder of its own is expected"):
        apply.status(toy.request(dest=folder))


def test_check_names_each_file_once(toy: Toy) -> None:
    """A file that is to be assembled and then moved is one finding of `status --check`."""
    error = apply.status(toy.request("a.bin"), check=True).error
    assert error
    assert [f.where for f in error.findings] == ["a.bin"]
    assert error.findings[0].help == "inv weights --model toy --only a.bin"


def test_clean_removes_unfinished_files_only(toy: Toy) -> None:
    """`clean` takes partials and journals away and leaves what is verified."""
    weights(toy, "a.bin")
    flip(toy.chunk_file("b.bin", 1))
    with pytest.raises(WrongContent):
        weights(toy, "b.bin")
    assert partial_path(toy.staged("b.bin")).exists()
    clean(toy.request("all"), dry=False)
    assert not partial_path(toy.staged("b.bin")).exists()
    assert toy.installed("a.bin").exists()


def test_chunk_files_behind_links_inside_the_folder_are_fine(toy: Toy, tmp_path: Path) -> None:
    """A chunk file may be a link to another place in chunks/, and chunks/ one to anywhere."""
    part, chunks = toy.chunk_file("a.bin", 1), toy.root / "chunks"
    part.rename(chunks / "elsewhere")
    part.symlink_to(chunks / "elsewhere")
    chunks.rename(tmp_path / "another disk")
    chunks.symlink_to(tmp_path / "another disk")
    weights(toy)
    assert everything_is_installed(toy)


@pytest.mark.parametrize("what", ["file", "folder"])
def test_chunk_files_behind_links_out_of_the_folder_are_refused(
    toy: Toy, tmp_path: Path, what: str
) -> None:
    """A link in a repository leads to none of the user's other files, right as they may be."""
    part = toy.chunk_file("a.bin", 1)
    linked = part if what == "file" else part.parent
    linked.rename(tmp_path / "elsewhere")
    linked.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WrongContent, match="chunks/ itself be the link") as caught:
        weights(toy)
    assert {finding.kind for finding in caught.value.findings} == {Kind.IN_THE_WAY}
    assert not toy.installed("a.bin").exists()


def test_a_partial_that_is_a_link_is_not_written_through(toy: Toy) -> None:
    """A link planted under the partial's name never has its target overwritten."""
    target = toy.root / "precious"
    target.write_text("precious")
    partial = partial_path(toy.staged("a.bin"))
    partial.parent.mkdir(parents=True)
    partial.symlink_to(target)
    with pytest.raises(CsmWeightsError):
        weights(toy, "a.bin")
    assert target.read_text() == "precious"


def test_a_missing_chunk_file_does_not_hide_a_wrong_one(toy: Toy) -> None:
    """When a chunk file is missing, the others are hashed too: all is reported in one round."""
    damage_missing(toy.chunk_file("a.bin", 0))
    flip(toy.chunk_file("a.bin", 3))
    with pytest.raises(WrongContent) as caught:
        weights(toy)
    assert {f.kind for f in caught.value.findings} == {Kind.MISSING, Kind.WRONG_DIGEST}


def test_all_wrong_pieces_of_a_file_in_place_are_reported(toy: Toy) -> None:
    """The note about a damaged file names each byte range that is wrong."""
    weights(toy)
    flip(toy.installed("a.bin"), 5)
    flip(toy.installed("a.bin"), 3 * PIECE_SIZE + 5)
    (note,) = weights(toy).notes
    assert (note.kind, note.where) == (Kind.WRONG_DIGEST, str(toy.installed("a.bin")))
    assert note.found.count("bytes ") == 2


def forge(toy: Toy, path: str, digest: str) -> None:
    """Writes another whole-file sha256 into the receipt of a installed file."""
    file = receipt_path(toy.root / "models/toy", path)
    receipt = json.loads(file.read_text())
    file.write_text(json.dumps({**receipt, "sha256": digest}))


@pytest.mark.parametrize("path", ["a.bin", "b.bin"])
def test_a_forged_receipt_condemns_no_good_file(toy: Toy, path: str) -> None:
    """A receipt that tells another digest than the manifest counts as none."""
    weights(toy)
    forge(toy, path, "0" * 64)
    assert verify.verify(toy.request()).error is None


def test_a_forged_receipt_vouches_for_nothing(toy: Toy) -> None:
    """Where the manifest pins no whole digest, it is taken from the file, not from a receipt."""
    bare = replace(toy.artifact("b.bin"), blob_id=None)
    toy.write_manifest(replace(toy.manifest, artifacts=(bare,)))
    weights(toy)
    forge(toy, "b.bin", "0" * 64)
    verify.verify(toy.request(), write_sums=True)
    expected = hashlib.sha256(toy.good("b.bin")).hexdigest()
    assert (toy.root / "models/toy/SHA256SUMS").read_text() == f"{expected}  b.bin\n"


@pytest.mark.parametrize("folder", ["output/toy", "models/toy", "output"])
def test_folders_behind_links_are_fine(
    toy: Toy, tmp_path_factory: pytest.TempPathFactory, folder: str
) -> None:
    """A staging or destination folder may be a link to a larger disk."""
    (toy.root / folder).parent.mkdir(parents=True, exist_ok=True)
    (toy.root / folder).symlink_to(tmp_path_factory.mktemp("disk"))
    weights(toy)
    assert everything_is_installed(toy)


def test_two_mounts_of_one_device_get_a_copy(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a rename is refused as across devices, the file is copied and verified instead."""
    real = Path.replace

    def refuse(self: Path, target: Path) -> Path:
        if self.parent == toy.root / "output/toy" != target.parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    weights(toy)
    assert everything_is_installed(toy)
    assert not toy.staged("a.bin").exists()


def test_a_folder_in_the_way_is_reported_before_anything_is_done(toy: Toy) -> None:
    """A folder that has a file's name is a finding, and no byte is copied."""
    toy.installed("a.bin").mkdir(parents=True)
    with pytest.raises(WrongContent) as caught:
        weights(toy)
    assert [f.kind for f in caught.value.findings] == [Kind.IN_THE_WAY]
    assert not (toy.root / "output").exists()


def test_an_interrupted_copy_goes_on_where_it_stopped(
    toy: Toy, other_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Across file systems, too, verified pieces are kept for the next run."""
    real = install.install

    def fail(verified: Path, directory: Path, receipt: Receipt) -> Receipt:
        if directory == other_disk:
            raise KeyboardInterrupt
        return real(verified, directory, receipt)

    monkeypatch.setattr(install, "install", fail)
    with pytest.raises(KeyboardInterrupt):
        weights(toy, "a.bin", dest=str(other_disk))
    monkeypatch.undo()
    report = apply.status(toy.request("a.bin", dest=str(other_disk)))
    assert [(type(s), s.cost.written) for s in report.plan.actions] == [(Copy, 0)]


def test_an_unfinished_chunk_file_is_not_taken_for_one_too_many(toy: Toy) -> None:
    """What a killed split left beside the chunk files is no finding, and clean removes it."""
    left = toy.chunk_file("a.bin", 1).with_name(toy.chunk_file("a.bin", 1).name + ".partial")
    left.write_bytes(b"half")
    weights(toy)
    clean(toy.request("all"), dry=False)
    assert not left.exists()


def test_sums_of_other_files_stay(toy: Toy) -> None:
    """--write-sums with --only updates its lines and leaves the others."""
    weights(toy)
    verify.verify(toy.request(), write_sums=True)
    verify.verify(toy.request("a.bin"), write_sums=True)
    assert len((toy.root / "models/toy/SHA256SUMS").read_text().splitlines()) == 3


def test_a_file_that_goes_away_during_verify_is_reported(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is deleted while it is hashed closes its gate, and is no crash."""
    weights(toy)
    real = hashing.feed

    def vanish(*args: Any) -> None:
        real(*args)
        toy.installed("a.bin").unlink(missing_ok=True)

    monkeypatch.setattr("csm_weights.hashing.feed", vanish)
    outcome = verify.verify(toy.request("a.bin"))
    assert outcome.error is not None
    assert outcome.error.exit_code == 4


def test_two_checkouts_with_one_destination_take_turns(tmp_path: Path) -> None:
    """While one run is placing into a folder, another checkout's run into it waits."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    first, second = Toy.make(tmp_path / "one"), Toy.make(tmp_path / "two")
    dest = str(tmp_path / "dest")
    apply.apply(first.request("a.bin", dest=dest), Target.BOTH)
    lock = FileLock(tmp_path / "dest" / ".csm-weights" / ".lock")
    with ThreadPoolExecutor(1) as pool:
        with lock:
            waiting = pool.submit(apply.apply, second.request("b.bin", dest=dest), Target.BOTH)
            time.sleep(0.5)
            assert not (tmp_path / "dest" / "b.bin").exists()
        waiting.result(timeout=30)
    assert (tmp_path / "dest" / "b.bin").exists()


def have_blocks(toy: Toy, *paths: str) -> bool:
    """Whether the receipts of installed files have the digests of blocks that tile them."""
    for path in paths:
        receipt = read_receipt(toy.installed("a.bin").parent, path)
        assert receipt is not None
        content, at = toy.good(path), 0
        for block in receipt.blocks:
            found = hashlib.sha256(content[at : at + block.size]).hexdigest()
            assert (block.offset, block.sha256) == (at, found)
            at += block.size
        if at != len(content):
            return False
    return True


def test_block_digests_are_kept_in_the_receipts(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, hashed: Callable[[], int]
) -> None:
    """They are taken as files are assembled, stay when files move, and a second run does nothing.

    Without the option there are none, and a later run with it hashes what is installed.
    """
    monkeypatch.setattr(hashing, "DIGEST_BLOCK", 16 << 10)
    asked = replace(toy.request(), block_digests=True)
    assert apply.weights(asked, smoke=False).error is None
    assert have_blocks(toy, "a.bin", "b.bin", "note.txt")
    hashed()
    assert verbs(apply.weights(asked, smoke=False)) == []
    assert hashed() == 0

    shutil.rmtree(toy.installed("a.bin").parent)
    weights(toy)
    assert not have_blocks(toy, "a.bin")
    assert set(verbs(apply.weights(asked, smoke=False))) == {Verify}
    assert have_blocks(toy, "a.bin", "b.bin", "note.txt")


def test_block_digests_outlive_a_killed_run(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces that an earlier run verified without them are hashed in blocks by the next."""
    monkeypatch.setattr(hashing, "DIGEST_BLOCK", 16 << 10)
    saved = toy.chunk_file("a.bin", 3).read_bytes()
    flip(toy.chunk_file("a.bin", 3))
    with pytest.raises(WrongContent):
        weights(toy, "a.bin")
    toy.chunk_file("a.bin", 3).write_bytes(saved)
    apply.weights(replace(toy.request("a.bin"), block_digests=True), smoke=False)

    assert have_blocks(toy, "a.bin")
