"""The commands that are tortured, each in a toy repository, and what must be true of it."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from csm_weights.manifest.parse import load
from csm_weights.manifest.pin import suffix
from csm_weights.store.inspect import FileState, Paths, inspect
from csm_weights.store.receipts import journal_path, load_arrival, load_piece, partial_path
from csm_weights.untrusted import Fingerprint
from csm_weights.verify.sums import parse_sums
from tests.support.hub import HubServer
from tests.support.servers import FileServer, serving
from tests.support.toy import NOTE, PIECE_SIZE, Toy, content, flip
from tools.torture.calls import Orders
from tools.torture.forks import Ended, Forks

REPOSITORY = Path(__file__).resolve().parents[2]

WEIGHTS = ("a.bin", "b.bin")

#: The text that the Hub has of note.txt; the other edition's is in the manifest.
HUBS_NOTE = b"another edition"

#: What is split: a file that no other command knows, four parts long.
LONG = "long.bin"


@dataclass(frozen=True)
class Command:
    """One acting command. `before` are commands that make the scene it acts in.

    `far` is the server that has the bytes, "hub" or "mirror"; then no part is
    here. `damage` is done to the scene last.
    """

    name: str
    argv: tuple[str, ...]
    before: tuple[tuple[str, ...], ...] = ()
    far: str = ""
    damage: Callable[[Scene], None] | None = None
    is_script: bool = False
    consumes: bool = False


def _inv(*words: str) -> tuple[str, ...]:
    return (words[0], "--model", "toy", "--only", "all", *words[1:])


def _damage_placed(scene: Scene) -> None:
    flip(scene.root / "models/toy/a.bin", 100_000)
    (scene.root / "models/toy/b.bin").write_bytes(content("b.bin", 100_000))


_PARTS = ("--source", "chunks")
_FETCHED = (_inv("fetch", *_PARTS),)
_PLACED = (_inv("weights", "--no-smoke", *_PARTS),)

COMMANDS = {
    command.name: command
    for command in (
        Command("fetch (parts)", _inv("fetch", *_PARTS)),
        Command("fetch (Hub)", _inv("fetch", "--source", "hf"), far="hub"),
        Command(
            "fetch (mirror)", _inv("fetch", "--source", "mirror", "--url", "URL"), far="mirror"
        ),
        Command("weights (parts)", _PLACED[0]),
        Command("weights (repair)", _PLACED[0], _PLACED, damage=_damage_placed),
        Command("place", _inv("place"), _FETCHED),
        Command("place (other disk)", _inv("place", "--dest", "OTHER"), _FETCHED),
        Command("seed-cache", _inv("seed-cache"), _PLACED),
        Command("split", ("split", LONG, "--chunks", "chunks/new", "--size", str(PIECE_SIZE))),
        Command("recombine.sh", ("./recombine.sh", "--model", "toy", "all"), is_script=True),
        Command("fetch --consume", _inv("fetch", *_PARTS, "--consume"), consumes=True),
    )
}


def can_consume() -> bool:
    """Whether this checkout has consuming assembly."""
    return "consume" in (REPOSITORY / "tasks.py").read_text()


def commands() -> list[Command]:
    """The commands that this checkout has."""
    return [c for c in COMMANDS.values() if can_consume() or not c.consumes]


@dataclass
class Scene:
    """A command's repository at `home/tree`, the Hub's cache beside it; `other` is another disk."""

    home: Path
    other: Path
    command: Command
    forks: Forks
    hub: HubServer
    mirror: FileServer
    damaged: dict[Path, bytes] = field(default_factory=dict)

    @property
    def root(self) -> Path:
        """The repository."""
        return self.home / "tree"

    @property
    def argv(self) -> tuple[str, ...]:
        """The command's words, with the addresses of this scene."""
        words = {"URL": self.mirror.url, "OTHER": str(self.other)}
        return tuple(words.get(word, word) for word in self.command.argv)

    @property
    def env(self) -> dict[str, str]:
        """The environment of what runs here."""
        own = {"HOME": str(self.home / "home"), "HF_HOME": str(self.home / "hf")}
        return own | {"HF_ENDPOINT": self.hub.endpoint, "TQDM_DISABLE": "1"}

    @property
    def orders(self) -> Orders:
        """Orders to watch what is done here, and no more."""
        return Orders(roots=(str(self.home), str(self.other)))

    @property
    def dest(self) -> Path:
        """Where the command puts the files, or has put them before it."""
        if "OTHER" in self.command.argv:
            return self.other
        return self.root / "models/toy"

    def run(self, orders: Orders | None = None, argv: tuple[str, ...] = ()) -> Ended:
        """Runs the command, or another one, to its end."""
        return self.forks.run(self.root, argv or self.argv, self.env, orders)

    # ---- what is here

    def allowed(self) -> dict[Path, tuple[bytes, ...]]:
        """Every final name that may come to be here, and the contents that it may have."""
        found: dict[Path, tuple[bytes, ...]] = {}
        for folder in (self.root / "output/toy", self.root / "models/toy", self.other):
            for name in (*WEIGHTS, "note.txt"):
                path = folder / name
                found[path] = (*good(name), *([self.damaged[path]] if path in self.damaged else []))
        long = _long()
        for index in range(-(-len(long) // PIECE_SIZE)):
            path = self.root / f"chunks/new/{LONG}.part-{suffix(index)}"
            found[path] = (long[index * PIECE_SIZE : (index + 1) * PIECE_SIZE],)
        return found

    def wrong_bytes(self) -> list[str]:
        """The final names that hold what was never proven; and records that are not true."""
        wrong = [
            f"{path} holds wrong bytes"
            for path, contents in self.allowed().items()
            if path.is_file() and path.read_bytes() not in contents
        ]
        return wrong + self._wrong_blobs() + self._wrong_receipts() + self._wrong_lists()

    def _wrong_blobs(self) -> list[str]:
        wrong = []
        for path in (self.home / "hf").rglob("blobs/*"):
            data = path.read_bytes()
            git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            names = {hashlib.sha256(data).hexdigest(), git}
            if not path.name.endswith(".incomplete") and path.name not in names:
                wrong.append(f"{path} is not what its name says")
        return wrong

    def _wrong_lists(self) -> list[str]:
        """A list of digests, or a manifest, that is half there or untrue."""
        wrong = []
        sums = self.root / "chunks/new/SHA256SUMS"
        if sums.is_file():
            for name, digest in parse_sums(sums.read_text(), str(sums)).items():
                part = sums.parent / name
                there = part.read_bytes() if part.is_file() else b""
                if hashlib.sha256(there).hexdigest() != digest:
                    wrong.append(f"{sums} is wrong about {name}")
        return wrong

    def _wrong_receipts(self) -> list[str]:
        """Files that count as proven and whose bytes are wrong."""
        return [
            f"{path} counts as proven and holds wrong bytes"
            for path in self.proven()
            if path.read_bytes() not in good(path.name)
        ]

    def proven(self) -> list[Path]:
        """The files that a look takes for proven."""
        manifest = load(self.root / "manifests/toy.toml")
        paths = Paths.of(manifest, self.root, str(self.dest))
        state = inspect(manifest, manifest.artifacts, paths, {})
        looks = [file for item in state.artifacts for file in (item.installed, item.staged)]
        return [file.path for file in looks if file.state is FileState.VERIFIED]

    def copies(self, name: str) -> list[Path]:
        """The whole and right copies of a file that are here, but for its parts."""
        folders = (self.root / "output/toy", self.root / "models/toy", self.other)
        paths = (folder / name for folder in folders)
        return [path for path in paths if path.is_file() and path.read_bytes() in good(name)]

    def has_parts(self, name: str) -> bool:
        """Whether all parts of a file are here and right."""
        return b"".join(self._parts(name)) == good(name)[0]

    def _parts(self, name: str) -> list[bytes]:
        found = sorted((self.root / "chunks/toy" / name).glob(f"{name}.part-??"))
        return [path.read_bytes() for path in found]

    def listing(self) -> set[str]:
        """The name of everything that is here."""
        tops = (self.home, self.other)
        found = {str(p.relative_to(top)) for top in tops for p in top.rglob("*")}
        return {name for name in found if "__pycache__" not in name}

    def held(self, journals: bool) -> int:
        """Bytes of weight files that are whole, or journaled as proven or arrived."""
        return sum(self._held(name, journals) for name in WEIGHTS)

    def _held(self, name: str, journals: bool) -> int:
        if any(self.copies(name)):
            return len(good(name)[0])
        ranges = self._journaled(name) if journals else ()
        return sum(end - start for start, end in ranges)

    def _journaled(self, name: str) -> set[tuple[int, int]]:
        staged = self.root / "output/toy" / name
        if not partial_path(staged).is_file() or not journal_path(staged).is_file():
            return set()
        lines = journal_path(staged).read_text(errors="replace").splitlines()
        pieces = [record for line in lines if (record := load_piece(line))]
        ranges = {(p.offset, p.offset + p.size) for p in pieces}
        arrivals = [a for line in lines if (a := load_arrival(line))]
        return ranges | {
            (a.offset, a.offset + a.size)
            for a in arrivals
            if not any(start <= a.offset < end for start, end in ranges)
        }

    def proven_parts(self, journals: bool) -> set[str]:
        """The paths of parts whose piece is proven already, so that nobody need read them."""
        found = set()
        for artifact in load(self.root / "manifests/toy.toml").artifacts:
            held = self._journaled(artifact.path) if artifact.pieces and journals else set()
            whole = any(self.copies(artifact.path))
            for piece in artifact.pieces:
                if whole or (piece.offset, piece.end) in held:
                    found.add(str(self.root / piece.part))
        return found

    def sent(self) -> int:
        """Bytes of weight files that the servers have sent since `quiet`."""
        asked = (asked.headers.get("range", "") for asked in self.mirror.gets())
        spans = (span.removeprefix("bytes=").split("-") for span in asked if span)
        return self.hub.bytes_sent("storage") + sum(int(b) + 1 - int(a) for a, b in spans)

    def quiet(self) -> None:
        """Forgets what the servers were asked."""
        self.hub.clear()
        self.mirror.log.clear()


@functools.cache
def good(name: str) -> tuple[bytes, ...]:
    """The right contents of a file of the toy model."""
    if name == "note.txt":
        return NOTE.encode(), HUBS_NOTE
    return (content(name, PIECE_SIZE * {"a.bin": 5, "b.bin": 3}[name] - 12_345),)


@functools.cache
def _long() -> bytes:
    return content(LONG, 4 * PIECE_SIZE - 5)


def total() -> int:
    """Bytes of the weight files."""
    return sum(len(good(name)[0]) for name in WEIGHTS)


def renew_receipts(
    home: Path, known: dict[int, tuple[int | None, os.stat_result]] | None = None
) -> None:
    """Lets the receipts below a copied tree be about the copies, as they were about the originals.

    `known` tells, by a file's old inode, when it was written (ns; None where
    the receipt is younger) and what stat it has now: a receipt that was not
    true stays so. Without it each receipt is true of the file that it names.
    """
    for path in home.rglob(".csm-weights/*.json"):
        try:
            data = json.loads(path.read_text())
            of = data["fingerprint"]
        except (ValueError, KeyError, TypeError):
            continue
        file = path.parent.parent / path.name.removesuffix(".json")
        if known is None and file.exists():
            of.update(asdict(Fingerprint.of(file.stat())))
        elif known and of["inode"] in known:
            written, status = known[of["inode"]]
            if written in (None, of["mtime_ns"]):
                of.update(asdict(Fingerprint.of(status)))
        path.write_text(json.dumps(data) + "\n")


class Bench:
    """Where scenes are made: a folder for them, the servers, and the forking process."""

    def __init__(
        self, folder: Path, other: Path, forks: Forks, hub: HubServer, mirror: FileServer
    ) -> None:
        self.folder = folder
        self._other = other
        self._tools = (forks, hub, mirror)
        self._count = 0
        self._templates: dict[str, tuple[Path, Path]] = {}
        files = {name: good(name)[-1] for name in (*WEIGHTS, "note.txt")}
        self._commit = hub.add_repo("org/toy", dict(files))

    @classmethod
    @contextmanager
    def open(cls, folder: Path, other: Path | None = None) -> Iterator[Bench]:
        """A bench in `folder`; `other` is a folder on another disk, removed at the end."""
        with ExitStack() as stack:
            served = folder / "mirror"
            served.mkdir(parents=True)
            for name in (*WEIGHTS, "note.txt"):
                (served / name).write_bytes(good(name)[-1])
            forks = stack.enter_context(Forks(folder / "said"))
            hub = stack.enter_context(HubServer())
            mirror = stack.enter_context(serving(served, ranges=True))
            elsewhere = other or folder / "other"
            elsewhere.mkdir(parents=True, exist_ok=True)
            stack.callback(shutil.rmtree, elsewhere, ignore_errors=True)
            yield cls(folder, elsewhere, forks, hub, mirror)

    def scene(self, command: Command) -> Scene:
        """A fresh scene of a command."""
        if command.name not in self._templates:
            self._templates[command.name] = self._prepare(command)
        home, other = self._templates[command.name]
        return self._copy(command, home, other)

    def drop(self, scene: Scene) -> None:
        """Removes a scene."""
        shutil.rmtree(scene.home, ignore_errors=True)
        shutil.rmtree(scene.other, ignore_errors=True)

    def blank(self, command: Command) -> Scene:
        """A scene in which nothing is."""
        self._count += 1
        home, other = self.folder / f"scene-{self._count}", self._other / f"scene-{self._count}"
        return Scene(home, other, command, *self._tools)

    def _prepare(self, command: Command) -> tuple[Path, Path]:
        scene = self.blank(command)
        scene.root.mkdir(parents=True)
        scene.other.mkdir(parents=True)
        (scene.home / "home").mkdir()
        toy = Toy.make(scene.root)
        toy.write_manifest(replace(toy.manifest, repo="org/toy", revision=self._commit))
        for name in ("tasks.py", "recombine.sh"):
            shutil.copy2(REPOSITORY / name, scene.root / name)
        (scene.root / LONG).write_bytes(_long())
        for argv in command.before:
            ended = scene.run(argv=argv)
            assert ended.code == 0, ended.said
        if command.far:
            shutil.rmtree(scene.root / "chunks")
        return scene.home, scene.other

    def _copy(self, command: Command, home: Path, other: Path) -> Scene:
        scene = self.blank(command)
        shutil.copytree(home, scene.home, symlinks=True)
        shutil.copytree(other, scene.other, symlinks=True)
        renew_receipts(scene.home)
        if command.damage:
            command.damage(scene)
            placed = scene.root / "models/toy"
            scene.damaged = {placed / n: (placed / n).read_bytes() for n in WEIGHTS}
        return scene
