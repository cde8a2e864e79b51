"""The commands under test, and the toy repositories in which they run."""

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

from csm_weights.files import Fingerprint
from csm_weights.manifest.parse import load
from csm_weights.manifest.pin import suffix
from csm_weights.store.inspect import FileState, Paths, inspect
from csm_weights.store.journal import read_journal
from csm_weights.verify.sums import parse_sums
from tests.support.hub import HubServer
from tests.support.servers import FileServer, serving
from tests.support.toy import NOTE, PIECE_SIZE, Toy, content, flip
from tools.torture.fork_server import LIMIT, Child, ForkServer, Result
from tools.torture.tracing import Injection

REPOSITORY = Path(__file__).resolve().parents[2]

WEIGHTS = ("a.bin", "b.bin")

#: The Hub's text of note.txt; the manifest has the text of the other edition.
HUBS_NOTE = b"another edition"

#: The file that is split, which no other command uses: four chunk files long.
LONG = "long.bin"


@dataclass(frozen=True)
class Command:
    """One command that changes the disk, and the repository that it needs.

    `before` are commands that prepare the repository. `remote` is the server that has the
    bytes, "hub" or "mirror"; then there are no chunk files. `damage` is done last.
    """

    name: str
    argv: tuple[str, ...]
    before: tuple[tuple[str, ...], ...] = ()
    remote: str = ""
    damage: Callable[[Sandbox], None] | None = None
    is_script: bool = False
    consumes: bool = False


def _inv(*words: str) -> tuple[str, ...]:
    return (words[0], "--model", "toy", "--only", "all", *words[1:])


def _damage_installed(sandbox: Sandbox) -> None:
    flip(sandbox.root / "models/toy/a.bin", 100_000)
    (sandbox.root / "models/toy/b.bin").write_bytes(content("b.bin", 100_000))


_FROM_CHUNKS = ("--source", "chunks")
_FETCHED = (_inv("fetch", *_FROM_CHUNKS),)
_INSTALLED = (_inv("weights", "--no-smoke", *_FROM_CHUNKS),)

COMMANDS = {
    command.name: command
    for command in (
        Command("fetch (chunks)", _inv("fetch", *_FROM_CHUNKS)),
        Command("fetch (Hub)", _inv("fetch", "--source", "hf"), remote="hub"),
        Command(
            "fetch (mirror)", _inv("fetch", "--source", "mirror", "--url", "URL"), remote="mirror"
        ),
        Command("weights (chunks)", _INSTALLED[0]),
        Command("weights (repair)", _INSTALLED[0], _INSTALLED, damage=_damage_installed),
        Command("place", _inv("place"), _FETCHED),
        Command("place (other disk)", _inv("place", "--dest", "OTHER"), _FETCHED),
        Command("seed-cache", _inv("seed-cache"), _INSTALLED),
        Command("split", ("split", LONG, "--chunks", "chunks/new", "--size", str(PIECE_SIZE))),
        Command("recombine.sh", ("./recombine.sh", "--model", "toy", "all"), is_script=True),
        Command("fetch --consume", _inv("fetch", *_FROM_CHUNKS, "--consume"), consumes=True),
    )
}


@dataclass
class Sandbox:
    """A command's repository at `home/tree`, the Hub's cache beside it; `other` is another disk."""

    home: Path
    other: Path
    command: Command
    fork_server: ForkServer
    hub: HubServer
    mirror: FileServer
    damaged: dict[Path, bytes] = field(default_factory=dict)

    @property
    def root(self) -> Path:
        """Return the repository."""
        return self.home / "tree"

    @property
    def argv(self) -> tuple[str, ...]:
        """Return the command's words, with the addresses of this sandbox."""
        words = {"URL": self.mirror.url, "OTHER": str(self.other)}
        return tuple(words.get(word, word) for word in self.command.argv)

    @property
    def env(self) -> dict[str, str]:
        """Return the environment of what runs here."""
        own = {"HOME": str(self.home / "home"), "HF_HOME": str(self.home / "hf")}
        return own | {"HF_ENDPOINT": self.hub.endpoint, "TQDM_DISABLE": "1"}

    @property
    def injection(self) -> Injection:
        """Return an injection that records what is done here, and changes nothing."""
        return Injection(roots=(str(self.home), str(self.other)))

    @property
    def dest(self) -> Path:
        """Return the folder in which the command installs files, or found them installed."""
        if "OTHER" in self.command.argv:
            return self.other
        return self.root / "models/toy"

    def run(self, injection: Injection | None = None, argv: tuple[str, ...] = ()) -> Result:
        """Run the command, or another one, to its end."""
        return self.fork_server.run(self.root, argv or self.argv, self.env, injection)

    def start(self, injection: Injection | None = None) -> Child:
        """Start the command; the caller waits for the child."""
        injection = injection or self.injection
        return self.fork_server.start(self.root, self.argv, self.env, injection)

    def wait(self, child: Child, limit: float = LIMIT) -> Result:
        """Wait for a child, at most `limit` seconds."""
        return self.fork_server.wait(child, limit)

    # ---- what is in the sandbox

    def allowed(self) -> dict[Path, tuple[bytes, ...]]:
        """Return every final name that may appear here, with the contents that it may have."""
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
        """Return the final names with bytes that were never verified, and the false records."""
        wrong = [
            f"{path} holds wrong bytes"
            for path, contents in self.allowed().items()
            if path.is_file() and path.read_bytes() not in contents
        ]
        return wrong + self._wrong_blobs() + self._wrong_receipts() + self._wrong_sums()

    def _wrong_blobs(self) -> list[str]:
        wrong = []
        for path in (self.home / "hf").rglob("blobs/*"):
            data = path.read_bytes()
            git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            names = {hashlib.sha256(data).hexdigest(), git}
            if not path.name.endswith(".incomplete") and path.name not in names:
                wrong.append(f"{path} is not what its name says")
        return wrong

    def _wrong_sums(self) -> list[str]:
        """Return the entries of SHA256SUMS that do not fit their chunk file."""
        wrong = []
        sums = self.root / "chunks/new/SHA256SUMS"
        if sums.is_file():
            for name, digest in parse_sums(sums.read_text(), str(sums)).items():
                chunk_file = sums.parent / name
                there = chunk_file.read_bytes() if chunk_file.is_file() else b""
                if hashlib.sha256(there).hexdigest() != digest:
                    wrong.append(f"{sums} is wrong about {name}")
        return wrong

    def _wrong_receipts(self) -> list[str]:
        """Return the files that count as verified and whose bytes are wrong."""
        return [
            f"{path} counts as verified and holds wrong bytes"
            for path in self.verified()
            if path.read_bytes() not in good(path.name)
        ]

    def verified(self) -> list[Path]:
        """Return the files that `inv status` takes for verified."""
        manifest = load(self.root / "manifests/toy.toml")
        paths = Paths.of(manifest, self.root, str(self.dest))
        state = inspect(manifest, manifest.artifacts, paths, {})
        looks = [file for item in state.artifacts for file in (item.installed, item.staged)]
        return [file.path for file in looks if file.state is FileState.VERIFIED]

    def copies(self, name: str) -> list[Path]:
        """Return the complete and right copies of a file, apart from its chunk files."""
        folders = (self.root / "output/toy", self.root / "models/toy", self.other)
        paths = (folder / name for folder in folders)
        return [path for path in paths if path.is_file() and path.read_bytes() in good(name)]

    def has_chunk_files(self, name: str) -> bool:
        """Return whether all chunk files of a file are here and right."""
        return b"".join(self._chunk_files(name)) == good(name)[0]

    def _chunk_files(self, name: str) -> list[bytes]:
        found = sorted((self.root / "chunks/toy" / name).glob(f"{name}.part-??"))
        return [path.read_bytes() for path in found]

    def listing(self) -> set[str]:
        """Return the name of everything that is here."""
        tops = (self.home, self.other)
        found = {str(p.relative_to(top)) for top in tops for p in top.rglob("*")}
        return {name for name in found if "__pycache__" not in name}

    def held(self, journals: bool) -> int:
        """Count the bytes of weight files that are complete, or journaled."""
        return sum(self._held(name, journals) for name in WEIGHTS)

    def _held(self, name: str, journals: bool) -> int:
        if any(self.copies(name)):
            return len(good(name)[0])
        ranges = self._journaled(name) if journals else ()
        return sum(end - start for start, end in ranges)

    def _journaled(self, name: str) -> set[tuple[int, int]]:
        (artifact,) = load(self.root / "manifests/toy.toml").select([name])
        journal = read_journal(self.root / "output/toy" / name, artifact)
        verified = {(p.offset, p.offset + p.size) for p in journal.pieces}
        return verified | {(a.offset, a.offset + a.size) for a in journal.arrived}

    def verified_chunk_files(self, journals: bool) -> set[str]:
        """Return the paths of chunk files that need not be read: their piece is verified."""
        found = set()
        for artifact in load(self.root / "manifests/toy.toml").artifacts:
            held = self._journaled(artifact.path) if artifact.pieces and journals else set()
            whole = any(self.copies(artifact.path))
            for piece in artifact.pieces:
                if whole or (piece.offset, piece.end) in held:
                    found.add(str(self.root / piece.part))
        return found

    def sent(self) -> int:
        """Count the bytes of weight files that the servers have sent since `forget_requests`."""
        asked = (asked.headers.get("range", "") for asked in self.mirror.gets())
        spans = (span.removeprefix("bytes=").split("-") for span in asked if span)
        return self.hub.bytes_sent("storage") + sum(int(b) + 1 - int(a) for a, b in spans)

    def forget_requests(self) -> None:
        """Empty the logs of the servers."""
        self.hub.clear()
        self.mirror.log.clear()


@functools.cache
def good(name: str) -> tuple[bytes, ...]:
    """Return the right contents of a file of the toy model."""
    if name == "note.txt":
        return NOTE.encode(), HUBS_NOTE
    return (content(name, PIECE_SIZE * {"a.bin": 5, "b.bin": 3}[name] - 12_345),)


@functools.cache
def _long() -> bytes:
    return content(LONG, 4 * PIECE_SIZE - 5)


def total() -> int:
    """Return the bytes of the weight files."""
    return sum(len(good(name)[0]) for name in WEIGHTS)


def renew_receipts(
    home: Path, known: dict[int, tuple[int | None, os.stat_result]] | None = None
) -> None:
    """Make the receipts below a copied tree fit the copies as they fitted the originals.

    `known` maps a file's old inode to the time at which it was written (ns; None where the
    receipt is younger) and to its new stat: a receipt that was false stays false. Without it
    every receipt is made to fit the file that it names.
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


class Sandboxes:
    """A factory of sandboxes, with the servers and the forking process that they share."""

    def __init__(
        self, folder: Path, other: Path, fork_server: ForkServer, hub: HubServer, mirror: FileServer
    ) -> None:
        self.folder = folder
        self._other = other
        self._tools = (fork_server, hub, mirror)
        self._count = 0
        self._templates: dict[str, tuple[Path, Path]] = {}
        files = {name: good(name)[-1] for name in (*WEIGHTS, "note.txt")}
        self._commit = hub.add_repo("org/toy", dict(files))

    @classmethod
    @contextmanager
    def open(cls, folder: Path, other: Path | None = None) -> Iterator[Sandboxes]:
        """Yield a factory in `folder`; `other` is a folder on another disk, removed at the end."""
        with ExitStack() as stack:
            served = folder / "mirror"
            served.mkdir(parents=True)
            for name in (*WEIGHTS, "note.txt"):
                (served / name).write_bytes(good(name)[-1])
            fork_server = stack.enter_context(ForkServer(folder / "said"))
            hub = stack.enter_context(HubServer())
            mirror = stack.enter_context(serving(served, ranges=True))
            elsewhere = other or folder / "other"
            elsewhere.mkdir(parents=True, exist_ok=True)
            stack.callback(shutil.rmtree, elsewhere, ignore_errors=True)
            yield cls(folder, elsewhere, fork_server, hub, mirror)

    def sandbox(self, command: Command) -> Sandbox:
        """Return a fresh sandbox of a command."""
        if command.name not in self._templates:
            self._templates[command.name] = self._prepare(command)
        home, other = self._templates[command.name]
        return self._copy(command, home, other)

    def remove(self, sandbox: Sandbox) -> None:
        """Remove a sandbox."""
        shutil.rmtree(sandbox.home, ignore_errors=True)
        shutil.rmtree(sandbox.other, ignore_errors=True)

    def empty(self, command: Command) -> Sandbox:
        """Return a sandbox with nothing in it."""
        self._count += 1
        home, other = self.folder / f"sandbox-{self._count}", self._other / f"sandbox-{self._count}"
        return Sandbox(home, other, command, *self._tools)

    def _prepare(self, command: Command) -> tuple[Path, Path]:
        sandbox = self.empty(command)
        sandbox.root.mkdir(parents=True)
        sandbox.other.mkdir(parents=True)
        (sandbox.home / "home").mkdir()
        toy = Toy.make(sandbox.root)
        toy.write_manifest(replace(toy.manifest, repo="org/toy", revision=self._commit))
        for name in ("tasks.py", "recombine.sh"):
            shutil.copy2(REPOSITORY / name, sandbox.root / name)
        (sandbox.root / LONG).write_bytes(_long())
        for argv in command.before:
            result = sandbox.run(argv=argv)
            assert result.code == 0, result.output
        if command.remote:
            shutil.rmtree(sandbox.root / "chunks")
        return sandbox.home, sandbox.other

    def _copy(self, command: Command, home: Path, other: Path) -> Sandbox:
        sandbox = self.empty(command)
        shutil.copytree(home, sandbox.home, symlinks=True)
        shutil.copytree(other, sandbox.other, symlinks=True)
        renew_receipts(sandbox.home)
        if command.damage:
            command.damage(sandbox)
            placed = sandbox.root / "models/toy"
            sandbox.damaged = {placed / n: (placed / n).read_bytes() for n in WEIGHTS}
        return sandbox
