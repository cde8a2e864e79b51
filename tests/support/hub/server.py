"""The hub and its storage host: which response a request gets, and the log of requests."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import math
import re
import secrets
import threading
import time
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

from tests.support.hub.faults import FAULTS, Fault
from tests.support.hub.repository import (
    DATE,
    Access,
    Commit,
    Entry,
    Files,
    IsLfs,
    Refusal,
    Repo,
    Token,
    check_gate,
    is_lfs,
    list_refs,
    make_entry,
    model_info,
    tree_ids,
    whoami,
)
from tests.support.hub.responses import (
    Host,
    LogEntry,
    Request,
    Response,
    file_response,
    json_response,
    redirect,
    refused,
    s3_error,
    text_response,
)
from tests.support.hub.sockets import Record, SocketServer, second_address

#: Seconds that a signed URL lives.
LIFETIME = 3600.0

#: Seconds of the window that the Hub counts requests in: 3,000 for files, 500 of its API.
WINDOW = 300


_NAME = "([^/]+/[^/]+)"


_CACHED = "/api/resolve-cache/models/"


_NO_PAGE = "Sorry, we can't find the page you are looking for."


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
        #: Whether requests over the Hub's quotas are refused, all of them being of one address.
        self.has_quotas = False
        self._windows: dict[str, tuple[float, int]] = {}
        self._repos: dict[str, Repo] = {}
        self._tokens: dict[str, Token] = {}
        self._faults: list[Fault] = []
        self._records: list[Record] = []
        self._signed: dict[str, _Signed] = {}
        self._key = secrets.token_bytes(32)
        self._lock = threading.Lock()
        self._servers = {
            "hub": SocketServer(self, "hub", "127.0.0.1"),
            "storage": SocketServer(self, "storage", second_address()),
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
        """End all connections and both servers."""
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
        """Return the URL of the hub."""
        return self._servers["hub"].url

    @property
    def storage(self) -> str:
        """Return the URL of the storage host."""
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
        """Make a repository with one commit on `main`, and return the commit."""
        self._repos[name] = Repo(name, gated, private, lfs or is_lfs)
        return self.push(name, files)

    def push(self, name: str, files: Files, *, branch: str = "main") -> str:
        """Add, change and (None) remove files in a new commit, and return that."""
        repo = self._repos[name]
        parent = repo.refs.get(branch, "")
        entries = dict(repo.commits[parent].entries) if parent else {}
        for path, source in files.items():
            if source is None:
                del entries[path]
            else:
                entries[path] = make_entry(repo, path, source)
        folders = tree_ids(entries)
        sha = hashlib.sha1(f"tree {folders['']}\nparent {parent}\n".encode()).hexdigest()
        repo.commits[sha] = Commit(sha, entries, folders)
        repo.refs[branch] = sha
        return sha

    def tag(self, repo: str, name: str, commit: str) -> None:
        """Let a name, a tag or a branch, stand for a commit."""
        self._repos[repo].refs[name] = commit

    def add_token(
        self,
        token: str,
        user: str = "alice",
        access: Access = "granted",
        can_read_gated: bool = True,
    ) -> None:
        """Add a token; `access` is its user's access to gated repositories."""
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
        """Switch a fault on; see the table in `faults`."""
        fault = Fault(name, match, host, method, times, after, options)
        with self._lock:
            self._faults.append(fault)
            self._faults.sort(key=lambda known: list(FAULTS).index(known.name))
        return fault

    def clear_faults(self) -> None:
        """Switch all faults off."""
        with self._lock:
            faults, self._faults = self._faults, []
        for fault in faults:
            fault.clear()

    def expire_urls(self) -> None:
        """Let all URLs that were signed so far expire now."""
        with self._lock:
            self._signed = {s: replace(known, until=0.0) for s, known in self._signed.items()}

    @property
    def log(self) -> list[LogEntry]:
        """Return all requests in the order of their responses, including one in progress."""
        with self._lock:
            return [record.frozen() for record in self._records]

    def requests(
        self, host: Host | None = None, method: str | None = None, contains: str = ""
    ) -> list[LogEntry]:
        """Return the requests to a host, of a method, with that in the path."""
        return [
            request
            for request in self.log
            if host in (None, request.host)
            and method in (None, request.method)
            and contains in request.path
        ]

    def bytes_sent(self, host: Host = "storage") -> int:
        """Count the bytes of bodies that a host sent."""
        return sum(request.sent for request in self.requests(host))

    def most_sending(self, host: Host = "storage") -> int:
        """Return how many bodies a host has sent at the same time, at most."""
        return self._servers[host].most_sending

    def clear(self) -> None:
        """Empty the log."""
        with self._lock:
            self._records = []

    def sign(self, entry: Entry, seconds: float) -> str:
        """Return a URL for a file in LFS on the storage host, good for so many seconds."""
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

    def respond(self, request: Request) -> Response:
        """Return the response to a request, after all faults."""
        response = (
            self._from_storage(request) if request.host == "storage" else self._from_hub(request)
        )
        with self._lock:
            faults = list(self._faults)
        for fault in faults:
            response = fault.apply(self, request, response)
        return response

    def record(self, request: Request, status: int) -> Record:
        """Begin the log entry of a response."""
        record = Record(request, status)
        with self._lock:
            self._records.append(record)
        return record

    def _from_storage(self, request: Request) -> Response:
        url = urlsplit(request.path)
        signature = request.query.get("X-Signature", [""])[0]
        expires = request.query.get("X-Expires", [""])[0]
        with self._lock:
            known = self._signed.get(signature)
        if request.method not in ("GET", "HEAD"):
            return s3_error(405, "MethodNotAllowed", "The specified method is not allowed")
        if known is None or (known.entry.stored, known.expires) != (url.path, expires):
            message = "The request signature we calculated does not match"
            return s3_error(403, "SignatureDoesNotMatch", message)
        if time.time() >= known.until:
            return s3_error(403, "AccessDenied", "Request has expired")
        headers = {
            # As the Hub's, which is a Xet hash: 64 hex digits that are not the sha256.
            "ETag": f'"{hashlib.sha256(url.path.encode()).hexdigest()}"',
            "Last-Modified": DATE,
            "Content-Type": "application/octet-stream",
            "Content-Disposition": known.entry.disposition,
        }
        return file_response(request, known.entry, known.entry.content, headers)

    def _from_hub(self, request: Request) -> Response:
        url = urlsplit(request.path)
        api = url.path.startswith("/api/") and not url.path.startswith(_CACHED)
        kind, quota = ("api", 500) if api else ("resolvers", 3000)
        left, seconds = self._left(kind, quota) if self.has_quotas else (quota - 1, WINDOW)
        try:
            if left < 0:
                raise Refusal(429, "You have reached your rate limit")
            response = self._api(request, url.path) if api else self._resolve(request, url.path)
        except Refusal as refusal:
            response = refused(refusal, api)
        usual = {
            "RateLimit": f'"{kind}";r={max(left, 0)};t={seconds}',
            "RateLimit-Policy": f'"fixed window";"{kind}";q={quota};w={WINDOW}',
            "X-LogEntry-Id": f"Root=1-{secrets.token_hex(12)}",
        }
        return replace(response, headers=usual | response.headers)

    def _left(self, kind: str, quota: int) -> tuple[int, int]:
        """Count a request; return how many are left in its window, and the window's seconds."""
        now = time.monotonic()
        with self._lock:
            begun, count = self._windows.get(kind, (now, 0))
            if now >= begun + WINDOW:
                begun, count = now, 0
            self._windows[kind] = begun, count + 1
        return quota - count - 1, math.ceil(begun + WINDOW - now)

    def _token(self, request: Request) -> Token | None:
        given = request.headers.get("authorization")
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

    def _resolve(self, request: Request, path: str) -> Response:
        cached = path.startswith(_CACHED)
        pattern = f"{_CACHED}{_NAME}/([^/]+)/(.+)" if cached else f"/{_NAME}/resolve/([^/]+)/(.+)"
        found = re.fullmatch(pattern, path)
        if found is None:
            raise Refusal(404, _NO_PAGE)
        token = self._token(request)
        repo = self._repo(unquote(found[1]), token)
        check_gate(repo, token)
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
            return redirect(302, self.sign(entry, self.lifetime), headers, entry)
        if self.resolve_cache and not cached:
            where = f"{_CACHED}{repo.name}/{commit.sha}/{quote(entry.path)}"
            query = urlencode({path: "", "etag": entry.etag})
            headers |= {"X-Linked-Etag": entry.etag}
            return redirect(307, f"{where}?{query}", headers, entry)
        headers |= {"ETag": entry.etag, "Content-Type": "text/plain; charset=utf-8"}
        return file_response(request, entry, entry.content, headers)

    def _api(self, request: Request, path: str) -> Response:
        if path == "/api/agent-harnesses":
            return json_response({"standardEnvVars": [], "harnesses": {}})
        token = self._token(request)
        if path == "/api/whoami-v2":
            return json_response(whoami(token))
        found = re.fullmatch(rf"/api/models/{_NAME}(?:/([^/]+)(?:/([^/]+)(?:/(.+))?)?)?", path)
        if found is None:
            raise Refusal(404, _NO_PAGE)
        repo = self._repo(unquote(found[1]), token)
        revision, folder = unquote(found[3] or "main"), unquote(found[4] or "")
        match found[2]:
            case None | "revision":
                return json_response(model_info(repo, repo.commit(revision), request.flag("blobs")))
            case "tree":
                return self._tree(request, repo, revision, folder.rstrip("/"))
            case "paths-info":
                return json_response(_paths(request, repo.commit(revision)))
            case "refs":
                return json_response(list_refs(repo))
            case "auth-check":
                check_gate(repo, token)
                return text_response(b"OK")
            case _:
                raise Refusal(404, _NO_PAGE)

    def _tree(self, request: Request, repo: Repo, revision: str, folder: str) -> Response:
        commit = repo.commit(revision)
        if folder not in commit.folders:
            message = f'{folder} does not exist on "{revision}"'
            raise Refusal(404, message, "EntryNotFound", commit.sha)
        query = {name: values[-1] for name, values in request.query.items()}
        expand = request.flag("expand")
        limit = min(int(query.get("limit", self.page_size)), self.page_size)
        after = base64.b64decode(query.get("cursor", "")).decode()
        paths = [p for p in commit.under(folder, request.flag("recursive")) if p > after]
        headers = {}
        if len(paths) > limit:
            cursor = base64.b64encode(paths[limit - 1].encode()).decode()
            following = urlencode(query | {"limit": limit, "cursor": cursor})
            url = f"{self.endpoint}{urlsplit(request.path).path}?{following}"
            headers["Link"] = f'<{url}>; rel="next"'
        return json_response([commit.listed(p, expand) for p in paths[:limit]], headers=headers)


@dataclass(frozen=True)
class _Signed:
    expires: str
    until: float
    entry: Entry


def _paths(request: Request, commit: Commit) -> list[dict[str, Any]]:
    if request.headers.get("content-type", "").startswith("application/json"):
        form = json.loads(request.body)
        paths, expand = form["paths"], bool(form.get("expand"))
    else:
        fields = parse_qs(request.body.decode())
        paths = fields.get("paths", [])
        expand = fields.get("expand", [""])[-1].lower() == "true"
    known = [p for p in paths if p in commit.entries or (p and p in commit.folders)]
    return [commit.listed(p, expand) for p in known]
