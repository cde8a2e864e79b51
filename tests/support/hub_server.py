"""A Hugging Face Hub on loopback: what the real one answers, and faults by name.

    with HubServer() as hub:
        hub.add_token("hf_good")
        commit = hub.add_repo("org/model", {"model.safetensors": data}, gated=True)
        fault = hub.fault("reset", host="storage", at=100_000, times=1)
        ...                                   # HF_ENDPOINT=hub.endpoint
        assert fault.hits == 1 and len(hub.requests(host="storage")) == 2

Files in LFS are handed out by a storage host of another address, by signed URLs
that expire; a file in git comes from the hub itself. Repositories of models only.

Faults
------
`hub.fault(name, match="*", host=None, method=None, times=None, after=0, **options)`:
`match` is a glob of the path with or without its query, or of a file's path in its
repository; `times` is how often it strikes, `after` how many requests that it could
strike are let through first. Faults of a body strike GET only. Several can be active:
they strike in the order of the table.

================  ===========================================================  ===============
name              what is answered                                             options
================  ===========================================================  ===============
status            that status instead, 429, 503, 404, 401, ...                 code, headers, body
redirect          a redirect to elsewhere                                      location, code
html              200 and the page of a captive portal                         body
close             nothing: the connection is closed                            -
expire            a signed URL that lives for `seconds`                        seconds
lfs-pointer       200 and the LFS pointer in place of the file                 -
other-bytes       `content` in place of the file, under the same headers       content
no-range          200 and the whole file for a range                           -
wrong-range       the range `shift` bytes later, with headers that say so      shift
short             `by` bytes less than asked, with headers that say so         by
long              `by` bytes more than asked, with headers that say so         by
flip              all bits of the byte at `offset` of the file turned over     offset
zeros             zeros for `size` bytes at `offset` of the file               offset, size
gzip              200 and the whole file, compressed, whatever was asked       -
chunked           the body in chunks, without a length                         -
no-content-range  206 without Content-Range                                    -
content-range     `last` and `total` added to what Content-Range says           last, total
etag              another ETag and X-Linked-Etag                               value
commit            another X-Repo-Commit                                        value
drop-header       no header of that name                                       name
reset             RST after `at` bytes of the body                             at
cut               FIN after `at` bytes of the body                             at
stall             nothing more after `at` bytes for `seconds`, then the rest   at, seconds
trickle           `rate` bytes a second after `at` bytes                       rate, at
================  ===========================================================  ===============
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import functools
import gzip
import hashlib
import hmac
import inspect
import json
import os
import re
import secrets
import socket
import struct
import sys
import termios
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from email.utils import formatdate
from fnmatch import fnmatchcase
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

Host = Literal["hub", "storage"]
Access = Literal["granted", "none", "pending", "rejected"]
Files = Mapping[str, bytes | Path | None]
IsLfs = Callable[[str, int], bool]

#: Seconds that a signed URL lives.
LIFETIME = 3600.0

_NAME = "([^/]+/[^/]+)"
_CACHED = "/api/resolve-cache/models/"
_NO_PAGE = "Sorry, we can't find the page you are looking for."
_BLOCK = 256 * 1024
_DATE = "Thu, 13 Mar 2025 12:00:00 GMT"
_ISO_DATE = "2025-03-13T12:00:00.000Z"
_LFS_ENDINGS = (".safetensors", ".pt", ".bin", ".wav")
_PORTAL = b"<!DOCTYPE html>\n<html><body><h1>Welcome to the guest network</h1></body></html>\n"


@dataclass(frozen=True)
class Request:
    """One request and how it was answered; status 0: not at all."""

    host: Host
    method: str
    path: str
    headers: dict[str, str]
    status: int
    sent: int
    range: str | None


class Content:
    """The bytes of a file: in memory, or in a file of their own."""

    def __init__(self, source: bytes | Path) -> None:
        self._memory = memoryview(source if isinstance(source, bytes) else b"")
        self.file = None if isinstance(source, bytes) else source.open("rb")
        self.size = len(self._memory) if self.file is None else os.fstat(self.file.fileno()).st_size

    def read(self, start: int, stop: int) -> bytes | memoryview:
        """The bytes from `start` up to `stop`."""
        if self.file is None:
            return self._memory[start:stop]
        return os.pread(self.file.fileno(), stop - start, start)

    def close(self) -> None:
        """Closes the file."""
        if self.file is not None:
            self.file.close()


@dataclass(frozen=True)
class Entry:
    """A file of a commit; `oid` is the git blob id of what git holds of it."""

    repo: str
    path: str
    content: Content
    oid: str
    sha256: str | None

    @property
    def stored(self) -> str:
        """The path of a file in LFS on the storage host."""
        repo = _hex24(self.repo)
        return f"/repos/{repo[:2]}/{repo[2:4]}/{repo}/{self.sha256}"

    @property
    def pointer(self) -> bytes:
        """The text that git holds for a file in LFS."""
        return _pointer(self.sha256 or "", self.content.size)

    @property
    def etag(self) -> str:
        """What the hub gives as identity of the content, quoted."""
        return f'"{self.sha256 or self.oid}"'

    @property
    def disposition(self) -> str:
        """The header that names the file for a browser."""
        name = self.path.rpartition("/")[2]
        return f"inline; filename*=UTF-8''{quote(name)}; filename=\"{name}\";"

    def listed(self, expand: bool) -> dict[str, Any]:
        """The file as tree and paths-info list it."""
        size = self.content.size
        found: dict[str, Any] = {"type": "file", "oid": self.oid, "size": size}
        if self.sha256:
            pointed = {"oid": self.sha256, "size": size, "pointerSize": len(self.pointer)}
            found["lfs"] = pointed
        found["path"] = self.path
        if expand:
            scan = {"status": "safe", "avScan": {"virusFound": False}, "pickleImportScan": None}
            found["securityFileStatus"] = scan
        return found

    def sibling(self, blobs: bool) -> dict[str, Any]:
        """The file as the model's information lists it."""
        found: dict[str, Any] = {"rfilename": self.path}
        if blobs:
            size = self.content.size
            found |= {"blobId": self.oid, "size": size}
            if self.sha256:
                pointed = {"sha256": self.sha256, "size": size, "pointerSize": len(self.pointer)}
                found["lfs"] = pointed
        return found


@dataclass(frozen=True)
class Commit:
    """A commit: its files, and the git tree id of each of its folders."""

    sha: str
    entries: dict[str, Entry]
    folders: dict[str, str]

    def listed(self, path: str, expand: bool) -> dict[str, Any]:
        """A file or a folder as tree and paths-info list it."""
        if path in self.entries:
            found = self.entries[path].listed(expand)
        else:
            found = {"type": "directory", "oid": self.folders[path], "size": 0, "path": path}
        if expand:
            found["lastCommit"] = {"id": self.sha, "title": "Upload", "date": _ISO_DATE}
        return found

    def under(self, folder: str, recursive: bool) -> list[str]:
        """The paths of what is in a folder, folders included, in order."""
        prefix = f"{folder}/" if folder else ""
        paths = [p for p in [*self.entries, *self.folders] if p and p.startswith(prefix)]
        return sorted(p for p in paths if recursive or "/" not in p[len(prefix) :])


@dataclass
class Repo:
    """A repository of a model; `refs` are its branches and tags."""

    name: str
    gated: bool
    private: bool
    lfs: IsLfs
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, revision: str) -> Commit:
        """The commit of a branch, a tag or a commit id."""
        sha = self.refs.get(revision, revision)
        if sha not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[sha]


@dataclass(frozen=True)
class Token:
    """A token, whose it is, and what it opens."""

    user: str
    access: Access
    can_read_gated: bool


class Refusal(Exception):
    """What the hub does not give, as it says so."""

    def __init__(
        self, status: int, message: str, code: str = "", commit: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = {"X-Error-Message": message}
        if code:
            self.headers["X-Error-Code"] = code
        if commit:
            self.headers["X-Repo-Commit"] = commit
        if status == 401:
            realm = 'Bearer realm="Authentication required", charset="UTF-8"'
            self.headers["WWW-Authenticate"] = realm

    def answer(self, api: bool) -> Answer:
        """The refusal on the wire: JSON from the API, else text."""
        if api:
            return _json({"error": self.message}, self.status, self.headers)
        return _text(self.message.encode(), self.status, headers=self.headers)


@dataclass(frozen=True)
class Asked:
    """A request as it came."""

    host: Host
    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def query(self) -> dict[str, list[str]]:
        """The fields of the query."""
        return parse_qs(urlsplit(self.path).query)

    def flag(self, name: str) -> bool:
        """Whether a field of the query is true."""
        return self.query.get(name, [""])[-1].lower() in ("true", "1")


class Patch(NamedTuple):
    """A change of the bytes of a file from `start` up to `stop`."""

    start: int
    stop: int
    change: Callable[[bytes], bytes]


class Event(NamedTuple):
    """Something that happens after `at` bytes of a body."""

    at: int
    kind: Literal["reset", "cut", "stall", "trickle"]
    value: float
    fault: Fault


@dataclass(frozen=True)
class Answer:
    """A response: bytes `start` to `stop` of a content, changed by patches, then a tail."""

    status: int
    headers: dict[str, str]
    content: Content
    start: int
    stop: int
    entry: Entry | None = None
    is_file: bool = False
    patches: tuple[Patch, ...] = ()
    tail: bytes = b""
    events: tuple[Event, ...] = ()
    chunked: bool = False
    sized: bool = True
    silent: bool = False

    @property
    def length(self) -> int:
        """Bytes of the body."""
        return self.stop - self.start + len(self.tail)

    def plain(self, begin: int, end: int) -> bool:
        """Whether these bytes of the body are bytes of a file on disk."""
        first, last = self.start + begin, self.start + end
        changed = any(p.start < last and first < p.stop for p in self.patches)
        return self.content.file is not None and last <= self.stop and not changed

    def read(self, begin: int, end: int) -> bytes | memoryview:
        """The bytes of the body from `begin` up to `end`."""
        first, last = self.start + begin, min(self.start + end, self.stop)
        data = self.content.read(first, last) if first < last else b""
        for patch in self.patches:
            low, high = max(first, patch.start), min(last, patch.stop)
            if low < high:
                changed = bytearray(data)
                part = slice(low - first, high - first)
                changed[part] = patch.change(bytes(changed[part]))
                data = bytes(changed)
        behind = self.start + end - self.stop
        if behind > 0:
            data = bytes(data) + self.tail[max(first - self.stop, 0) : behind]
        return data

    def without(self, *names: str) -> dict[str, str]:
        """The headers but those."""
        lowered = [name.lower() for name in names]
        return {name: v for name, v in self.headers.items() if name.lower() not in lowered}


class Fault:
    """A switch that is on until it is cleared; `hits` says how often it struck."""

    def __init__(
        self,
        name: str,
        match: str,
        host: Host | None,
        method: str | None,
        times: int | None,
        after: int,
        options: dict[str, Any],
    ) -> None:
        self.name = name
        self.hits = 0
        self.cleared = threading.Event()
        self._match = match
        self._host = host
        self._method = method
        self._times = times
        self._after = after
        self._options = options
        self._lock = threading.Lock()
        inspect.signature(_EFFECTS[name]).bind(None, **options)

    def clear(self) -> None:
        """Switches it off, also where it holds up an answer."""
        self.cleared.set()

    def strike(self, hub: HubServer, asked: Asked, answer: Answer) -> Answer:
        """The answer that it makes of an answer, which may be the same."""
        if answer.silent or self.cleared.is_set() or not self._meant(asked, answer):
            return answer
        struck = _EFFECTS[self.name](Given(hub, self, asked, answer), **self._options)
        return answer if struck is None or not self._counted() else struck

    def _meant(self, asked: Asked, answer: Answer) -> bool:
        names = [asked.path, asked.path.partition("?")[0]]
        if answer.entry is not None:
            names.append(answer.entry.path)
        return (
            self._host in (None, asked.host)
            and self._method in (None, asked.method)
            and any(fnmatchcase(name, self._match) for name in names)
        )

    def _counted(self) -> bool:
        with self._lock:
            if self._after > 0:
                self._after -= 1
                return False
            if self._times is not None and self.hits >= self._times:
                return False
            self.hits += 1
            return True


class Given(NamedTuple):
    """What a fault is given to strike."""

    hub: HubServer
    fault: Fault
    asked: Asked
    answer: Answer

    @property
    def has_file(self) -> bool:
        """Whether the body is one of a file."""
        return self.answer.is_file and self.asked.method == "GET"

    @property
    def is_partial(self) -> bool:
        """Whether the body is a range of a file."""
        return self.has_file and self.answer.status == 206


class HubServer:
    """The hub and its storage host, each on a port of its own."""

    def __init__(self) -> None:
        #: Entries on a page of a tree.
        self.page_size = 1000
        #: Seconds that a signed URL lives.
        self.lifetime = LIFETIME
        #: Whether a file in git comes by a relative 307, as from the Hub since 2025.
        self.resolve_cache = False
        #: The URL of a server that stands in for the storage host, with the same paths.
        self.storage_base: str | None = None
        self._repos: dict[str, Repo] = {}
        self._tokens: dict[str, Token] = {}
        self._faults: list[Fault] = []
        self._records: list[_Record] = []
        self._signed: dict[str, _Signed] = {}
        self._key = secrets.token_bytes(32)
        self._lock = threading.Lock()
        self._servers = {
            "hub": _Server(self, "hub", "127.0.0.1"),
            "storage": _Server(self, "storage", _second_address()),
        }

    def __enter__(self) -> HubServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends all connections and both servers."""
        self.clear_faults()
        for server in self._servers.values():
            server.stop()
        if all(server.is_idle() for server in self._servers.values()):
            for repo in self._repos.values():
                for commit in repo.commits.values():
                    for entry in commit.entries.values():
                        entry.content.close()

    @property
    def endpoint(self) -> str:
        """The URL of the hub."""
        return self._servers["hub"].url

    @property
    def storage(self) -> str:
        """The URL of the storage host."""
        return self._servers["storage"].url

    def add_repo(
        self,
        name: str,
        files: Files,
        *,
        gated: bool = False,
        private: bool = False,
        lfs: IsLfs | None = None,
    ) -> str:
        """Makes a repository with one commit on `main`, and returns the commit."""
        self._repos[name] = Repo(name, gated, private, lfs or _is_lfs)
        return self.push(name, files)

    def push(self, name: str, files: Files, *, branch: str = "main") -> str:
        """Adds, changes and (None) removes files in a new commit, and returns that."""
        repo = self._repos[name]
        parent = repo.refs.get(branch, "")
        entries = dict(repo.commits[parent].entries) if parent else {}
        for path, source in files.items():
            if source is None:
                del entries[path]
            else:
                entries[path] = _entry(repo, path, source)
        folders = _folders(entries)
        sha = hashlib.sha1(f"tree {folders['']}\nparent {parent}\n".encode()).hexdigest()
        repo.commits[sha] = Commit(sha, entries, folders)
        repo.refs[branch] = sha
        return sha

    def tag(self, repo: str, name: str, commit: str) -> None:
        """Lets a name, a tag or a branch, stand for a commit."""
        self._repos[repo].refs[name] = commit

    def add_token(
        self,
        token: str,
        user: str = "alice",
        access: Access = "granted",
        can_read_gated: bool = True,
    ) -> None:
        """Makes a token known; `access` is what its user has to gated repositories."""
        self._tokens[token] = Token(user, access, can_read_gated)

    def fault(
        self,
        name: str,
        /,
        match: str = "*",
        host: Host | None = None,
        method: str | None = None,
        times: int | None = None,
        after: int = 0,
        **options: Any,
    ) -> Fault:
        """Switches a fault on; the table in the head of this file has them all."""
        fault = Fault(name, match, host, method, times, after, options)
        with self._lock:
            self._faults.append(fault)
            self._faults.sort(key=lambda known: list(_EFFECTS).index(known.name))
        return fault

    def clear_faults(self) -> None:
        """Switches all faults off."""
        with self._lock:
            faults, self._faults = self._faults, []
        for fault in faults:
            fault.clear()

    def expire_urls(self) -> None:
        """Lets all URLs that were signed so far expire now."""
        with self._lock:
            self._signed = {s: replace(known, until=0.0) for s, known in self._signed.items()}

    @property
    def log(self) -> list[Request]:
        """All requests in the order of their answers, one still being answered included."""
        with self._lock:
            return [record.frozen() for record in self._records]

    def requests(
        self, host: Host | None = None, method: str | None = None, contains: str = ""
    ) -> list[Request]:
        """The requests to a host, of a method, with that in the path."""
        return [
            request
            for request in self.log
            if host in (None, request.host)
            and method in (None, request.method)
            and contains in request.path
        ]

    def bytes_sent(self, host: Host = "storage") -> int:
        """Bytes of bodies that a host sent."""
        return sum(request.sent for request in self.requests(host))

    def clear(self) -> None:
        """Empties the log."""
        with self._lock:
            self._records = []

    def sign(self, entry: Entry, seconds: float) -> str:
        """A URL for a file in LFS on the storage host, good for so long."""
        until = time.time() + seconds
        message = f"{entry.stored} {until} {secrets.token_hex(8)}".encode()
        signature = hmac.new(self._key, message, "sha256").hexdigest()
        with self._lock:
            self._signed[signature] = _Signed(str(int(until)), until, entry)
        query = urlencode(
            {
                "response-content-disposition": entry.disposition,
                "X-Expires": int(until),
                "X-Signature": signature,
            }
        )
        return f"{self.storage_base or self.storage}{entry.stored}?{query}"

    def respond(self, asked: Asked) -> Answer:
        """The answer to a request, after all faults."""
        answer = self._from_storage(asked) if asked.host == "storage" else self._from_hub(asked)
        with self._lock:
            faults = list(self._faults)
        for fault in faults:
            answer = fault.strike(self, asked, answer)
        return answer

    def record(self, asked: Asked, status: int) -> _Record:
        """Begins the record of an answer."""
        record = _Record(asked, status)
        with self._lock:
            self._records.append(record)
        return record

    def _from_storage(self, asked: Asked) -> Answer:
        url = urlsplit(asked.path)
        signature = asked.query.get("X-Signature", [""])[0]
        expires = asked.query.get("X-Expires", [""])[0]
        with self._lock:
            known = self._signed.get(signature)
        if asked.method not in ("GET", "HEAD"):
            return _s3_error(405, "MethodNotAllowed", "The specified method is not allowed")
        if known is None or (known.entry.stored, known.expires) != (url.path, expires):
            message = "The request signature we calculated does not match"
            return _s3_error(403, "SignatureDoesNotMatch", message)
        if time.time() >= known.until:
            return _s3_error(403, "AccessDenied", "Request has expired")
        headers = {
            # As the Hub's, which is a Xet hash: 64 hex digits that are not the sha256.
            "ETag": f'"{hashlib.sha256(url.path.encode()).hexdigest()}"',
            "Last-Modified": _DATE,
            "Content-Type": "application/octet-stream",
            "Content-Disposition": known.entry.disposition,
        }
        return _file(asked, known.entry, known.entry.content, headers)

    def _from_hub(self, asked: Asked) -> Answer:
        url = urlsplit(asked.path)
        api = url.path.startswith("/api/") and not url.path.startswith(_CACHED)
        try:
            answer = self._api(asked, url.path) if api else self._resolve(asked, url.path)
        except Refusal as refusal:
            answer = refusal.answer(api)
        kind, quota = ("api", 500) if api else ("resolvers", 3000)
        usual = {
            "RateLimit": f'"{kind}";r={quota - 1};t=300',
            "RateLimit-Policy": f'"fixed window";"{kind}";q={quota};w=300',
            "X-Request-Id": f"Root=1-{secrets.token_hex(12)}",
        }
        return replace(answer, headers=usual | answer.headers)

    def _token(self, asked: Asked) -> Token | None:
        given = asked.headers.get("authorization")
        if given is None:
            return None
        token = self._tokens.get(given.removeprefix("Bearer "))
        if token is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return token

    def _repo(self, name: str, token: Token | None) -> Repo:
        repo = self._repos.get(name)
        if repo is not None and (token is not None or not repo.private):
            return repo
        if token is None:
            raise Refusal(401, "Invalid username or password.")
        raise Refusal(404, "Repository not found", "RepoNotFound")

    def _resolve(self, asked: Asked, path: str) -> Answer:
        cached = path.startswith(_CACHED)
        pattern = f"{_CACHED}{_NAME}/([^/]+)/(.+)" if cached else f"/{_NAME}/resolve/([^/]+)/(.+)"
        found = re.fullmatch(pattern, path)
        if found is None:
            raise Refusal(404, _NO_PAGE)
        token = self._token(asked)
        repo = self._repo(unquote(found[1]), token)
        _check_gate(repo, token)
        commit = repo.commit(unquote(found[2]))
        entry = commit.entries.get(unquote(found[3]))
        if entry is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", commit.sha)
        headers = {
            "X-Repo-Commit": commit.sha,
            "Accept-Ranges": "bytes",
            "Content-Disposition": entry.disposition,
        }
        if entry.sha256:
            headers |= {"X-Linked-Size": str(entry.content.size), "X-Linked-Etag": entry.etag}
            headers |= {"Cache-Control": "no-store"}
            return _redirect(302, self.sign(entry, self.lifetime), headers, entry)
        if self.resolve_cache and not cached:
            where = f"{_CACHED}{repo.name}/{commit.sha}/{quote(entry.path)}"
            query = urlencode({path: "", "etag": entry.etag})
            headers |= {"X-Linked-Etag": entry.etag}
            return _redirect(307, f"{where}?{query}", headers, entry)
        headers |= {"ETag": entry.etag, "Content-Type": "text/plain; charset=utf-8"}
        return _file(asked, entry, entry.content, headers)

    def _api(self, asked: Asked, path: str) -> Answer:
        if path == "/api/agent-harnesses":
            return _json({"standardEnvVars": [], "harnesses": {}})
        token = self._token(asked)
        if path == "/api/whoami-v2":
            return _json(_who(token))
        found = re.fullmatch(rf"/api/models/{_NAME}(?:/([^/]+)(?:/([^/]+)(?:/(.+))?)?)?", path)
        if found is None:
            raise Refusal(404, _NO_PAGE)
        repo = self._repo(unquote(found[1]), token)
        revision, folder = unquote(found[3] or "main"), unquote(found[4] or "")
        match found[2]:
            case None | "revision":
                return _json(_information(repo, repo.commit(revision), asked.flag("blobs")))
            case "tree":
                return self._tree(asked, repo, revision, folder.rstrip("/"))
            case "paths-info":
                return _json(_paths(asked, repo.commit(revision)))
            case "refs":
                return _json(_refs(repo))
            case "auth-check":
                _check_gate(repo, token)
                return _text(b"OK")
            case _:
                raise Refusal(404, _NO_PAGE)

    def _tree(self, asked: Asked, repo: Repo, revision: str, folder: str) -> Answer:
        commit = repo.commit(revision)
        if folder not in commit.folders:
            message = f'{folder} does not exist on "{revision}"'
            raise Refusal(404, message, "EntryNotFound", commit.sha)
        query = {name: values[-1] for name, values in asked.query.items()}
        expand = asked.flag("expand")
        limit = min(int(query.get("limit", self.page_size)), self.page_size)
        after = base64.b64decode(query.get("cursor", "")).decode()
        paths = [p for p in commit.under(folder, asked.flag("recursive")) if p > after]
        headers = {}
        if len(paths) > limit:
            cursor = base64.b64encode(paths[limit - 1].encode()).decode()
            following = urlencode(query | {"limit": limit, "cursor": cursor})
            url = f"{self.endpoint}{urlsplit(asked.path).path}?{following}"
            headers["Link"] = f'<{url}>; rel="next"'
        return _json([commit.listed(p, expand) for p in paths[:limit]], headers=headers)


@dataclass(frozen=True)
class _Signed:
    expires: str
    until: float
    entry: Entry


@dataclass
class _Record:
    asked: Asked
    status: int
    sent: int = 0

    def frozen(self) -> Request:
        asked = self.asked
        wanted = asked.headers.get("range")
        return Request(
            asked.host, asked.method, asked.path, asked.headers, self.status, self.sent, wanted
        )


class _HangUp(Exception):
    """The connection has been ended on purpose."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, hub: HubServer, name: Host, address: str) -> None:
        super().__init__((address, 0), _Handler)
        self.hub = hub
        self.name = name
        self.url = f"http://{address}:{self.server_port}"
        self._open: set[socket.socket] = set()
        self._stopped = False
        self._changed = threading.Condition()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def server_bind(self) -> None:
        # Without the look-up of the host's name that HTTPServer does.
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def opened(self, connection: socket.socket) -> None:
        with self._changed:
            self._open.add(connection)
            if self._stopped:
                connection.shutdown(socket.SHUT_RDWR)

    def ended(self, connection: socket.socket) -> None:
        with self._changed:
            self._open.discard(connection)
            self._changed.notify_all()

    def stop(self) -> None:
        self.shutdown()
        self.server_close()
        with self._changed:
            self._stopped = True
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def is_idle(self) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: not self._open, timeout=1.0)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server
    connection: socket.socket

    def setup(self) -> None:
        super().setup()
        self.server.opened(self.connection)

    def finish(self) -> None:
        try:
            super().finish()
        finally:
            self.server.ended(self.connection)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        headers: dict[str, str] = {}
        for name, value in self.headers.items():
            known = headers.get(name.lower())
            headers[name.lower()] = value if known is None else f"{known}, {value}"
        body = self.rfile.read(int(headers.get("content-length", 0)))
        asked = Asked(self.server.name, self.command, self.path, headers, body)
        answer = self.server.hub.respond(asked)
        record = self.server.hub.record(asked, 0 if answer.silent else answer.status)
        try:
            if answer.silent:
                raise _HangUp
            self._send(answer, record)
        except (_HangUp, OSError):
            self.close_connection = True

    do_HEAD = do_POST = do_GET

    def _send(self, answer: Answer, record: _Record) -> None:
        bodiless = self.command == "HEAD" or answer.status in (204, 304)
        if not answer.sized and not answer.chunked:
            self.close_connection = True
        self.connection.sendall(_head(answer, self.close_connection))
        if bodiless:
            return
        position, pace = 0, None
        for event in sorted(answer.events, key=lambda event: event.at):
            self._stream(answer, record, position, event.at, pace)
            position = event.at
            match event.kind:
                case "reset":
                    self._reset(event.fault)
                case "cut":
                    raise _HangUp
                case "stall":
                    event.fault.cleared.wait(event.value)
                case "trickle":
                    pace = event
        self._stream(answer, record, position, answer.length, pace)
        if answer.chunked:
            self.connection.sendall(b"0\r\n\r\n")

    def _stream(
        self, answer: Answer, record: _Record, begin: int, end: int, pace: Event | None
    ) -> None:
        while begin < end:
            slow = pace is not None and not pace.fault.cleared.is_set()
            block = max(int(pace.value / 20), 1) if pace and slow else _BLOCK
            stop = min(begin + block, end)
            # Counted before, so that who has the bytes finds them in the log.
            record.sent += stop - begin
            sent = 0
            try:
                sent = self._send_some(answer, begin, stop)
            finally:
                record.sent -= stop - begin - sent
            begin += sent
            if pace and slow:
                pace.fault.cleared.wait(sent / pace.value)

    def _send_some(self, answer: Answer, begin: int, stop: int) -> int:
        if answer.chunked:
            data = answer.read(begin, stop)
            self.connection.sendall(b"%x\r\n%b\r\n" % (len(data), bytes(data)))
            return len(data)
        if answer.plain(begin, stop) and answer.content.file is not None:
            source = answer.content.file.fileno()
            sent = os.sendfile(self.connection.fileno(), source, answer.start + begin, stop - begin)
            if not sent:
                raise OSError("the file is shorter than it was")
            return sent
        return self.connection.send(answer.read(begin, stop))

    def _reset(self, fault: Fault) -> None:
        # A reset throws away what is not sent yet.
        deadline = time.monotonic() + 2.0
        while time.monotonic() < deadline and not fault.cleared.is_set():
            if _unsent(self.connection) == 0:
                break
            time.sleep(0.002)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()
        self.connection.close()
        raise _HangUp


def _unsent(connection: socket.socket) -> int:
    try:
        answer = fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, b"\0" * 4)
    except OSError:
        time.sleep(0.05)
        return 0
    return int(struct.unpack("i", answer)[0])


def _head(answer: Answer, closing: bool) -> bytes:
    try:
        phrase = HTTPStatus(answer.status).phrase
    except ValueError:
        phrase = "Unknown"
    headers = {"Date": formatdate(usegmt=True)} | answer.headers
    if answer.chunked:
        headers["Transfer-Encoding"] = "chunked"
    elif answer.sized and answer.status not in (204, 304):
        headers.setdefault("Content-Length", str(answer.length))
    if closing:
        headers["Connection"] = "close"
    lines = [f"HTTP/1.1 {answer.status} {phrase}", *(f"{n}: {v}" for n, v in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def _second_address() -> str:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.2", 0))
        except OSError:  # macOS has only one: a name makes another host of it too
            return "localhost"
    return "127.0.0.2"


def _is_lfs(path: str, size: int) -> bool:
    return path.endswith(_LFS_ENDINGS) or size > 1024 * 1024


def _entry(repo: Repo, path: str, source: bytes | Path) -> Entry:
    content = Content(source)
    if not repo.lfs(path, content.size):
        oid = _git_id("blob", bytes(content.read(0, content.size)))
        return Entry(repo.name, path, content, oid, None)
    if isinstance(source, bytes):
        sha256 = hashlib.sha256(source).hexdigest()
    else:
        sha256 = _sha256(source, content.size, source.stat().st_mtime_ns)
    oid = _git_id("blob", _pointer(sha256, content.size))
    return Entry(repo.name, path, content, oid, sha256)


@functools.cache
def _sha256(path: Path, size: int, written: int) -> str:  # noqa: ARG001
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pointer(sha256: str, size: int) -> bytes:
    version = "version https://git-lfs.github.com/spec/v1"
    return f"{version}\noid sha256:{sha256}\nsize {size}\n".encode()


def _git_id(kind: str, data: bytes) -> str:
    return hashlib.sha1(b"%b %d\0%b" % (kind.encode(), len(data), data)).hexdigest()


def _hex24(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:24]


def _folders(entries: Mapping[str, Entry]) -> dict[str, str]:
    """The git tree id of every folder, the root being ''."""
    inside: dict[str, dict[str, tuple[str, str]]] = {"": {}}
    for path, entry in entries.items():
        *parents, name = path.split("/")
        for depth in range(len(parents) + 1):
            inside.setdefault("/".join(parents[:depth]), {})
        inside["/".join(parents)][name] = ("100644", entry.oid)
    ids: dict[str, str] = {}
    for folder in sorted(inside, key=lambda f: -1 if not f else f.count("/"), reverse=True):
        lines = sorted(
            inside[folder].items(), key=lambda i: i[0] + ("/" if i[1][0] == "40000" else "")
        )
        data = b"".join(f"{m} {n}\0".encode() + bytes.fromhex(o) for n, (m, o) in lines)
        ids[folder] = _git_id("tree", data)
        if folder:
            parent, _, name = folder.rpartition("/")
            inside[parent][name] = ("40000", ids[folder])
    return ids


def _check_gate(repo: Repo, token: Token | None) -> None:
    if not repo.gated:
        return
    restricted = f"Access to model {repo.name} is restricted"
    if token is None:
        message = (
            f"{restricted}. You must have access to it and be authenticated to access it."
            " Please log in."
        )
        raise Refusal(401, message, "GatedRepo")
    if not token.can_read_gated:
        message = (
            "Please enable access to public gated repositories in your fine-grained token"
            " settings to view this repository."
        )
        raise Refusal(403, message)
    refused = {
        "none": (
            f"{restricted} and you are not in the authorized list."
            f" Visit https://huggingface.co/{repo.name} to ask for access."
        ),
        "pending": (
            f"Your request to access model {repo.name} is awaiting a review from the repo authors."
        ),
        "rejected": (
            f"Your request to access model {repo.name} has been rejected by the repo's authors."
        ),
    }
    if token.access in refused:
        raise Refusal(403, refused[token.access], "GatedRepo")


def _who(token: Token | None) -> dict[str, Any]:
    if token is None:
        raise Refusal(401, "Invalid username or password.")
    scopes = {"canReadGatedRepos": token.can_read_gated, "global": [], "scoped": []}
    access = {
        "displayName": f"{token.user}'s token",
        "role": "fineGrained",
        "createdAt": _ISO_DATE,
        "fineGrained": scopes,
    }
    return {
        "type": "user",
        "id": _hex24(token.user),
        "name": token.user,
        "fullname": token.user.title(),
        "isPro": False,
        "orgs": [],
        "auth": {"type": "access_token", "accessToken": access},
    }


def _information(repo: Repo, commit: Commit, blobs: bool) -> dict[str, Any]:
    return {
        "_id": _hex24(repo.name),
        "id": repo.name,
        "modelId": repo.name,
        "author": repo.name.partition("/")[0],
        "sha": commit.sha,
        "lastModified": _ISO_DATE,
        "createdAt": _ISO_DATE,
        "private": repo.private,
        "gated": "auto" if repo.gated else False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "spaces": [],
        "siblings": [commit.entries[p].sibling(blobs) for p in sorted(commit.entries)],
        "usedStorage": sum(e.content.size for e in commit.entries.values()),
    }


def _paths(asked: Asked, commit: Commit) -> list[dict[str, Any]]:
    if asked.headers.get("content-type", "").startswith("application/json"):
        form = json.loads(asked.body)
        paths, expand = form["paths"], bool(form.get("expand"))
    else:
        fields = parse_qs(asked.body.decode())
        paths = fields.get("paths", [])
        expand = fields.get("expand", [""])[-1].lower() == "true"
    known = [p for p in paths if p in commit.entries or (p and p in commit.folders)]
    return [commit.listed(p, expand) for p in known]


def _refs(repo: Repo) -> dict[str, Any]:
    branches = [
        {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha}
        for name, sha in repo.refs.items()
    ]
    return {"tags": [], "branches": branches, "converts": []}


def _whole(
    status: int, body: bytes, kind: str, headers: Mapping[str, str], entry: Entry | None = None
) -> Answer:
    content = Content(body)
    return Answer(status, {"Content-Type": kind, **headers}, content, 0, content.size, entry)


def _json(data: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    return _whole(
        status, json.dumps(data).encode(), "application/json; charset=utf-8", headers or {}
    )


def _text(
    body: bytes,
    status: int = 200,
    kind: str = "text/plain; charset=utf-8",
    headers: Mapping[str, str] | None = None,
) -> Answer:
    return _whole(status, body, kind, headers or {})


def _redirect(
    status: int, location: str, headers: Mapping[str, str], entry: Entry | None
) -> Answer:
    phrase = HTTPStatus(status).phrase
    body = f"{phrase}. Redirecting to {location}".encode()
    kind = "text/plain; charset=utf-8"
    return _whole(status, body, kind, {"Location": location, **headers}, entry)


def _s3_error(status: int, code: str, message: str) -> Answer:
    body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
    head = '<?xml version="1.0" encoding="UTF-8"?>\n'
    return _text((head + body).encode(), status, "application/xml")


def _file(
    asked: Asked, entry: Entry, content: Content, headers: dict[str, str], ranges: bool = True
) -> Answer:
    """The content of a file, or the range of it that was asked."""
    headers = headers | {"Accept-Ranges": "bytes"}
    etag = headers.get("ETag", "")
    everything = Answer(200, headers, content, 0, content.size, entry, is_file=True)
    if asked.headers.get("if-match", etag) not in (etag, "*"):
        return _text(b"", 412)
    if asked.headers.get("if-none-match") == etag:
        return replace(everything, status=304, stop=0, is_file=False)
    same = asked.headers.get("if-range", etag) in (etag, headers.get("Last-Modified"))
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", asked.headers.get("range", ""))
    if not ranges or not same or found is None or found[0] == "bytes=-":
        return everything
    if found[1]:
        start = int(found[1])
        stop = min(int(found[2]) + 1, content.size) if found[2] else content.size
    else:
        start, stop = max(content.size - int(found[2]), 0), content.size
    if found[1] and found[2] and int(found[2]) < start:
        return everything
    if start >= content.size:
        refused = {"Content-Range": f"bytes */{content.size}"}
        return _text(b"Requested Range Not Satisfiable", 416, headers=refused)
    return _ranged(everything, start, stop, content.size)


def _ranged(answer: Answer, start: int, stop: int, size: int) -> Answer:
    headers = answer.headers | {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}
    return replace(answer, status=206, headers=headers, start=start, stop=stop)


#: In the order in which they strike: what replaces an answer before what changes it.
_EFFECTS: dict[str, Callable[..., Answer | None]] = {}


def _effect(name: str) -> Callable[[Callable[..., Answer | None]], Callable[..., Answer | None]]:
    """Makes a function the effect of a fault: the answer it makes, or None if it cannot strike."""

    def known(function: Callable[..., Answer | None]) -> Callable[..., Answer | None]:
        _EFFECTS[name] = function
        return function

    return known


@_effect("status")
def _status(
    given: Given,
    *,
    code: int,
    headers: Mapping[str, str] | None = None,
    body: bytes | str | None = None,
) -> Answer:
    text = HTTPStatus(code).phrase if body is None else body
    data = text.encode() if isinstance(text, str) else text
    return replace(_text(data, code, headers=headers), entry=given.answer.entry)


@_effect("redirect")
def _elsewhere(given: Given, *, location: str, code: int = 302) -> Answer:
    return _redirect(code, location, {}, given.answer.entry)


@_effect("html")
def _html(given: Given, *, body: bytes = _PORTAL) -> Answer:
    return replace(_text(body, kind="text/html; charset=utf-8"), entry=given.answer.entry)


@_effect("close")
def _close(given: Given) -> Answer:
    return replace(given.answer, silent=True)


@_effect("expire")
def _expire(given: Given, *, seconds: float) -> Answer | None:
    answer = given.answer
    if answer.entry is None or not answer.headers.get("Location", "").startswith(given.hub.storage):
        return None
    location = given.hub.sign(answer.entry, seconds)
    return replace(answer, headers=answer.headers | {"Location": location})


@_effect("lfs-pointer")
def _lfs_pointer(given: Given) -> Answer | None:
    entry = given.answer.entry
    if entry is None or not entry.sha256 or given.asked.method != "GET":
        return None
    kept = {n: v for n, v in given.answer.headers.items() if n == "X-Repo-Commit"}
    return replace(_text(entry.pointer, headers=kept | {"ETag": f'"{entry.oid}"'}), entry=entry)


@_effect("other-bytes")
def _other_bytes(given: Given, *, content: bytes) -> Answer | None:
    answer = given.answer
    if not given.has_file or answer.entry is None:
        return None
    return _file(given.asked, answer.entry, Content(content), answer.without("Content-Range"))


@_effect("no-range")
def _no_range(given: Given) -> Answer | None:
    answer = given.answer
    if not given.is_partial or answer.entry is None:
        return None
    headers = answer.without("Content-Range")
    return _file(given.asked, answer.entry, answer.content, headers, ranges=False)


@_effect("wrong-range")
def _wrong_range(given: Given, *, shift: int = 1) -> Answer | None:
    answer = given.answer
    size = answer.content.size
    start, stop = answer.start + shift, min(answer.stop + shift, size)
    if not given.is_partial or not 0 <= start < stop:
        return None
    return _ranged(answer, start, stop, size)


@_effect("short")
def _short(given: Given, *, by: int = 1) -> Answer | None:
    answer = given.answer
    if not given.has_file or answer.length <= by:
        return None
    stop = answer.stop - by
    if given.is_partial:
        return _ranged(answer, answer.start, stop, answer.content.size)
    return replace(answer, stop=stop)


@_effect("long")
def _long(given: Given, *, by: int = 1) -> Answer | None:
    answer = given.answer
    if not given.has_file:
        return None
    wanted, size = answer.stop + by, answer.content.size
    stop = min(wanted, size)
    extended = replace(answer, stop=stop, tail=bytes(wanted - stop))
    if not given.is_partial:
        return extended
    said = f"bytes {answer.start}-{wanted - 1}/{max(wanted, size)}"
    return replace(extended, headers=answer.headers | {"Content-Range": said})


def _patched(given: Given, patch: Patch) -> Answer | None:
    answer = given.answer
    if not given.has_file or patch.stop <= answer.start or answer.stop <= patch.start:
        return None
    return replace(answer, patches=(*answer.patches, patch))


@_effect("flip")
def _flip(given: Given, *, offset: int) -> Answer | None:
    return _patched(given, Patch(offset, offset + 1, lambda data: bytes([data[0] ^ 0xFF])))


@_effect("zeros")
def _zeros(given: Given, *, offset: int, size: int) -> Answer | None:
    return _patched(given, Patch(offset, offset + size, lambda data: bytes(len(data))))


@_effect("gzip")
def _gzip(given: Given) -> Answer | None:
    answer = given.answer
    if not given.has_file:
        return None
    whole = replace(answer, start=0, stop=answer.content.size, tail=b"")
    content = Content(gzip.compress(whole.read(0, whole.length), 1))
    headers = answer.without("Content-Range", "Accept-Ranges")
    headers |= {"Content-Encoding": "gzip", "ETag": f"W/{answer.headers.get('ETag')}"}
    return Answer(200, headers, content, 0, content.size, answer.entry)


@_effect("chunked")
def _chunked(given: Given) -> Answer | None:
    return replace(given.answer, chunked=True) if given.has_file else None


@_effect("no-content-range")
def _no_content_range(given: Given) -> Answer | None:
    if not given.is_partial:
        return None
    return replace(given.answer, headers=given.answer.without("Content-Range"))


@_effect("content-range")
def _content_range(given: Given, *, last: int = 0, total: int = 0) -> Answer | None:
    answer = given.answer
    if not given.is_partial:
        return None
    said = f"bytes {answer.start}-{answer.stop - 1 + last}/{answer.content.size + total}"
    return replace(answer, headers=answer.headers | {"Content-Range": said})


@_effect("etag")
def _etag(given: Given, *, value: str) -> Answer | None:
    quoted = value if value.startswith(('"', "W/")) else f'"{value}"'
    changed = {n: quoted for n in given.answer.headers if n in ("ETag", "X-Linked-Etag")}
    return replace(given.answer, headers=given.answer.headers | changed) if changed else None


@_effect("commit")
def _commit(given: Given, *, value: str) -> Answer | None:
    if "X-Repo-Commit" not in given.answer.headers:
        return None
    return replace(given.answer, headers=given.answer.headers | {"X-Repo-Commit": value})


@_effect("drop-header")
def _drop_header(given: Given, *, name: str) -> Answer | None:
    answer = given.answer
    if name.lower() == "content-length":
        return replace(answer, sized=False)
    kept = answer.without(name)
    return replace(answer, headers=kept) if len(kept) < len(answer.headers) else None


def _event(given: Given, at: int, kind: Any, value: float = 0.0) -> Answer | None:
    answer = given.answer
    if given.asked.method == "HEAD" or at >= answer.length:
        return None
    return replace(answer, events=(*answer.events, Event(at, kind, value, given.fault)))


@_effect("reset")
def _reset(given: Given, *, at: int = 0) -> Answer | None:
    return _event(given, at, "reset")


@_effect("cut")
def _cut(given: Given, *, at: int = 0) -> Answer | None:
    return _event(given, at, "cut")


@_effect("stall")
def _stall(given: Given, *, at: int = 0, seconds: float = 60.0) -> Answer | None:
    return _event(given, at, "stall", seconds)


@_effect("trickle")
def _trickle(given: Given, *, rate: float, at: int = 0) -> Answer | None:
    return _event(given, at, "trickle", rate)
