"""The Hub's standard cache: what is found in it, how it is filled, how the real client sees it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from csm_weights.errors import CsmWeightsError, Kind, NoSpace, WrongContent
from csm_weights.manifest.types import Artifact
from csm_weights.model.offline_assets import find_assets
from csm_weights.store import block_io, hub_cache
from csm_weights.store.hub_cache import (
    CachedRepo,
    How,
    Seed,
    Seeded,
    main_of,
    repository,
    seed,
    snapshot_file,
)
from tests.support.clone import REPOSITORY
from tests.support.privileges import unprivileged
from tests.support.toy import content, flip

REPO = "org/name"
COMMIT = "c0ffee" * 6 + "beef"
OTHER = "0123456789" * 4
SIZE = 300_001

#: Asks the real client for files, and for a model, with every socket forbidden.
CLIENT = """
import hashlib, json, pathlib, socket, sys

opened = []

class NoSocket(socket.socket):
    def __init__(self, *arguments, **options):
        opened.append(1)
        raise OSError("no socket in this test")

socket.socket = NoSocket
repo, *names = sys.argv[1:]

import huggingface_hub
from huggingface_hub import hf_hub_download
opened.clear()  # urllib3 tries out IPv6 when it is imported

found = {}
for name in names:
    data = pathlib.Path(hf_hub_download(repo, name)).read_bytes()
    found[name] = hashlib.sha256(data).hexdigest()
result = {"version": huggingface_hub.__version__, "files": found}
{more}
result["sockets"] = len(opened)
print(json.dumps(result))
"""


def ask_client(
    home: Path, repo: str, names: Sequence[str], more: str = "", before: Path | None = None
) -> Any:
    """What huggingface_hub, offline, finds in the cache of `home`: by name, the sha256.

    `more` is code to run in the same process; `before` a folder of modules
    that come before the installed ones.
    """
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, filter(None, [before, REPOSITORY]))),
    }
    command = [sys.executable, "-c", CLIENT.replace("{more}", more), repo, *names]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Hub:
    """A cache that does not exist yet, and the verified files for it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.home = root / "hf"
        self.cache = self.home / "hub"
        self.repository = self.cache / "models--org--name"
        self.blobs = self.repository / "blobs"
        self.snapshot = self.repository / "snapshots" / COMMIT
        self.main = self.repository / "refs" / "main"
        self.big = self.verified("big.bin", sha256)
        self.small = self.verified("sub/deep/small.txt", git_sha1)
        self.seeds = [self.big, self.small]

    def verified(self, path: str, name: Callable[[bytes], str]) -> Seed:
        """A file with random bytes, to be seeded under that path."""
        file = self.root / "placed" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content(path, SIZE))
        return Seed(path, file, SIZE, name(file.read_bytes()))

    def seed(self, move_main: bool = False) -> list[Seeded]:
        """Seeds the files."""
        return seed(self.cache, REPO, COMMIT, self.seeds, move_main, lambda _: None)

    def blob(self, item: Seed) -> Path:
        """Where the blob of a file is."""
        return self.blobs / item.blob

    def put(self, path: Path, data: bytes) -> Path:
        """Writes something into the cache beforehand."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    def store(self, data: bytes) -> Path:
        """Puts bytes into the store that all repositories of the cache share."""
        name = hashlib.blake2s(data).hexdigest()
        return self.put(self.cache / "blobs" / name[:2] / name, data)

    def link(self, path: Path, to: Path) -> Path:
        """Makes a relative link in the cache."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(os.path.relpath(to, path.parent))
        return path

    def is_right(self) -> bool:
        """Whether every path of the snapshot has the bytes of its file."""
        return all(
            (self.snapshot / s.path).read_bytes() == content(s.path, SIZE) for s in self.seeds
        )

    def leftovers(self) -> list[Path]:
        """Files with an unfinished name."""
        return [p for p in self.home.rglob("*") if "incomplete" in p.name or "partial" in p.name]


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    """A fresh cache."""
    return Hub(tmp_path)


@pytest.fixture
def no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is on another file system than the files."""

    def refuse(*_: Path) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(Path, "hardlink_to", refuse)


def hows(seeded: Sequence[Seeded]) -> list[How]:
    return [item.how for item in seeded]


def stamps(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Every entry below a folder with its inode, size and change time."""
    found = {p: p.lstat() for p in folder.rglob("*") if not p.name.endswith(".lock")}
    return {str(p): (s.st_ino, s.st_size, s.st_ctime_ns) for p, s in found.items()}


# ---- finding


DATA = b"the right bytes\n"
ARTIFACT = Artifact("sub/file.bin", "x", "opaque", len(DATA), sha256(DATA), git_sha1=git_sha1(DATA))

#: Where the bytes of the artifact may lie in the folder of its repository, best first.
PLACES = {
    "by sha256": f"blobs/{sha256(DATA)}",
    "by git id": f"blobs/{git_sha1(DATA)}",
    "the revision": f"snapshots/{COMMIT}/sub/file.bin",
    "main": f"snapshots/{OTHER}/sub/file.bin",
    "any": f"snapshots/{'d' * 40}/sub/file.bin",
}


def found_in(hub: Hub) -> Path | None:
    return CachedRepo(hub.cache, REPO, COMMIT).find(ARTIFACT)


def test_nothing_is_found_where_there_is_no_cache(hub: Hub) -> None:
    """A machine without a cache has nothing in it, which is no error."""
    assert found_in(hub) is None


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_the_bytes_are_found_wherever_the_client_puts_them(hub: Hub, place: str) -> None:
    """Among the blobs by either id, or in the snapshot of the revision, of main, of any commit."""
    file = hub.put(hub.repository / place, DATA)
    assert found_in(hub) == file.resolve()


def test_the_surest_place_comes_first(hub: Hub) -> None:
    """A blob named by its sha256 is taken before the revision's file, and that before main's."""
    hub.put(hub.main, OTHER.encode())
    for number, place in reversed(list(enumerate(PLACES.values()))):
        if number == 4:
            place = place.replace("d" * 40, "0" * 40)  # before main by name
        file = hub.put(hub.repository / place, DATA)
        assert found_in(hub) == file.resolve()


def test_without_a_revision_main_is_looked_into(hub: Hub) -> None:
    """Where the manifest names no commit, what main stands for counts first."""
    hub.put(hub.main, OTHER.encode())
    hub.put(hub.repository / "snapshots" / ("0" * 40) / ARTIFACT.path, DATA)
    file = hub.put(hub.repository / PLACES["main"], DATA)
    assert CachedRepo(hub.cache, REPO, None).find(ARTIFACT) == file.resolve()


def test_a_blob_in_the_shared_store_is_found_through_two_links(hub: Hub) -> None:
    """The snapshot's link leads to a blob, which is a link into the store of all repositories."""
    store = hub.store(DATA)
    blob = hub.link(hub.blobs / "etag-of-another-kind", store)
    hub.link(hub.snapshot / ARTIFACT.path, blob)
    assert found_in(hub) == store.resolve()


def test_a_cache_behind_a_link_is_a_cache(hub: Hub) -> None:
    """That the whole cache lies elsewhere, by a link, makes nothing in it lie outside."""
    real = hub.put(hub.root / "disk" / "models--org--name" / PLACES["by sha256"], DATA)
    hub.home.mkdir()
    hub.cache.symlink_to(hub.root / "disk")
    assert found_in(hub) == real.resolve()


@pytest.mark.parametrize("folder", [".", "blobs"])
def test_what_was_moved_and_linked_is_found_as_the_client_finds_it(hub: Hub, folder: str) -> None:
    """A repository, or its blobs, may lie on another disk: the real client reads them there."""
    hub.seed()
    moved, elsewhere = hub.repository / folder, hub.root / "disk" / "moved"
    elsewhere.parent.mkdir()
    moved.rename(elsewhere)
    moved.symlink_to(elsewhere, target_is_directory=True)
    answer = ask_client(hub.home, REPO, [s.path for s in hub.seeds])
    assert answer["files"] == {s.path: sha256(content(s.path, SIZE)) for s in hub.seeds}
    artifact = replace(ARTIFACT, path="big.bin", size=SIZE, sha256=None, git_sha1=None)
    file = CachedRepo(hub.cache, REPO, COMMIT).find(artifact)
    assert file and file.read_bytes() == content("big.bin", SIZE)
    assert snapshot_file(hub.cache, REPO, COMMIT, "big.bin") == file


def test_a_file_of_another_size_is_passed_over(hub: Hub) -> None:
    """A short blob does not hide a snapshot with the right size."""
    hub.put(hub.repository / PLACES["by sha256"], DATA[:-1])
    file = hub.put(hub.repository / PLACES["the revision"], DATA)
    assert found_in(hub) == file.resolve()


def unfinished(hub: Hub) -> None:
    blob = hub.put(hub.blobs / f"{ARTIFACT.sha256}.12345678.incomplete", DATA)
    hub.link(hub.snapshot / ARTIFACT.path, blob)


def outside(hub: Hub) -> None:
    hub.link(hub.snapshot / ARTIFACT.path, hub.put(hub.root / "elsewhere", DATA))


def beside(hub: Hub) -> None:
    hub.link(hub.snapshot / ARTIFACT.path, hub.put(hub.home / "hub-too" / "file", DATA))


def dangling(hub: Hub) -> None:
    hub.link(hub.snapshot / ARTIFACT.path, hub.blobs / "gone")


def in_a_circle(hub: Hub) -> None:
    other = hub.link(hub.snapshot / "other", hub.snapshot / ARTIFACT.path)
    hub.link(hub.snapshot / ARTIFACT.path, other)


def a_folder(hub: Hub) -> None:
    (hub.snapshot / ARTIFACT.path).mkdir(parents=True)


def a_pipe(hub: Hub) -> None:
    hub.snapshot.joinpath("sub").mkdir(parents=True)
    os.mkfifo(hub.snapshot / ARTIFACT.path)


@pytest.mark.parametrize(
    "prepare", [unfinished, outside, beside, dangling, in_a_circle, a_folder, a_pipe]
)
def test_what_is_no_whole_file_of_the_cache_is_not_found(
    hub: Hub, prepare: Callable[[Hub], None]
) -> None:
    """Unfinished downloads, links out of the cache or to nothing, folders and pipes are not it."""
    prepare(hub)
    path = hub.snapshot / ARTIFACT.path
    size = path.stat().st_size if path.is_dir() or path.is_fifo() else len(DATA)
    assert CachedRepo(hub.cache, REPO, COMMIT).find(replace(ARTIFACT, size=size)) is None


# ---- filling


def test_a_seeded_cache_has_the_layout_of_the_client(hub: Hub) -> None:
    """Blobs by digest, relative links of the right depth, main as a commit without line end."""
    seeded = hub.seed()
    assert seeded == [Seeded(s.path, hub.blob(s), How.LINKED) for s in hub.seeds]
    assert str((hub.snapshot / "big.bin").readlink()) == f"../../blobs/{hub.big.blob}"
    small = (hub.snapshot / "sub/deep/small.txt").readlink()
    assert str(small) == f"../../../../blobs/{hub.small.blob}"
    assert hub.main.read_bytes() == COMMIT.encode()
    assert sorted(p.name for p in hub.blobs.iterdir()) == sorted(s.blob for s in hub.seeds)
    assert hub.is_right()


def test_a_linked_blob_is_the_file_itself_read_only(hub: Hub) -> None:
    """A hard link takes no room, and neither name can be written to by mistake."""
    hub.big.file.chmod(0o640)
    hub.small.file.chmod(0o777)
    hub.seed()
    assert hub.blob(hub.big).samefile(hub.big.file)
    assert stat.S_IMODE(hub.blob(hub.big).stat().st_mode) == 0o440
    assert stat.S_IMODE(hub.blob(hub.small).stat().st_mode) == 0o555


def test_the_real_client_takes_the_files_offline(hub: Hub) -> None:
    """hf_hub_download gives the right bytes of each file, of main, and opens no socket."""
    hub.seed()
    answer = ask_client(hub.home, REPO, [s.path for s in hub.seeds])
    assert answer["files"] == {s.path: sha256(content(s.path, SIZE)) for s in hub.seeds}
    assert answer["sockets"] == 0


def test_a_file_that_the_client_took_for_absent_is_there(hub: Hub) -> None:
    """A note that the Hub has no such file goes, or the client would believe it."""
    marker = hub.put(hub.repository / ".no_exist" / COMMIT / "sub/deep/small.txt", b"")
    other = hub.put(hub.repository / ".no_exist" / COMMIT / "adapter_config.json", b"")
    hub.seed()
    assert not marker.exists()
    assert other.exists()


def test_a_link_in_place_is_followed(hub: Hub) -> None:
    """A file in place that is itself a symbolic link gives its content, not the link."""
    real = hub.big.file.rename(hub.root / "real.bin")
    hub.big.file.symlink_to(real)
    hub.seed()
    assert hub.blob(hub.big).samefile(real)
    assert not hub.blob(hub.big).is_symlink()


@pytest.mark.usefixtures("no_links")
def test_what_cannot_be_linked_is_copied(hub: Hub) -> None:
    """On another file system the cache gets read-only copies; the files stay as they were."""
    before = stamps(hub.root / "placed")
    assert hows(hub.seed()) == [How.COPIED, How.COPIED]
    assert hub.is_right()
    assert stat.S_IMODE(hub.blob(hub.big).stat().st_mode) & 0o222 == 0
    assert stamps(hub.root / "placed") == before
    assert hub.leftovers() == []


def test_a_file_system_that_shares_blocks_needs_no_links(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes no room either, and the installed files stay as they were."""

    def share(src: int, src_offset: int, dst: int, dst_offset: int, size: int) -> bool:
        os.pwrite(dst, os.pread(src, size, src_offset), dst_offset)
        return True

    monkeypatch.setattr(block_io, "clone_range", share)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    assert hows(hub.seed()) == [How.SHARED, How.SHARED]
    assert hub.is_right()


def test_a_file_of_someone_else_is_not_linked(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose mode cannot be changed is copied: a blob that others write to is none."""
    owner = hub.big.file.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    assert hows(hub.seed()) == [How.COPIED, How.COPIED]


def test_root_links_the_file_of_anyone(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may change the mode of every file."""
    if os.geteuid() == 0:
        os.chown(hub.big.file, 54321, 54321)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert hows(hub.seed()) == [How.LINKED, How.LINKED]


@pytest.mark.usefixtures("no_links")
@pytest.mark.parametrize("number", [0, 1], ids=["sha256", "git id"])
def test_bytes_that_are_not_those_of_the_name_get_no_name(hub: Hub, number: int) -> None:
    """What was written is hashed: a file that was changed meanwhile leaves no blob behind."""
    flip(hub.seeds[number].file)
    with pytest.raises(WrongContent) as caught:
        hub.seed()
    assert [f.kind for f in caught.value.findings] == [Kind.EDITED]
    assert list(hub.blobs.iterdir()) == []
    assert not hub.snapshot.joinpath("big.bin").is_symlink()


@pytest.mark.parametrize("number", [0, 1], ids=["sha256", "git id"])
def test_a_file_that_is_cut_while_it_is_copied_gets_no_name(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A file that ends early is one that was changed, and named as such."""
    file = hub.seeds[number].file

    def cut(*_: int) -> bool:
        os.truncate(file, SIZE - 1)
        return False

    monkeypatch.setattr(block_io, "clone_range", cut)
    monkeypatch.setattr(os, "geteuid", lambda: file.stat().st_uid + 1)
    with pytest.raises(WrongContent, match="no longer the one that was verified") as caught:
        hub.seed()
    assert [(f.kind, f.where) for f in caught.value.findings] == [(Kind.EDITED, str(file))]
    assert list(hub.blobs.iterdir()) == []


def test_a_file_of_another_size_is_refused_at_once(hub: Hub) -> None:
    """A file that has grown since it was verified is not linked, and nothing is made."""
    with hub.big.file.open("ab") as file:
        file.write(b"more")
    with pytest.raises(WrongContent):
        hub.seed()
    assert not hub.cache.exists()


@pytest.mark.usefixtures("no_links")
def test_room_is_counted_before_anything_is_copied(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too little disk ends with the error for it, with how much is missing, and no blob."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2 * SIZE - 1))
    monkeypatch.setattr(block_io, "copy_hashed", lambda *_: pytest.fail("copied"))
    with pytest.raises(NoSpace) as caught:
        hub.seed()
    (finding,) = caught.value.findings
    assert (finding.kind, finding.where) == (Kind.NO_SPACE, str(hub.blobs))
    assert (finding.expected, finding.found) == ("600,002 bytes free", "600,001, 1 too few")
    assert list(hub.blobs.iterdir()) == []


@pytest.mark.usefixtures("no_links")
def test_just_enough_room_is_enough(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies may fill the disk to its last byte."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2 * SIZE))
    assert hows(hub.seed()) == [How.COPIED, How.COPIED]


def test_links_need_no_room(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk files can still be linked."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    assert hows(hub.seed()) == [How.LINKED, How.LINKED]


def test_a_second_time_nothing_is_done(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there is kept, nothing is hashed, and not even a change time is another."""
    hub.seed()
    monkeypatch.setattr(hub_cache, "measure", lambda *_: pytest.fail("hashed"))
    before = stamps(hub.root)
    for move_main in (False, True):
        seeded = hub.seed(move_main)
        assert seeded == [Seeded(s.path, hub.blob(s), How.KEPT) for s in hub.seeds]
        assert stamps(hub.root) == before


def test_equal_bytes_that_are_there_are_kept(hub: Hub) -> None:
    """A blob that the client downloaded stays, once it is hashed and right."""
    for item in hub.seeds:
        hub.put(hub.blob(item), content(item.path, SIZE))
    before = stamps(hub.blobs)
    assert hows(hub.seed()) == [How.KEPT, How.KEPT]
    assert stamps(hub.blobs) == before
    assert hub.is_right()


@pytest.mark.parametrize("cut", [0, 1], ids=["flipped", "short"])
def test_a_damaged_blob_is_replaced_and_that_is_said(hub: Hub, cut: int) -> None:
    """Wrong bytes under a right name are what the client would serve for ever."""
    for item in hub.seeds:
        data = content(item.path, SIZE - cut)
        hub.put(hub.blob(item), data[:1000] + b"\0" + data[1001:])
    assert hows(hub.seed()) == [How.REPLACED, How.REPLACED]
    assert hub.is_right()
    assert hub.leftovers() == []


def test_a_blob_that_cannot_be_read_is_replaced(hub: Hub) -> None:
    """Nobody can tell whether its bytes are right, and the client could not read them either."""
    for item in hub.seeds:
        hub.put(hub.blob(item), content(item.path, SIZE)).chmod(0)
    with unprivileged():
        assert hows(hub.seed()) == [How.REPLACED, How.REPLACED]
        assert hub.is_right()


def test_a_right_blob_of_the_shared_store_is_kept(hub: Hub) -> None:
    """A blob that is a link into the store is judged by what it leads to."""
    store = hub.store(content("big.bin", SIZE))
    hub.link(hub.blob(hub.big), store)
    assert hub.seed()[0] == Seeded("big.bin", store.resolve(), How.KEPT)
    assert hub.blob(hub.big).is_symlink()
    assert hub.is_right()


def test_a_damaged_blob_of_the_shared_store_is_no_longer_used(hub: Hub) -> None:
    """Its link is replaced; the store's file, which others may use, is not touched."""
    store = hub.store(bytes(SIZE))
    hub.link(hub.blob(hub.big), store)
    assert hub.seed()[0].how is How.REPLACED
    assert not hub.blob(hub.big).is_symlink()
    assert store.read_bytes() == bytes(SIZE)
    assert hub.is_right()


def test_a_blob_that_leads_out_of_the_cache_is_replaced(hub: Hub) -> None:
    """Even with right bytes: what lies outside may change or go, and no one would know."""
    hub.link(hub.blob(hub.big), hub.put(hub.root / "elsewhere", content("big.bin", SIZE)))
    assert hub.seed()[0].how is How.REPLACED
    assert hub.blob(hub.big).samefile(hub.big.file)


def test_right_bytes_under_another_name_are_kept(hub: Hub) -> None:
    """Where the client has the same file as a blob of another name, no second one is made."""
    blob = hub.put(hub.blobs / git_sha1(content("big.bin", SIZE)), content("big.bin", SIZE))
    pointer = hub.link(hub.snapshot / "big.bin", blob)
    assert hub.seed()[0] == Seeded("big.bin", blob.resolve(), How.KEPT)
    assert pointer.resolve() == blob.resolve()
    assert not hub.blob(hub.big).exists()


def test_a_snapshot_that_leads_to_wrong_bytes_is_led_to_the_right_ones(hub: Hub) -> None:
    """A link or a file in the snapshot that has other bytes gives way."""
    hub.link(hub.snapshot / "big.bin", hub.put(hub.blobs / OTHER, bytes(SIZE)))
    hub.put(hub.snapshot / "sub/deep/small.txt", b"wrong")
    hub.seed()
    assert hub.is_right()


def test_main_of_another_commit_stays_unless_it_is_to_move(hub: Hub) -> None:
    """Another program's main is not taken from it without being asked."""
    hub.put(hub.main, OTHER.encode())
    hub.seed()
    assert main_of(repository(hub.cache, REPO)) == OTHER
    hub.seed(move_main=True)
    assert main_of(repository(hub.cache, REPO)) == COMMIT
    assert hub.main.read_bytes() == COMMIT.encode()


@pytest.mark.parametrize("text", ["", "main", COMMIT + "\n", "\xff" * 200])
def test_a_main_that_no_client_can_use_is_written_anew(hub: Hub, text: str) -> None:
    """What names no commit, or names this one with a line end, is mended."""
    hub.put(hub.main, text.encode())
    hub.seed()
    assert hub.main.read_bytes() == COMMIT.encode()


@pytest.mark.usefixtures("no_links")
def test_what_a_killed_run_has_left_is_used_up(hub: Hub) -> None:
    """An unfinished blob of ours is written anew by the next run, and none is left."""
    hub.put(hub.blobs / f"{hub.big.blob}.csm-weights.incomplete", bytes(2 * SIZE))
    hub.link(hub.snapshot / ".big.bin.csm-weights.incomplete", hub.blobs / "gone")
    assert hows(hub.seed()) == [How.COPIED, How.COPIED]
    assert hub.is_right()
    assert hub.leftovers() == []


def test_two_paths_with_the_same_bytes_have_one_blob(hub: Hub) -> None:
    """As in the client's own caches; both paths lead to it."""
    twin = Seed("twin.bin", hub.root / "twin.bin", SIZE, hub.big.blob)
    shutil.copy(hub.big.file, twin.file)
    hub.seeds = [hub.big, twin]
    hub.seed()
    assert (hub.snapshot / "twin.bin").resolve() == hub.blob(hub.big).resolve()
    assert (hub.snapshot / "big.bin").resolve() == hub.blob(hub.big).resolve()


@pytest.mark.usefixtures("no_links")
def test_runs_at_the_same_time_do_not_get_into_each_others_way(hub: Hub) -> None:
    """Of several runs one copies, and the others find its blobs."""
    results: list[list[How]] = []
    runs = [threading.Thread(target=lambda: results.append(hows(hub.seed()))) for _ in range(4)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert sorted(results) == [[How.KEPT] * 2] * 3 + [[How.COPIED] * 2]
    assert hub.is_right()


@pytest.mark.parametrize("folder", ["blobs", "refs", f"snapshots/{COMMIT}", "../models--org--name"])
def test_a_folder_that_leads_out_of_the_cache_is_refused(hub: Hub, folder: str) -> None:
    """Nothing is written through a link to somewhere else, and the link is named."""
    elsewhere = hub.root / "elsewhere"
    elsewhere.mkdir()
    hub.link(hub.repository.joinpath(folder).resolve(), elsewhere)
    with pytest.raises(WrongContent) as caught:
        hub.seed()
    assert [f.kind for f in caught.value.findings] == [Kind.IN_THE_WAY]
    assert [p for p in elsewhere.rglob("*") if not p.is_dir()] == []


def test_a_folder_in_the_place_of_a_blob_is_refused(hub: Hub) -> None:
    """It is reported by its path, and the other blobs are not half done."""
    hub.blob(hub.big).mkdir(parents=True)
    with pytest.raises(WrongContent) as caught:
        hub.seed()
    assert caught.value.findings[0].where == str(hub.blob(hub.big))
    assert hub.leftovers() == []


def test_progress_is_told_of_every_byte_once(hub: Hub) -> None:
    """Linked, hashed or copied, each file counts with its size."""
    hub.put(hub.blob(hub.small), content(hub.small.path, SIZE))
    seen: list[int] = []
    seed(hub.cache, REPO, COMMIT, hub.seeds, False, seen.append)
    assert sum(seen) == 2 * SIZE


def test_the_bytes_are_durable_before_they_have_a_name(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each blob is synced, then renamed; its folder is synced after that, main goes last."""
    events: list[str] = []
    real_replace, real_sync = Path.replace, os.fsync

    def replacing(self: Path, target: Path) -> Path:
        events.append(f"rename {Path(target).name}")
        return real_replace(self, target)

    def syncing(fd: int) -> None:
        events.append(f"sync {Path(f'/proc/self/fd/{fd}').readlink().name}")
        real_sync(fd)

    monkeypatch.setattr(Path, "replace", replacing)
    monkeypatch.setattr(os, "fsync", syncing)
    hub.seeds = [hub.big]
    hub.seed()
    blob = hub.big.blob
    order = [f"sync {blob}.csm-weights.incomplete", f"rename {blob}", "rename big.bin"]
    order += ["rename main", "sync blobs", f"sync {COMMIT}"]
    assert [e for e in events if e in order] == order
    folders = ("hub", hub.repository.name, "blobs", "refs", "snapshots", COMMIT)
    assert set(events[events.index("rename main") + 1 :]) == {f"sync {name}" for name in folders}


# ---- what speaking offline takes


#: What the four repositories have that is asked of them, with sizes where these are known.
CLOSURE: dict[str, dict[str, int]] = {
    "sesame/csm-1b": {"config.json": 155, "model.safetensors": 6_211_186_784},
    "meta-llama/Llama-3.2-1B": {
        "tokenizer.json": 1,
        "tokenizer_config.json": 1,
        "special_tokens_map.json": 1,
    },
    "kyutai/moshiko-pytorch-bf16": {"tokenizer-e351c8d8-checkpoint125.safetensors": 384_644_900},
    "sony/silentcipher": {"44_1_khz/73999_iteration/hparams.yaml": 1},
}


def fill(cache: Path, repo: str, sizes: dict[str, int], main: str = OTHER) -> None:
    """A cached repository whose files have these sizes, and no bytes."""
    home = hub_cache.repository(cache, repo)
    for path, size in sizes.items():
        file = home / "snapshots" / OTHER / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        os.truncate(file, size)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(main)


def test_an_empty_cache_lacks_all_four(hub: Hub) -> None:
    """Each repository is named with what it is for, and the command that brings it."""
    needed = find_assets(hub.cache)
    assert [(n.repo, not n.missing, n.gated) for n in needed] == [
        ("sesame/csm-1b", False, True),
        ("meta-llama/Llama-3.2-1B", False, True),
        ("kyutai/moshiko-pytorch-bf16", False, False),
        ("sony/silentcipher", False, False),
    ]
    assert all(n.missing == tuple(n.files) for n in needed)
    assert [n.command for n in needed[1:]] == [
        "hf download meta-llama/Llama-3.2-1B tokenizer.json tokenizer_config.json"
        " special_tokens_map.json",
        "hf download kyutai/moshiko-pytorch-bf16 tokenizer-e351c8d8-checkpoint125.safetensors",
        "hf download sony/silentcipher",
    ]


def test_a_whole_cache_lacks_nothing(hub: Hub) -> None:
    """With what the four repositories are asked for in the snapshots of main, all are here."""
    for repo, sizes in CLOSURE.items():
        fill(hub.cache, repo, sizes)
    assert [n.missing for n in find_assets(hub.cache)] == [()] * 4


def test_a_file_that_is_short_or_not_of_main_is_missing(hub: Hub) -> None:
    """A cut download and a snapshot that main does not name are not what a client finds."""
    fill(hub.cache, "sesame/csm-1b", {"config.json": 155, "model.safetensors": 6_211_186_783})
    name = "tokenizer-e351c8d8-checkpoint125.safetensors"
    fill(hub.cache, "kyutai/moshiko-pytorch-bf16", {name: 384_644_900}, main="0" * 40)
    missing = {n.repo: n.missing for n in find_assets(hub.cache)}
    assert missing["sesame/csm-1b"] == ("model.safetensors",)
    assert missing["kyutai/moshiko-pytorch-bf16"] == (name,)


def test_the_models_own_files_are_fetched_and_linked(hub: Hub) -> None:
    """The model's own files come by this package's commands."""
    command = find_assets(hub.cache)[0].command
    assert command == "inv weights --only safetensors && inv seed-cache --only safetensors"


def test_the_errors_have_codes_of_the_tree(hub: Hub) -> None:
    """A cache that cannot be written to ends like any other folder of which that is true."""
    hub.put(hub.home, b"a file in the place of the folder")
    with pytest.raises(CsmWeightsError) as caught:
        hub.seed()
    assert caught.value.exit_code == 4
