"""Repositories of models: files, commits, tokens, and what the API says of them."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

Access = Literal["granted", "none", "pending", "rejected"]


Files = Mapping[str, bytes | Path | None]


IsLfs = Callable[[str, int], bool]


DATE = "Thu, 13 Mar 2025 12:00:00 GMT"


ISO_DATE = "2025-03-13T12:00:00.000Z"


_LFS_ENDINGS = (".safetensors", ".pt", ".bin", ".wav")


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
        """Return the path of a file in LFS on the storage host."""
        repo = _hex24(self.repo)
        return f"/repos/{repo[:2]}/{repo[2:4]}/{repo}/{self.sha256}"

    @property
    def pointer(self) -> bytes:
        """Return the text that git holds for a file in LFS."""
        return _pointer(self.sha256 or "", self.content.size)

    @property
    def etag(self) -> str:
        """Return the hub's identity of the content, quoted."""
        return f'"{self.sha256 or self.oid}"'

    @property
    def disposition(self) -> str:
        """Return the header that names the file for a browser."""
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
        """Return the file as the model's information lists it."""
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
            found["lastCommit"] = {"id": self.sha, "title": "Upload", "date": ISO_DATE}
        return found

    def under(self, folder: str, recursive: bool) -> list[str]:
        """Return the paths of what is in a folder, folders included, in order."""
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
        """Return the commit of a branch, a tag or a commit id."""
        sha = self.refs.get(revision, revision)
        if sha not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[sha]


@dataclass(frozen=True)
class Token:
    """A token: its user, and what it opens."""

    user: str
    access: Access
    can_read_gated: bool


class Refusal(Exception):
    """A refusal of the hub: its status, message and headers."""

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


def is_lfs(path: str, size: int) -> bool:
    return path.endswith(_LFS_ENDINGS) or size > 1024 * 1024


def make_entry(repo: Repo, path: str, source: bytes | Path) -> Entry:
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


def tree_ids(entries: Mapping[str, Entry]) -> dict[str, str]:
    """Return the git tree id of every folder, the root being ''."""
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


def check_gate(repo: Repo, token: Token | None) -> None:
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


def whoami(token: Token | None) -> dict[str, Any]:
    if token is None:
        raise Refusal(401, "Invalid username or password.")
    scopes = {"canReadGatedRepos": token.can_read_gated, "global": [], "scoped": []}
    access = {
        "displayName": f"{token.user}'s token",
        "role": "fineGrained",
        "createdAt": ISO_DATE,
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


def model_info(repo: Repo, commit: Commit, blobs: bool) -> dict[str, Any]:
    return {
        "_id": _hex24(repo.name),
        "id": repo.name,
        "modelId": repo.name,
        "author": repo.name.partition("/")[0],
        "sha": commit.sha,
        "lastModified": ISO_DATE,
        "createdAt": ISO_DATE,
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


def list_refs(repo: Repo) -> dict[str, Any]:
    branches = [
        {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha}
        for name, sha in repo.refs.items()
    ]
    return {"tags": [], "branches": branches, "converts": []}
