"""Chunk files that go as their file grows: killed, tampered with, refused; no byte is lost."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from csm_weights import progress
from csm_weights.commands.clean import clean
from csm_weights.commands.render import json as as_json
from csm_weights.commands.render import text as as_text
from csm_weights.commands.split import split_file as split
from csm_weights.errors import CsmWeightsError, Kind, NoSpace, UsageError, WrongContent
from csm_weights.manifest.types import Artifact, Edition, Piece
from csm_weights.pipeline import apply
from csm_weights.pipeline import plan as plan_module
from csm_weights.pipeline.actions import Assemble, Consume, Move
from csm_weights.pipeline.plan import Target, make_plan
from csm_weights.pipeline.request import Request
from csm_weights.pipeline.session import Outcome
from csm_weights.store import atomic, block_io, inspect
from csm_weights.store.consumed import CONSUMING_ROOM
from csm_weights.store.inspect import ArtifactState, FileState
from csm_weights.store.journal import (
    Arrival,
    Consumed,
    PieceRecord,
    Refuted,
    journal_path,
    parse_line,
    partial_path,
)
from csm_weights.transfer import assemble, consume
from csm_weights.transfer.policy import HUB, SourcePolicy
from csm_weights.untrusted import dump_record
from tests.e2e.test_full_disk import Act, Tripwire, exit_code
from tests.support.toy import PIECE_SIZE, Toy, flip

#: Bytes of a step here: two or three to a chunk file, the last one short.
STEP = 32 << 10

#: The file most tests make: three chunk files, so eight steps.
NAME = "b.bin"

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that fit the toy's chunk files."""
    monkeypatch.setattr(consume, "STEP", STEP)


def asked(toy: Toy, *only: str, consuming: bool = True) -> Request:
    return replace(toy.request(*(only or (NAME,))), consume=consuming)


def fetch(toy: Toy, *only: str, consuming: bool = True) -> Outcome:
    return apply.apply(asked(toy, *only, consuming=consuming), Target.STAGED)


def chunk_files_of(toy: Toy, name: str = NAME) -> list[Path]:
    return [toy.root / piece.part for piece in toy.artifact(name).pieces]


def partial_of(toy: Toy, name: str = NAME) -> Path:
    return partial_path(toy.staged(name))


def moved(toy: Toy, name: str = NAME) -> dict[int, int]:
    """What the journal says of each piece, by offset: bytes that are in the partial."""
    path = journal_path(toy.staged(name))
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    found = [r for r in map(parse_line, lines) if isinstance(r, Consumed)]
    return {record.offset: record.consumed for record in found}


def lost(toy: Toy, name: str = NAME) -> list[str]:
    """The pieces whose bytes are nowhere: not in the file, the partial, or the chunk file."""
    good, gone = toy.good(name), moved(toy, name)
    if toy.staged(name).exists():
        return [] if toy.staged(name).read_bytes() == good else [name]
    partial = partial_of(toy, name).read_bytes() if partial_of(toy, name).exists() else b""

    def there_is(piece: Piece) -> bool:
        part = toy.root / piece.part
        done, content = gone.get(piece.offset, 0), part.read_bytes() if part.exists() else b""
        joined = partial[piece.offset : piece.offset + done] + content[done:]
        return good[piece.offset : piece.end] in (joined, content)

    return [piece.part for piece in toy.artifact(name).pieces if not there_is(piece)]


def is_finished(toy: Toy, name: str = NAME) -> bool:
    """Whether the file is right under its name, and no chunk file or unfinished file is left."""
    left = [path for path in (*chunk_files_of(toy, name), partial_of(toy, name)) if path.exists()]
    return toy.staged(name).read_bytes() == toy.good(name) and not left


def kinds(error: CsmWeightsError) -> set[Kind]:
    return {finding.kind for finding in error.findings}


# ---- the straight way


def test_chunk_files_go_and_the_file_is_right(toy: Toy) -> None:
    """Both files come into place whole, verified, and no chunk file is left."""
    outcome = apply.weights(asked(toy, "a.bin", NAME), smoke=False)
    assert outcome.error is None
    assert [s.artifact.path for s in outcome.actions if type(s) is Consume] == ["a.bin", NAME]
    for name in ("a.bin", NAME):
        assert toy.installed(name).read_bytes() == toy.good(name)
        assert [part for part in chunk_files_of(toy, name) if part.exists()] == []


def test_a_second_run_has_nothing_to_do(toy: Toy) -> None:
    """Once the chunk files are gone the file in place is all there is, and all that is needed."""
    apply.weights(asked(toy), smoke=False)
    assert apply.weights(asked(toy), smoke=False).actions == ()
    assert apply.status(asked(toy, consuming=False), check=True).error is None


def test_split_brings_the_chunk_files_back(toy: Toy) -> None:
    """Cut from the file again, the chunk files have their names and their digests."""
    fetch(toy)
    made = split(toy.staged(NAME), toy.root, f"chunks/toy/{NAME}", PIECE_SIZE, lambda _: None)
    assert made.pieces == toy.artifact(NAME).pieces
    for piece in made.pieces:
        content = (toy.root / piece.part).read_bytes()
        assert hashlib.sha256(content).hexdigest() == piece.sha256


def test_each_step_frees_what_it_wrote(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chunk files and the partial together never hold much more than the file and one step."""
    held: list[int] = []
    real = block_io.punch

    def measured(fd: int, offset: int, size: int) -> None:
        assert offset == 0
        every = [*chunk_files_of(toy), partial_of(toy)]
        held.append(sum(path.stat().st_blocks * 512 for path in every))
        real(fd, offset, size)

    monkeypatch.setattr(consume, "punch", measured)
    fetch(toy)
    blocks = 4096 * (len(chunk_files_of(toy)) + 1)
    assert len(held) == 3 + 3 + 2
    assert max(held) <= toy.artifact(NAME).size + STEP + blocks


@pytest.mark.parametrize("is_readable", [True, False])
def test_the_unfinished_file_has_its_name_before_bytes_go(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, is_readable: bool
) -> None:
    """The folders above it are made durable first, once: after a power cut it can be found.

    They are those of its file system, up to one that may not be read. In the end so are
    the file's bytes, and then the folder that its chunk files were in.
    """
    events: list[Path | str] = []
    sync, punch, access = atomic.sync, block_io.punch, os.access

    def synced(path: Path) -> None:
        events.append(path)
        sync(path)

    def punched(fd: int, offset: int, size: int) -> None:
        events.append("punched")
        punch(fd, offset, size)

    def allowed(path: Path, mode: int, **rest: Any) -> bool:
        return access(path, mode, **rest) and (is_readable or path != toy.root)

    monkeypatch.setattr(assemble, "sync", synced)
    monkeypatch.setattr(os, "access", allowed)
    monkeypatch.setattr(consume, "punch", punched)
    monkeypatch.setattr(consume, "sync", synced)
    fetch(toy)
    folders, device = partial_of(toy).parents, toy.root.stat().st_dev
    above = list(itertools.takewhile(lambda folder: folder.stat().st_dev == device, folders))
    in_the_end = [partial_of(toy), chunk_files_of(toy)[0].parent]
    assert events == [*(above if is_readable else above[:2]), *["punched"] * 8, *in_the_end]


@pytest.mark.parametrize("consuming", [True, False])
def test_what_comes_out_of_chunk_files_is_counted(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, consuming: bool
) -> None:
    """Every byte once, whether it is copied or moved."""
    monkeypatch.setattr(progress, "taken", Counter())
    fetch(toy, consuming=consuming)
    assert progress.taken == {"chunk": toy.artifact(NAME).size}


def test_status_shows_the_plan_and_its_peak(toy: Toy) -> None:
    """Status with --consume tells the step, and the most disk that it takes besides."""
    report = apply.status(asked(toy))
    text = as_text.render(report)
    assert f"{Consume.verb} from 3 chunk files" in " ".join(text.split())
    assert "at most 64.0 MiB more of disk" in " ".join(text.split())
    data = json.loads(as_json.render(report))
    assert data["bytes_to_write"] == data["bytes_freed_meanwhile"] == toy.artifact(NAME).size


# ---- killed anywhere


def run_until(toy: Toy, at: int, act: Act) -> int:
    """Runs in a process of its own, which dies at its `at`-th act on the disk; its exit status."""
    child = os.fork()
    if child == 0:
        try:
            with Tripwire(toy.root, at, act):
                fetch(toy)
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def made(root: Path) -> Toy:
    root.mkdir()
    return Toy.make(root)


def acts_of(toy: Toy) -> list[str]:
    """The acts on the disk that a whole run takes, by the names of the calls."""
    with Tripwire(toy.root) as wire:
        fetch(toy)
    return wire.names


#: The acts before which each of these makes a difference.
WRITES = ("write", "pwrite")
LASTING = ("fsync", "fdatasync", "punch", "unlink", "replace")


@pytest.mark.parametrize(
    ("act", "calls"), [(Act.KILL, None), (Act.TEAR, WRITES), (Act.CUT, LASTING)]
)
def test_killed_at_every_act_no_byte_is_lost_and_it_goes_on(
    tmp_path: Path, act: Act, calls: tuple[str, ...] | None
) -> None:
    """Killed before, killed halfway, or the power cut: a plain run finishes from what is left."""
    names = acts_of(made(tmp_path / "whole"))
    assert names.count("punch") == 8
    model = made(tmp_path / "model")
    for at in (at for at, name in enumerate(names, 1) if not calls or name in calls):
        root = tmp_path / "toy"
        shutil.copytree(model.root, root)
        toy = Toy(root, model.manifest)
        assert os.WTERMSIG(run_until(toy, at, act)) == signal.SIGKILL, at
        assert lost(toy) == [], at
        fetch(toy, consuming=not any(moved(toy).values()))
        assert is_finished(toy), at
        shutil.rmtree(root)


def test_stopped_at_every_act_no_byte_is_lost(tmp_path: Path) -> None:
    """An error out of any act is reported, and the next run finishes from what is left."""
    total = len(acts_of(made(tmp_path / "whole")))
    model = made(tmp_path / "model")
    for at in range(1, total + 1, 3):
        root = tmp_path / "toy"
        shutil.copytree(model.root, root)
        toy = Toy(root, model.manifest)
        failing = pytest.raises((CsmWeightsError, OSError))
        with Tripwire(root, at, Act.FAIL, errno.EIO), failing as caught:
            fetch(toy)
        assert exit_code(caught.value) in (4, 7), at
        assert lost(toy) == [], at
        fetch(toy)
        assert is_finished(toy), at
        shutil.rmtree(root)


def begun(toy: Toy, steps: int = 4) -> Toy:
    """The toy after a run that was killed when it had punched this often."""
    child = os.fork()
    if child == 0:
        real, punched = block_io.punch, [0]

        def counting(fd: int, offset: int, size: int) -> None:
            real(fd, offset, size)
            punched[0] += 1
            if punched[0] == steps:
                os.kill(os.getpid(), signal.SIGKILL)

        consume.punch = counting  # type: ignore[attr-defined]
        fetch(toy)
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    return toy


def test_without_its_journal_a_hole_is_not_copied_over_the_only_copy(toy: Toy) -> None:
    """Someone removes the journal of a begun run: nothing is touched, and it is reported why."""
    begun(toy)
    journal = journal_path(toy.staged(NAME))
    kept, partial = journal.read_bytes(), partial_of(toy).read_bytes()
    journal.unlink()
    for consuming in (False, True):
        with pytest.raises(WrongContent, match="begins with a hole"):
            fetch(toy, consuming=consuming)
    assert partial_of(toy).read_bytes() == partial
    journal.write_bytes(kept)
    fetch(toy)
    assert is_finished(toy)


def test_a_journal_that_outlived_its_file_consumes_nothing(tmp_path: Path) -> None:
    """Chunk files that were brought back stay, though a killed run has left its journal."""
    toy = made(tmp_path / "toy")
    shutil.copytree(toy.root / "chunks", tmp_path / "chunks")
    begun(toy)
    stale = journal_path(toy.staged(NAME)).read_bytes()
    fetch(toy)
    journal_path(toy.staged(NAME)).write_bytes(stale)
    toy.staged(NAME).unlink()
    shutil.copytree(tmp_path / "chunks", toy.root / "chunks", dirs_exist_ok=True)
    flip(toy.chunk_file(NAME, 2))
    with pytest.raises(WrongContent):
        fetch(toy, consuming=False)
    flip(toy.chunk_file(NAME, 2))
    fetch(toy, consuming=False)
    assert toy.staged(NAME).read_bytes() == toy.good(NAME)
    assert all(part.exists() for part in chunk_files_of(toy))


# ---- what a begun one looks like


def test_a_begun_chunk_file_is_reported_as_consumed(toy: Toy) -> None:
    """Inspection, plan and status know a chunk file that is partly gone, and its bytes' place."""
    report = apply.status(asked(begun(toy), consuming=False))
    parts = report.state.artifacts[0].chunks
    consumed, unverified = FileState.CONSUMED, FileState.UNVERIFIED
    assert [part.state for part in parts] == [consumed, consumed, unverified]
    assert [part.finding for part in parts] == [None] * 3
    assert [type(step) for step in report.plan.actions][:1] == [Consume]
    part = toy.artifact(NAME).pieces[1].part
    assert f"the unfinished file, and the rest of {part}" in " ".join(
        as_text.render(report).split()
    )


def test_a_plain_run_goes_on_with_a_begun_one(toy: Toy) -> None:
    """Whoever leaves --consume out the second time still gets the file."""
    outcome = fetch(begun(toy), consuming=False)
    assert is_finished(toy)
    assert [type(step) for step in outcome.actions] == [Consume]


@pytest.mark.parametrize("consuming", [True, False])
def test_once_all_bytes_were_moved_the_chunk_files_are_not_missed(
    toy: Toy, consuming: bool
) -> None:
    """Someone removes what is left of them, with their folder: the file is finished."""
    begun(toy, steps=8)
    shutil.rmtree(toy.chunk_file(NAME, 0).parent)
    fetch(toy, consuming=consuming)
    assert is_finished(toy)


def test_other_editions_of_a_file_are_not_held_against_its_chunk_files(toy: Toy) -> None:
    """They make up the first edition, and are consumed."""
    a, b, note = toy.manifest.artifacts
    other = Edition(b.size + 1, "0" * 64, None)
    toy.write_manifest(
        replace(toy.manifest, artifacts=(a, replace(b, alternatives=(other,)), note))
    )
    fetch(toy)
    assert is_finished(toy)


def test_recombine_takes_no_begun_chunk_file(toy: Toy) -> None:
    """The script without Python writes nothing, and names the command that goes on."""
    begun(toy)
    shutil.copy(REPOSITORY / "recombine.sh", toy.root)
    command = ["bash", "recombine.sh", "--model", "toy", "b.bin"]
    done = subprocess.run(command, cwd=toy.root, capture_output=True, text=True)
    assert done.returncode == 4, done.stderr
    told = [line for line in done.stderr.splitlines() if "make weights MODEL=toy" in line]
    assert [toy.artifact(NAME).pieces[i].part in line for i, line in enumerate(told)] == [True] * 2
    assert lost(toy) == []


def test_clean_keeps_what_was_consumed(toy: Toy) -> None:
    """Clean leaves the only copy of consumed bytes, and says so."""
    told = str(clean(asked(begun(toy)), dry=False))
    assert str(partial_of(toy)) in told
    assert "kept" in told
    fetch(toy)
    assert is_finished(toy)


def test_another_source_does_not_write_over_what_was_consumed(toy: Toy) -> None:
    """A run that asks only a server gets from there just the pieces that were not begun."""
    state = apply.status(asked(begun(toy))).state
    plan = make_plan(state, Target.STAGED, SourcePolicy(chunks=False, remote=(HUB,)))
    (step,) = plan.having(Consume)
    assert (plan.actions, step.consumed, step.remote) == (
        (step,),
        frozenset({0, PIECE_SIZE}),
        frozenset({2 * PIECE_SIZE}),
    )


def test_a_manifest_that_changed_meanwhile_touches_nothing(toy: Toy) -> None:
    """Bytes of chunk files that the manifest no longer knows are not written over."""
    begun(toy)
    before, old = partial_of(toy).read_bytes(), toy.manifest
    a, b, note = old.artifacts
    pieces = tuple(
        replace(piece, sha256=hashlib.sha256(b"other").hexdigest()) for piece in b.pieces
    )
    toy.write_manifest(replace(old, artifacts=(a, replace(b, pieces=pieces), note)))
    with pytest.raises(WrongContent) as caught:
        fetch(toy)
    assert Kind.STRANDED in kinds(caught.value)
    assert partial_of(toy).read_bytes() == before
    toy.write_manifest(old)
    fetch(toy)
    assert is_finished(toy)


# ---- tampered with


def test_a_flipped_byte_is_found_before_anything_goes(toy: Toy) -> None:
    """One wrong chunk file of eight, of the other file even, and nothing is consumed."""
    flip(toy.chunk_file(NAME, 2))
    before = {
        part: part.read_bytes() for part in (*chunk_files_of(toy), *chunk_files_of(toy, "a.bin"))
    }
    with pytest.raises(WrongContent) as caught:
        fetch(toy, "a.bin", NAME)
    [finding] = caught.value.findings
    piece = toy.artifact(NAME).pieces[2]
    content = (toy.root / piece.part).read_bytes()
    assert (finding.where, finding.expected) == (piece.part, f"sha256 {piece.sha256}")
    assert finding.found == hashlib.sha256(content).hexdigest()
    assert {part: part.read_bytes() for part in before} == before
    assert (moved(toy), moved(toy, "a.bin")) == ({}, {})


def test_a_wrong_whole_digest_is_found_before_anything_goes(toy: Toy) -> None:
    """Chunk files that are right and make up another file than is pinned are left alone."""
    a, b, note = toy.manifest.artifacts
    toy.write_manifest(replace(toy.manifest, artifacts=(a, replace(b, blob_id="0" * 40), note)))
    with pytest.raises(WrongContent) as caught:
        fetch(toy)
    assert kinds(caught.value) == {Kind.WRONG_DIGEST}
    assert all(
        part.stat().st_size and part.read_bytes().strip(b"\0") for part in chunk_files_of(toy)
    )
    assert moved(toy) == {}


class Blind:
    """A fingerprint that notices nothing."""

    @staticmethod
    def of(_: os.stat_result) -> str:
        return "the same"


@pytest.mark.parametrize(
    ("byte", "is_blind"), [(1000, False), (1000, True), (1001, True), (1002, True), (1003, True)]
)
def test_a_chunk_file_that_changes_after_its_proof_is_not_punched(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, byte: int, is_blind: bool
) -> None:
    """What is copied is held against what was verified, so a later write loses nothing."""
    victim, real = toy.chunk_file(NAME, 1), consume.verify

    def verify_then_change(*arguments: Any) -> list[consume.Proof]:
        proofs = real(*arguments)
        flip(victim, byte)
        return proofs

    monkeypatch.setattr(consume, "verify", verify_then_change)
    if is_blind:
        monkeypatch.setattr(consume, "Fingerprint", Blind)
    with pytest.raises(WrongContent) as caught:
        fetch(toy)
    assert Kind.CHANGED in kinds(caught.value)
    assert moved(toy)[PIECE_SIZE] == 0
    flip(victim, byte)
    monkeypatch.undo()
    assert lost(toy) == []
    fetch(toy)
    assert is_finished(toy)


def cut_off(chunk: Path) -> None:
    os.truncate(chunk, 1000)


def test_a_chunk_file_that_goes_after_its_proof_is_reported(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is its own finding, and what was moved before stays."""
    victim, real = toy.chunk_file(NAME, 1), consume.verify

    def verify_then_remove(*arguments: Any) -> list[consume.Proof]:
        proofs = real(*arguments)
        victim.unlink()
        return proofs

    monkeypatch.setattr(consume, "verify", verify_then_remove)
    with pytest.raises(WrongContent) as caught:
        fetch(toy)
    found = [(f.kind, f.where) for f in caught.value.findings]
    assert found == [(Kind.UNREADABLE, toy.artifact(NAME).pieces[1].part)]
    assert moved(toy)[0] == PIECE_SIZE


def test_a_chunk_file_that_is_cut_off_between_two_steps_is_reported(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step that it has no longer is its own finding, and no crash."""

    def punched(fd: int, offset: int, size: int) -> None:
        block_io.punch(fd, offset, size)
        cut_off(toy.chunk_file(NAME, 0))

    monkeypatch.setattr(consume, "punch", punched)
    with pytest.raises(WrongContent) as caught:
        fetch(toy)
    found = [(f.kind, f.where) for f in caught.value.findings]
    assert found == [(Kind.UNREADABLE, toy.artifact(NAME).pieces[0].part)]
    assert moved(toy) == {0: STEP}


def test_a_write_between_copy_and_punch_is_not_lost(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk file that somebody writes to while its step is made durable keeps its bytes."""
    victim, real, once = toy.chunk_file(NAME, 0), os.fdatasync, [True]

    def sync_then_write(fd: int) -> None:
        real(fd)
        if moved(toy).get(0) == 0 and once.pop() if once else False:
            with victim.open("r+b") as file:
                file.write(b"mine")

    monkeypatch.setattr(os, "fdatasync", sync_then_write)
    with pytest.raises(WrongContent) as caught:
        fetch(toy)
    assert Kind.CHANGED in kinds(caught.value)
    assert victim.read_bytes()[:4] == b"mine"


@pytest.mark.parametrize("byte", [1000, 1001, 1002, 1003])
def test_rot_after_the_check_takes_no_more_bytes(
    toy: Toy, byte: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Consumed bytes that change before the rest of their piece is moved are reported."""
    begun(toy)
    before, real = moved(toy), consume.verify

    def verified(*given: Any) -> list[consume.Proof]:
        proofs = real(*given)
        flip(partial_of(toy), PIECE_SIZE + byte)
        return proofs

    monkeypatch.setattr(consume, "verify", verified)
    with pytest.raises(WrongContent) as caught:
        fetch(toy)
    assert kinds(caught.value) == {Kind.CHANGED}
    assert "the unfinished file, where" in str(caught.value)
    assert moved(toy) == before


@pytest.mark.parametrize("index", [0, 1])
def test_rot_in_the_only_copy_is_reported_and_the_chunk_file_put_back_mends_it(
    toy: Toy, index: int
) -> None:
    """Consumed bytes that no longer have their digest are refused; a whole chunk file goes on."""
    begun(toy)
    flip(partial_of(toy), index * PIECE_SIZE + 1000)
    with pytest.raises(WrongContent) as caught:
        fetch(toy)
    piece, size = toy.artifact(NAME).pieces[index], (PIECE_SIZE, STEP)[index]
    copy = partial_of(toy).read_bytes()[piece.offset : piece.offset + size]
    copy += (toy.root / piece.part).read_bytes()[size:]
    (finding,) = caught.value.findings
    assert (finding.where, finding.expected) == (piece.part, f"sha256 {piece.sha256}")
    told = f"{size:,} bytes of it in {partial_of(toy)}: "
    assert finding.found == told + hashlib.sha256(copy).hexdigest()
    (toy.root / piece.part).write_bytes(toy.good(NAME)[piece.offset : piece.end])
    fetch(toy)
    assert is_finished(toy)


def test_a_disk_that_does_not_read_is_reported_and_nothing_counts_as_wrong(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error while consumed bytes are read says nothing about them: they are kept as they are."""
    begun(toy)
    before = partial_of(toy).read_bytes()

    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(consume, "feed", fail)
    mirror = replace(asked(toy), urls=("http://127.0.0.1:9/nothing",))
    with pytest.raises(WrongContent) as caught:
        apply.apply(mirror, Target.STAGED)
    assert kinds(caught.value) == {Kind.UNREADABLE}
    assert (partial_of(toy).read_bytes(), lost(toy)) == (before, [])


# ---- together with other sources


def test_pieces_that_an_ordinary_run_has_kept_give_their_chunk_files_too(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a run that ran out of disk, the chunk files of what it has kept go first."""
    flip(toy.chunk_file(NAME, 2))
    with pytest.raises(WrongContent):
        fetch(toy, consuming=False)
    flip(toy.chunk_file(NAME, 2))
    written: list[int] = []
    real = block_io.copy_hashed

    def counted(source: block_io.Extent, *rest: Any) -> None:
        written.append(source.size)
        real(source, *rest)

    monkeypatch.setattr("csm_weights.transfer.assemble.copy_hashed", counted)
    fetch(toy)
    assert is_finished(toy)
    assert sum(written) == toy.artifact(NAME).pieces[2].size


def test_a_missing_chunk_file_that_a_damaged_file_has_is_fine(toy: Toy) -> None:
    """One piece is copied from a damaged file in place; the others are moved."""
    placed = toy.installed(NAME)
    placed.parent.mkdir(parents=True)
    placed.write_bytes(toy.good(NAME))
    flip(placed, PIECE_SIZE + 5)
    toy.chunk_file(NAME, 0).unlink()
    outcome = apply.apply(asked(toy), Target.BOTH)
    assert placed.read_bytes() == toy.good(NAME)
    receipt = outcome.state.artifacts[0].installed.receipt
    assert receipt is not None
    assert [r.source for r in receipt.pieces] == [
        str(placed),
        *(piece.part for piece in toy.artifact(NAME).pieces[1:]),
    ]


def test_a_begun_chunk_file_that_was_damaged_goes_too(toy: Toy) -> None:
    """A piece that comes from elsewhere after its chunk file was begun leaves no file of holes."""
    begun(toy)
    with toy.chunk_file(NAME, 1).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    placed = toy.installed(NAME)
    placed.parent.mkdir(parents=True)
    placed.write_bytes(toy.good(NAME))
    flip(placed, 2 * PIECE_SIZE + 5)
    apply.apply(asked(toy), Target.BOTH)
    assert placed.read_bytes() == toy.good(NAME)
    assert [part for part in chunk_files_of(toy) if part.exists()] == []


# ---- refused


def test_chunk_files_behind_a_link_out_of_the_folder_are_not_consumed(
    toy: Toy, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Nothing in a linked folder of chunk files is removed, nor read."""
    folder = toy.chunk_file(NAME, 0).parent
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "b"
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)
    before = {path: path.read_bytes() for path in elsewhere.iterdir()}
    for consuming in (True, False):
        with pytest.raises(WrongContent, match="a link that leads to"):
            fetch(toy, consuming=consuming)
    assert {path: path.read_bytes() for path in elsewhere.iterdir()} == before


def test_a_folder_exchanged_for_a_link_is_refused(toy: Toy, tmp_path: Path) -> None:
    """Also after the disk was inspected a link that leads out of chunks/ stops it."""
    (item,) = apply.status(asked(toy)).state.artifacts
    folder = toy.chunk_file(NAME, 0).parent
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WrongContent, match="a link that leads to"):
        consume.require_punching([consume.Subject(item, frozenset({0}), toy.root)])


def test_a_chunk_file_exchanged_for_a_link_is_not_punched(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk file is never read, nor freed, through a link that was put there meanwhile."""
    victim, elsewhere, real = toy.chunk_file(NAME, 1), toy.root / "elsewhere", consume.verify

    def exchange_then_verify(*arguments: Any) -> list[consume.Proof]:
        victim.rename(elsewhere)
        victim.symlink_to(elsewhere)
        return real(*arguments)

    before = victim.read_bytes()
    monkeypatch.setattr(consume, "verify", exchange_then_verify)
    with pytest.raises(WrongContent) as caught:
        fetch(toy)
    assert kinds(caught.value) == {Kind.UNREADABLE}
    assert elsewhere.read_bytes() == before


def test_a_chunk_file_that_is_touched_while_it_is_hashed_is_not_consumed(toy: Toy) -> None:
    """What was hashed may not be what is there now; the other chunk files are right."""
    (item,) = apply.status(asked(toy)).state.artifacts
    victim, piece = toy.chunk_file(NAME, 1), toy.artifact(NAME).pieces[1]
    subject = consume.Subject(item, frozenset(p.offset for p in item.artifact.pieces), toy.root)
    (proof,) = consume.verify([subject], lambda _: os.utime(victim))
    (finding,) = proof.findings.values()
    assert list(proof.findings) == [victim]
    assert (finding.kind, finding.where) == (Kind.UNREADABLE, piece.part)
    assert finding.found == "a change in the meantime"
    assert sorted(proof.stakes) == [p.offset for p in item.artifact.pieces if p != piece]


@pytest.mark.parametrize("spoil", [cut_off, Path.unlink])
def test_a_chunk_file_that_cannot_be_hashed_is_not_consumed(
    toy: Toy, spoil: Callable[[Path], None]
) -> None:
    """Cut off or removed after the inspection, it is reported; the others are right."""
    (item,) = apply.status(asked(toy)).state.artifacts
    spoil(toy.chunk_file(NAME, 1))
    assert unreadable(toy, item) == {1}


@pytest.mark.parametrize("spoil", [cut_off, Path.unlink])
def test_consumed_bytes_that_cannot_be_hashed_are_reported(
    toy: Toy, spoil: Callable[[Path], None]
) -> None:
    """Also those in the unfinished file; the piece that was not begun is right."""
    (item,) = apply.status(asked(begun(toy))).state.artifacts
    spoil(partial_of(toy))
    assert unreadable(toy, item) == {0, 1}


def unreadable(toy: Toy, item: ArtifactState) -> set[int]:
    """The pieces, by index, that hashing reports as unreadable; the others may be consumed."""
    pieces = item.artifact.pieces
    subject = consume.Subject(item, frozenset(p.offset for p in pieces), toy.root)
    (proof,) = consume.verify([subject], lambda _: None)
    found = {i for i, p in enumerate(pieces) if toy.root / p.part in proof.findings}
    for index in found:
        finding = proof.findings[toy.root / pieces[index].part]
        assert (finding.kind, finding.where) == (Kind.UNREADABLE, pieces[index].part)
    assert set(proof.stakes) == {p.offset for i, p in enumerate(pieces) if i not in found}
    return found


@pytest.mark.parametrize("digit", ["0", "f"])
def test_a_chunk_file_with_another_digest_is_not_consumed(toy: Toy, digit: str) -> None:
    """The finding is about its file alone, and has both digests."""
    (item,) = apply.status(asked(toy)).state.artifacts
    first, *rest = item.artifact.pieces
    changed = replace(item.artifact, pieces=(replace(first, sha256=digit * 64), *rest))
    subject = consume.Subject(
        replace(item, artifact=changed), frozenset(p.offset for p in changed.pieces), toy.root
    )
    (proof,) = consume.verify([subject], lambda _: None)
    ((path, finding),) = proof.findings.items()
    assert (path, finding.kind) == (toy.root / first.part, Kind.WRONG_DIGEST)
    assert (finding.expected, finding.found) == (f"sha256 {digit * 64}", first.sha256)
    assert list(proof.stakes) == [piece.offset for piece in rest]


def make_symlink(part: Path) -> None:
    part.rename(part.with_name("elsewhere"))
    part.symlink_to("elsewhere")


def make_hard_link(part: Path) -> None:
    os.link(part, part.with_name("second"))


@pytest.mark.parametrize("spoil", [make_symlink, make_hard_link])
def test_a_chunk_file_that_is_not_a_file_of_its_own_is_refused(
    toy: Toy, spoil: Callable[[Path], None]
) -> None:
    """A linked chunk file belongs to someone else as well: exit 7, and nothing is touched."""
    spoil(toy.chunk_file(NAME, 1))
    with pytest.raises(NoSpace) as caught:
        fetch(toy)
    assert [(f.kind, f.where) for f in caught.value.findings] == [
        (Kind.NOT_CONSUMABLE, toy.artifact(NAME).pieces[1].part)
    ]
    assert moved(toy) == {}
    fetch(toy, consuming=False)
    assert toy.staged(NAME).read_bytes() == toy.good(NAME)
    assert all(part.exists() for part in chunk_files_of(toy))


def test_only_what_is_named_like_a_chunk_file_of_its_file_is_consumed(toy: Toy) -> None:
    """A manifest may call any file below chunks/ a chunk file: another's, or a list of sums."""
    part = toy.chunk_file(NAME, 1)
    part.rename(part.with_name("other.bin.part-ab"))
    path = toy.root / "manifests" / "toy.toml"
    path.write_text(path.read_text().replace(part.name, "other.bin.part-ab"))
    with pytest.raises(NoSpace) as caught:
        fetch(toy)
    assert "a name that no chunk file of" in caught.value.findings[0].found
    assert part.with_name("other.bin.part-ab").exists()


def test_a_folder_that_may_not_be_written_is_refused(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunk files that may not be removed are reported as such before anything is done."""
    real = os.access
    folder = toy.chunk_file(NAME, 0).parent
    monkeypatch.setattr(
        os,
        "access",
        lambda path, mode, **_: real(path, mode) and not (path == folder and mode == os.W_OK),
    )
    with pytest.raises(NoSpace) as caught:
        fetch(toy)
    assert {f.found for f in caught.value.findings} == {"no permission to write"}


def cannot(*_: Any) -> None:
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


def test_a_file_system_that_frees_nothing_says_so(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a hole cannot be punched, a small file shows it before a chunk file is touched."""
    monkeypatch.setattr(block_io, "punch", cannot)
    with pytest.raises(NoSpace) as caught:
        fetch(toy)
    assert kinds(caught.value) == {Kind.NOT_CONSUMABLE}
    names = [path.name for path in toy.chunk_file(NAME, 0).parent.iterdir()]
    known = [file.name for file in chunk_files_of(toy)]
    assert sorted(names) == sorted(["SHA256SUMS", *known])
    assert not partial_of(toy).exists()


def test_where_locks_keep_nobody_out_nothing_is_consumed(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs that consume at once would destroy bytes; without --consume the run goes on."""
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    with pytest.raises(NoSpace, match="cannot be consumed there") as caught:
        fetch(toy)
    (finding,) = caught.value.findings
    assert (finding.kind, finding.where) == (Kind.NOT_CONSUMABLE, str(toy.staged(NAME).parent))
    assert (finding.found, caught.value.exit_code) == ("locks that do nothing", 7)
    assert "leave --consume out" in finding.help
    assert all(part.exists() for part in chunk_files_of(toy))
    assert not partial_of(toy).exists()
    fetch(toy, consuming=False)
    assert toy.staged(NAME).read_bytes() == toy.good(NAME)


def test_known_file_systems_are_reported_in_the_plan(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room the chunk files are copied and stay; without, it is said why they make none."""
    monkeypatch.setattr(inspect, "filesystem_type", lambda _: "vfat")
    plan = apply.status(asked(toy)).plan
    assert [type(s) for s in plan.actions][:1] == [Assemble]
    assert "not consumed: vfat cannot free parts of a file" in plan.actions[0].detail
    with_free(monkeypatch, 1000)
    with pytest.raises(NoSpace) as caught:
        apply.plan(asked(toy), Target.STAGED)
    assert kinds(caught.value) == {Kind.NO_SPACE, Kind.NOT_CONSUMABLE}


def test_chunk_files_on_another_file_system_make_no_room(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, other_disk: Path
) -> None:
    """Where chunk files and files are on two disks, consuming is pointless, and that is said."""
    (toy.root / "output").symlink_to(other_disk)
    detail = apply.status(asked(toy)).plan.actions[0].detail
    assert "the chunk files are on another file system" in detail
    with_free(monkeypatch, 1000)
    with pytest.raises(NoSpace) as caught:
        apply.plan(asked(toy), Target.STAGED)
    assert kinds(caught.value) == {Kind.NO_SPACE, Kind.NOT_CONSUMABLE}


@pytest.fixture
def other_disk(tmp_path: Path) -> Any:
    """A folder on another file system than the repository."""
    folder = Path("/dev/shm")
    if not folder.is_dir() or folder.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no other file system here")
    own = folder / f"{tmp_path.name}-{os.getpid()}"
    own.mkdir()
    yield own
    shutil.rmtree(own)


def test_where_blocks_are_shared_there_is_nothing_to_consume(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On XFS and Btrfs a copy takes no room anyway; the chunk files stay, and it is said why."""
    monkeypatch.setattr(inspect, "filesystem_type", lambda _: "xfs")
    monkeypatch.setattr(inspect, "BLOCK", 1)
    outcome = fetch(toy)
    assert "there is nothing to consume" in outcome.actions[0].detail
    assert all(part.exists() for part in chunk_files_of(toy))


def test_consume_goes_with_sources_that_have_chunk_files(toy: Toy) -> None:
    """A source that takes no chunk files has none to consume."""
    with pytest.raises(UsageError, match="--consume needs chunk files"):
        replace(asked(toy), source="hf")


# ---- room


def with_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = shutil.disk_usage("/")._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)


def large(artifact: Artifact) -> Artifact:
    """The same artifact as if each of its chunk files had 8 GiB."""
    size = 8 << 30
    pieces = tuple(replace(p, offset=i * size, size=size) for i, p in enumerate(artifact.pieces))
    return replace(artifact, size=size * len(pieces), pieces=pieces)


def enlarge(toy: Toy) -> None:
    """Makes the file and its chunk files large, in holes that take no disk."""
    a, b, note = toy.manifest.artifacts
    toy.write_manifest(replace(toy.manifest, artifacts=(a, large(b), note)))
    for part in chunk_files_of(toy):
        os.truncate(part, 8 << 30)


def test_too_little_disk_names_the_way_that_would_do(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """24 GiB to write on 1 GB free: exit 7, how much is missing, and --consume."""
    enlarge(toy)
    with_free(monkeypatch, 10**9)
    with pytest.raises(NoSpace) as caught:
        apply.plan(asked(toy, consuming=False), Target.BOTH)
    (finding,) = caught.value.findings
    assert finding.kind is Kind.NO_SPACE
    assert f"{24 * 2**30 - 10**9:,} too few" in finding.found
    assert f"--consume needs only {CONSUMING_ROOM:,} bytes" in finding.help
    plan = apply.plan(asked(toy), Target.BOTH).plan
    assert [type(step) for step in plan.actions] == [Consume, Move]


def test_it_never_starts_without_room_for_its_steps(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Less than the room for a step and its records is too little, and is reported first."""
    with_free(monkeypatch, CONSUMING_ROOM - 1)
    with pytest.raises(NoSpace) as caught:
        apply.apply(asked(toy), Target.STAGED)
    assert "1 too few" in caught.value.findings[0].found
    assert not partial_of(toy).exists()


def with_budget(monkeypatch: pytest.MonkeyPatch, root: Path, budget: int) -> None:
    """Let so many bytes be free below `root`, less what is written there from now on."""

    def allocated() -> int:
        return sum(path.stat().st_blocks * 512 for path in root.rglob("*") if path.is_file())

    before, usage = allocated(), shutil.disk_usage(root)
    now = lambda _: usage._replace(free=budget - (allocated() - before))  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", now)


def test_killed_anywhere_it_goes_on_with_the_room_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step that a kill leaves twice on the disk does not count against the next run.

    Every other run goes on without --consume, for the file that was begun.
    """
    monkeypatch.setattr(plan_module, "CONSUMING_ROOM", 2 * STEP)
    names = acts_of(made(tmp_path / "whole"))
    model = made(tmp_path / "model")
    real = shutil.disk_usage
    for at in (at for at, name in enumerate(names, 1) if name in ("pwrite", *LASTING)):
        root = tmp_path / "toy"
        shutil.copytree(model.root, root)
        toy = Toy(root, model.manifest)
        with_budget(monkeypatch, root, 2 * STEP + 6 * 4096)
        assert os.WTERMSIG(run_until(toy, at, Act.KILL)) == signal.SIGKILL, at
        fetch(toy, consuming=bool(at % 2) or not any(moved(toy).values()))
        assert is_finished(toy), at
        monkeypatch.setattr(shutil, "disk_usage", real)
        shutil.rmtree(root)


def test_with_two_files_the_advice_names_what_the_other_needs(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that was begun goes on by itself; for the other --consume and its room are named."""
    begun(toy)
    with_free(monkeypatch, CONSUMING_ROOM)
    with pytest.raises(NoSpace) as caught:
        fetch(toy, NAME, "a.bin", consuming=False)
    assert "--consume needs only" in caught.value.findings[0].help
    assert moved(toy)


def test_the_way_is_not_named_where_it_would_not_do(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A linked chunk file, or no room even for a step: --consume is not offered."""
    enlarge(toy)
    with_free(monkeypatch, CONSUMING_ROOM - 1)
    with pytest.raises(NoSpace) as caught:
        apply.plan(asked(toy, consuming=False), Target.STAGED)
    assert "--consume" not in caught.value.findings[0].help


def test_the_room_it_asks_for_covers_a_step_of_full_size() -> None:
    """What must be free before it starts is more than a step, and less than 128 MiB."""
    source = Path(consume.__file__).read_text()
    assert "STEP = 32 << 20" in source
    assert 2 * (32 << 20) <= CONSUMING_ROOM <= 128 << 20


# ---- the journal's lines


def test_a_line_about_consuming_is_read_as_nothing_else() -> None:
    """Such a line is neither a verified piece nor an arrival, and those are not such lines."""
    others = PieceRecord(0, 1, "ab", "x"), Arrival(0, 1, "ab"), Refuted(0, "ab")
    for record in (Consumed(5, 7, "ab"), *others):
        assert parse_line(dump_record(record)) == record


@pytest.mark.parametrize("change", [{"consumed": -1}, {"offset": -1}, {"consumed": "7"}, {"x": 1}])
def test_an_odd_line_about_consuming_counts_as_absent(change: dict[str, Any]) -> None:
    """A line with other fields, types or values is not believed."""
    data = {"schema": 1, "offset": 0, "consumed": 7, "piece": "ab"} | change
    assert parse_line(json.dumps(data)) is None


def test_punching_frees_blocks_and_keeps_the_size(tmp_path: Path) -> None:
    """The range reads as zeros, the rest and the size stay, and the blocks are the disk's."""
    path = tmp_path / "file"
    path.write_bytes(b"x" * 65_536)
    with path.open("r+b") as file:
        os.fsync(file.fileno())
        before = os.fstat(file.fileno()).st_blocks
        block_io.punch(file.fileno(), 0, 32_768)
        assert os.fstat(file.fileno()).st_blocks < before
    assert path.read_bytes() == bytes(32_768) + b"x" * 32_768
    assert block_io.can_punch(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
