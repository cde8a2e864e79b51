"""Everything that can go wrong, one exit code a branch.

::

    CsmWeightsError               1   a bug, or a call that makes no sense
    ├── UsageError                1   an option or name that does not exist
    ├── MissingInput              3   an input is not here
    ├── WrongContent              4   size, digest, structure, hostile file
    │   └── ManifestInvalid       4   the manifest itself breaks a rule
    ├── AccessRefused             5   no token, bad token, terms, scope
    ├── NetworkFailed             6   after retries
    ├── NoSpace                   7   not enough disk, or it cannot be written
    ├── SmokeFailed               8   the loaded model is not right
    ├── SmokeUnavailable         77   the smoke test could not run
    └── Interrupted             130   Ctrl-C or a termination signal

An error carries `Finding`s: one for each thing that is wrong, so that a
person mends all of them in one round.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class Kind(enum.StrEnum):
    """What is wrong with one thing; the value is the word a person reads."""

    MISSING = "missing"
    LFS_POINTER = "git-lfs pointer"
    WRONG_SIZE = "wrong size"
    WRONG_DIGEST = "wrong digest"
    DIFFERENT = "different"
    MALFORMED = "malformed"
    ACCESS_PAGE = "access page"
    EXTRA_PART = "unexpected part"
    UNREADABLE = "unreadable"
    CHANGED = "changed while read"
    IN_THE_WAY = "something in the way"
    NOT_WRITABLE = "not writable"
    NO_SPACE = "no space"
    CONSUMED = "consumed"
    NOT_CONSUMABLE = "cannot be consumed"

    NOT_THERE = "not there"
    OFFLINE = "offline mode"

    NO_TOKEN = "no token"
    UNKNOWN_TOKEN = "token not known"
    TERMS = "terms not accepted"
    PENDING = "waiting for approval"
    REJECTED = "request rejected"
    SCOPE = "token without the scope"
    FORBIDDEN = "access refused"

    RATE_LIMITED = "rate limited"
    SERVER_TROUBLE = "server trouble"
    NO_NETWORK = "no network"
    PROXY = "proxy refuses"
    CERTIFICATE = "certificate refused"
    TOO_SLOW = "too slow"

    WRONG_ANSWER = "wrong answer"
    REDIRECT = "redirect refused"

    NOT_INSTALLED = "not installed"


#: Kinds that mean "the bytes are not here", as opposed to "here, but wrong".
NOT_HERE = frozenset({Kind.MISSING, Kind.LFS_POINTER, Kind.NOT_THERE, Kind.OFFLINE})

#: Kinds that mean "someone has them and does not give them to you".
REFUSED = frozenset(
    {
        Kind.NO_TOKEN,
        Kind.UNKNOWN_TOKEN,
        Kind.TERMS,
        Kind.PENDING,
        Kind.REJECTED,
        Kind.SCOPE,
        Kind.FORBIDDEN,
    }
)

#: Kinds that mean "it may work another time".
NETWORK = frozenset(
    {
        Kind.RATE_LIMITED,
        Kind.SERVER_TROUBLE,
        Kind.NO_NETWORK,
        Kind.PROXY,
        Kind.CERTIFICATE,
        Kind.TOO_SLOW,
    }
)


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, in the four words a person needs.

    `where` is a path or a manifest key; `help` is the command or act that
    mends it, or empty.
    """

    kind: Kind
    where: str
    expected: str
    found: str
    help: str = ""

    def line(self) -> str:
        """The finding as one line of text that cannot drive a terminal."""
        text = f"{self.where}: {self.kind}: expected {self.expected}, found {self.found}"
        return printable(f"{text} -> {self.help}" if self.help else text)


def printable(text: str) -> str:
    """One line without control characters: a file name may hold line ends and escapes."""
    return "".join(c if c.isprintable() else "?" for c in text)


class CsmWeightsError(Exception):
    """Base of all errors of this package; `exit_code` is the process's.

    `advice` is what a person can do about it, beyond the help of each finding.
    """

    exit_code = 1

    def __init__(self, message: str, findings: Iterable[Finding] = (), advice: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.findings = tuple(findings)
        self.advice = advice

    def __str__(self) -> str:
        lines = [self.message, *(f"  {f.line()}" for f in self.findings)]
        lines += self.advice.splitlines()
        return "\n".join(printable(line) for line in lines)


class UsageError(CsmWeightsError):
    """An option, a model name or a value that does not exist."""


class MissingInput(CsmWeightsError):
    """Something the step needs is not on this machine."""

    exit_code = 3


class WrongContent(CsmWeightsError):
    """Bytes that are here are not the bytes that were pinned."""

    exit_code = 4


class ManifestInvalid(WrongContent):
    """A manifest breaks one or more of its rules."""


class AccessRefused(CsmWeightsError):
    """A source refuses access: token, terms or scope."""

    exit_code = 5


class NetworkFailed(CsmWeightsError):
    """The network failed after retries."""

    exit_code = 6


class NoSpace(CsmWeightsError):
    """The disk has too little room, or takes no more writes."""

    exit_code = 7


class SmokeFailed(CsmWeightsError):
    """A check of the loaded model is NOT OK."""

    exit_code = 8


class SmokeUnavailable(CsmWeightsError):
    """The smoke test could not run and was not asked to be skipped."""

    exit_code = 77


class Interrupted(CsmWeightsError):
    """The run was interrupted; what was proven is kept."""

    exit_code = 130


def from_os_error(error: OSError) -> CsmWeightsError:
    """The error of this package for one of the operating system's that got this far."""
    found = error.strerror or str(error)
    where = str(error.filename or "the disk")
    finding = Finding(
        Kind.UNREADABLE, where, "a file or folder that can be used", found, "check it"
    )
    return WrongContent("the operating system refused", [finding])


def error_for(message: str, findings: Sequence[Finding], advice: str = "") -> CsmWeightsError:
    """The one error for many findings.

    A disk that takes nothing outweighs wrong content, that outweighs refused
    access, that outweighs a network that failed, that what is missing, and that
    a program that only the smoke test needs.
    """
    kinds = {f.kind for f in findings}
    if kinds == {Kind.NOT_INSTALLED}:
        return SmokeUnavailable(message, findings, advice)
    kinds.discard(Kind.NOT_INSTALLED)
    if kinds & {Kind.NO_SPACE, Kind.NOT_WRITABLE, Kind.NOT_CONSUMABLE}:
        return NoSpace(message, findings, advice)
    if kinds - NOT_HERE - REFUSED - NETWORK:
        return WrongContent(message, findings, advice)
    if kinds & REFUSED:
        return AccessRefused(message, findings, advice)
    if kinds & NETWORK:
        return NetworkFailed(message, findings, advice)
    return MissingInput(message, findings, advice)
