"""One node of a fleet: it does what the coordinator asks for, block by block, and installs."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

import requests
from urllib3.exceptions import HTTPError

from csm_weights.byte_ranges import Ranges
from csm_weights.config import HubEnvironment, offline
from csm_weights.errors import (
    CsmWeightsError,
    Finding,
    Kind,
    MissingInput,
    NetworkFailed,
    NoSpace,
    SmokeFailed,
    UsageError,
    error_for,
)
from csm_weights.fleet import server
from csm_weights.fleet.files import Files, RangeWriter, folder_on_node
from csm_weights.fleet.job import (
    Act,
    Answer,
    Hello,
    Job,
    NodeReport,
    Result,
    Status,
    Task,
)
from csm_weights.hashing import sha256
from csm_weights.manifest.paths import RECEIPTS
from csm_weights.pipeline import actions as act
from csm_weights.pipeline import apply, smoke_test
from csm_weights.pipeline.plan import Plan, Target
from csm_weights.pipeline.request import Request
from csm_weights.pipeline.session import Outcome, Session, begin, gate_error
from csm_weights.store.inspect import ArtifactState
from csm_weights.store.lock import locked
from csm_weights.transfer.policy import PieceSource, RemoteSources
from csm_weights.transfer.source import FirstOf, NotAvailable, Source, SourceError

#: Seconds without a byte after which a pull from another node is given up.
QUIET = 5.0

#: Seconds between two signs of life, and after a pull that failed.
BEAT = 2.0
PAUSE = 0.2

#: The plan's name for what comes from the other nodes or from the origin.
FLEET = "the fleet"

#: The kinds of findings that stand for errors without any.
KINDS = {NoSpace: Kind.NO_SPACE, NetworkFailed: Kind.NO_NETWORK, MissingInput: Kind.MISSING}

#: Calls a method of the coordinator, with this node's number first, and returns its result.
Call = Callable[..., Any]


class Node:
    """One node's part in a job. It is at `host`, the address by which other nodes reach it."""

    handler: type = server.Handler

    def __init__(self, job: Job, name: str, host: str) -> None:
        self.job, self.name, self.host = job, name, host
        self._started = time.monotonic()
        self._over = threading.Event()
        self._installing = threading.Event()
        self._error: CsmWeightsError | None = None
        self._lock = threading.Lock()
        self._seconds: float | None = None
        self._counts = Counter[str]()
        self._sessions = threading.local()
        self._origin: list[Source] = []
        self._directory = job.directory
        self._gates: tuple[Any, ...] = ()

    def run(self, call: Call) -> NodeReport:
        """Take part until the job is over; return what became of this node."""
        self._call = call
        try:
            self._run(call)
        except CsmWeightsError as error:
            self._error = error
        except OSError as error:
            where = error.filename or self._directory
            self._error = error_for(f"{self.name} failed", [Finding.unreadable(where, error)])
        findings: tuple[Finding, ...] = ()
        if self._error:
            kind = KINDS.get(type(self._error), Kind.UNSUPPORTED)
            lone = Finding(kind, self._directory, "verified files", self._error.message)
            findings = self._error.findings or (lone,)
            with contextlib.suppress(Exception):
                call("leave", findings)
        return NodeReport(
            node=self.name,
            host=self.host,
            status=Status.FAILED if self._error else Status.VERIFIED,
            seconds=self._seconds or time.monotonic() - self._started,
            directory=self._directory,
            from_disk=self._counts["from_disk"],
            from_nodes=self._counts["from_nodes"],
            from_origin=self._counts["from_origin"],
            refused=self._counts["refused"],
            gates=self._gates,
            findings=findings,
        )

    def _run(self, call: Call) -> None:
        with contextlib.ExitStack() as closing:
            beating = threading.Thread(target=self._beat, args=(call,), daemon=True)
            beating.start()
            closing.callback(self._over.set)
            self.session = session = self._begin()
            with locked(session.paths, with_destination=True):
                state = self._prepare()
                layout = self.job.layout
                files = self.files = Files(layout, state)
                closing.callback(files.close)
                serve = server.serving(self.host, self.job.secret, files.find, self.handler)
                url = closing.enter_context(serve)
                call("join", self._hello(url, state))
                remote = RemoteSources(
                    self.job.remote,
                    self.job.manifest,
                    self._over,
                    lambda _: None,
                    self.job.patience,
                )
                self._origin += closing.enter_context(remote)
                slots = [
                    threading.Thread(target=self._slot, args=(call, slot), daemon=True)
                    for slot in (True, False)
                ]
                for slot in slots:
                    slot.start()
                self._installing.wait()
                for slot in slots if self._error else ():
                    slot.join(2 * QUIET)  # before the files are closed
            if not self._error:
                self._install()
                self._seconds = time.monotonic() - self._started
                call("installed")
                slots[0].join()

    # ---- before

    def _begin(self) -> Session:
        job, own = self.job, version("csm-weights")
        if job.version != own:
            words = (f"csm-weights {job.version}", f"csm-weights {own}")
            finding = Finding(Kind.DIFFERENT, "", *words, "install the same version on all nodes")
            raise error_for("another version of this package", [finding])
        self._directory = folder_on_node(job.directory)
        if not Path(self._directory).is_absolute():
            raise UsageError(f"--dir {self._directory!r} is not an absolute path")
        session = session_of(job, self._directory)
        staged = session.paths.root / job.manifest.staging
        if staged.is_dir() and not job.is_shared:
            shelves = (staged, *session.paths.shelves)
            session.paths = replace(session.paths, shelves=shelves)
        return session

    def _prepare(self) -> dict[str, ArtifactState]:
        """Verify and assemble what is on this node's own disk; return the state afterwards.

        Raises the error of what stands in the way of the rest, as too little room.
        """
        session = self.session
        policy = replace(session.policy, remote=(FLEET,), problems=())
        if self.job.is_shared:
            state = session.inspect()
            self._origin = [
                source
                for item in state.artifacts
                for source in session.policy.candidates(item, session.paths.root)
            ]
            # All nodes would read the same disk: what is there counts as the origin.
            policy = replace(policy, chunks=False, cache=False)
            session.paths = replace(session.paths, shelves=())
        session.policy = policy
        while ready := self._plan().having(act.Verify):
            act.Verify.apply(ready, session)
        local = replace(session, policy=replace(policy, remote=()))
        far = (PieceSource.REMOTE, PieceSource.NOWHERE)
        for action in self._plan().having(act.Assemble):
            if all(origin.source in far for origin in action.origins):
                continue
            try:
                act.Assemble.apply([replace(action, policy=local.policy)], local)
            except NoSpace:
                raise
            except CsmWeightsError:
                pass  # what was verified is kept, and the fleet has the rest
        return {item.artifact.path: item for item in self._plan().state.artifacts}

    def _plan(self) -> Plan:
        plan = self.session.plan(Target.BOTH)
        if plan.findings:
            raise error_for(f"{self.name}: cannot be completed", plan.findings)
        return plan

    def _hello(self, url: str, state: Mapping[str, ArtifactState]) -> Hello:
        layout, verified, spared = self.job.layout, list[int](), list[int]()
        arrived: list[tuple[int, str]] = []
        for number, (artifact, piece) in enumerate(layout.pieces):
            item = state[artifact.path]
            if item.verified:
                is_pinned = item.verified.size == artifact.size
                (verified if is_pinned else spared).append(number)
            elif any(record.is_of(piece) for record in item.journal.pieces):
                verified.append(number)
            else:
                here = Ranges([(a.offset, a.offset + a.size) for a in item.journal.arrived])
                blocks = [b for b in layout.of_piece[number] if not here.missing(b.start, b.end)]
                arrived += [(b.number, self.files.digest(b)) for b in blocks]
        self.files.have |= {b.number for b in layout.blocks if b.piece in verified}
        own = [block for block in layout.blocks if block.piece in {*verified, *spared}]
        self._counts["from_disk"] = sum(block.end - block.start for block in own)
        return Hello(url, tuple(verified), tuple(spared), tuple(arrived))

    # ---- meanwhile

    def _beat(self, call: Call) -> None:
        while not self._over.wait(BEAT):
            with contextlib.suppress(Exception):
                call("beat")

    def _slot(self, call: Call, is_first: bool) -> None:
        """Do tasks, one after the other, until the coordinator says that it is enough."""
        answer: Answer | None = None
        try:
            while not self._over.is_set():
                task: Task = call("next", is_first, answer)
                answer = None
                if task.act is Act.INSTALL:
                    self._installing.set()
                    if not is_first:
                        return
                elif task.act is Act.LEAVE:
                    if task.findings:
                        self._error = error_for(f"{self.name} was given up", task.findings)
                    return
                elif task.act is not Act.WAIT:
                    answer = self._do(task)
        except CsmWeightsError as error:
            self._error = self._error or error
        except Exception as error:  # the coordinator is gone, or the disk fails
            finding = Finding.unreadable(self._directory, error)
            self._error = self._error or error_for(f"{self.name} failed", [finding])
        finally:
            if self._error:
                self._over.set()
            self._installing.set()

    def _do(self, task: Task) -> Answer:
        if task.act is Act.HASH:
            is_right, digests = self.files.hash(task.number, FLEET)
            return Answer(task, Result.DONE if is_right else Result.WRONG, digests)
        if task.act is Act.PULL:
            return self._pull(task)
        return self._fetch(task)

    def _pull(self, task: Task) -> Answer:
        """Pull a block from another node."""
        block = self.job.layout.blocks[task.number]
        url = f"{task.address}/{quote(block.artifact.path)}"
        size = block.end - block.start
        headers = {
            "Authorization": f"Bearer {self.job.secret}",
            "Range": f"bytes={block.start}-{block.end - 1}",
        }
        data = memoryview(bytearray(size))
        try:
            with self._http.get(
                url, headers=headers, stream=True, timeout=QUIET, allow_redirects=False
            ) as response:
                done = 0
                while response.status_code == 206 and done < size:
                    with data[done:] as rest:
                        count = response.raw.readinto(rest)
                    if not count:
                        break
                    done += count
        except (requests.RequestException, HTTPError, OSError, ValueError):
            done = 0
        if done < size:
            time.sleep(PAUSE)
            return Answer(task, Result.FAILED)
        digest = sha256()
        digest.update(data)
        if digest.hexdigest() != task.digest:
            self._count("refused", 1)
            return Answer(task, Result.WRONG)
        self.files.keep(block, data)
        self._count("from_nodes", size)
        return Answer(task, Result.DONE, (task.digest,))

    @property
    def _http(self) -> requests.Session:
        """A session of this thread, which keeps its connections and asks no proxy."""
        if not hasattr(self._sessions, "own"):
            self._sessions.own = requests.Session()
            self._sessions.own.trust_env = False
        own: requests.Session = self._sessions.own
        return own

    def _fetch(self, task: Task) -> Answer:
        """Fetch a block, or a whole piece, as one machine does."""
        layout, is_block = self.job.layout, task.act is Act.FETCH
        number = layout.blocks[task.number].piece if is_block else task.number
        artifact, piece = layout.pieces[number]
        file = self.files.open[artifact.path]
        start, end, digest = piece.offset, piece.end, piece.sha256
        if is_block:
            block = layout.blocks[task.number]
            start, end, digest = block.start, block.end, task.digest
        writer = RangeWriter(file, piece, start, end, digest)
        try:
            # Only nodes that fetch get secrets, and only their own process has them.
            for name, value in self._call("give_credentials").items():
                os.environ.setdefault(name, value)
            if HubEnvironment.read().offline and self.job.remote:
                raise SourceError([offline(self.job.remote[0], "a server")])
            place = FirstOf(*self._origin).deliver(artifact, piece, writer)
        except NotAvailable:
            missing = Finding.missing(piece.part, piece.size, "name a source that has it")
            return Answer(task, Result.FAILED, findings=(missing,))
        except SourceError as error:
            return Answer(task, Result.FAILED, findings=error.findings)
        self._count("from_origin", end - start)
        if not is_block:
            is_right, digests = self.files.hash(number, place)
            return Answer(task, Result.DONE if is_right else Result.FAILED, digests)
        self.files.arrived(block)
        return Answer(task, Result.DONE, (writer.found,))

    def _count(self, what: str, number: int) -> None:
        with self._lock:
            self._counts[what] += number

    # ---- after

    def _install(self) -> None:
        """Read all pieces back, verify the whole files and give them their names; run the gates."""
        session = self.session
        session.policy = replace(session.policy, remote=())
        outcome = apply.run(session, Target.BOTH)
        self._gates = session.gate(outcome.state, rehash=False)
        if error := gate_error(self._gates):
            raise error


def session_of(job: Job, directory: str) -> Session:
    """Begin a session of a job's files in a folder of this node."""
    # Without the checkout there are no chunk files; this package's folder has none.
    root = job.root if Path(job.root).is_dir() else Path(__file__).parents[1]
    request = Request(
        Path(root),
        only=job.paths,
        dest=directory,
        staging=str(Path(directory) / RECEIPTS / "staging"),
        source=job.source,
        urls=job.urls,
        patience=job.patience,
    )
    return begin(request, manifest=job.manifest)


def smoke(job: Job, directory: str) -> tuple[str, tuple[Finding, ...]]:
    """Run the smoke test of the files in a folder; return its verdict and what it found.

    In a process of its own: it imports torch, and may take a GPU.
    """
    try:
        session = session_of(job, directory)
        outcome = smoke_test.run(Outcome(session.inspect()), require_gpu=job.require_gpu)
    except CsmWeightsError as error:
        return "not run", error.findings
    if not outcome.error:
        return "passed", ()
    found = Finding(Kind.NOT_INSTALLED, "", "a smoke test that passes", outcome.error.message)
    verdict = "failed" if isinstance(outcome.error, SmokeFailed) else "not run"
    return verdict, outcome.error.findings or (found,)
