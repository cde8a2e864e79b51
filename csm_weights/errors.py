"""Everything that can go wrong, an error class for each exit code.

An error carries `Finding`s, one for each thing that is wrong, so that a person
can mend all of them in one round. A finding has a kind, the kind a category,
and the category the error to raise.
"""

from __future__ import annotations

import enum
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, replace


class CsmWeightsError(Exception):
    """Base of all errors of this package; `exit_code` is the process's.

    `advice` is what a person can do about it, beyond the help of each finding.
    """

    exit_code = 1

    def __init_subclass__(cls, exit_code: int | None = None) -> None:
        if exit_code is not None:
            cls.exit_code = exit_code

    def __init__(self, message: str, findings: Iterable[Finding] = (), advice: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.findings = tuple(findings)
        self.advice = advice

    def __str__(self) -> str:
        lines = [self.message, *(f"  {f.line()}" for f in self.findings)]
        lines += self.advice.splitlines()
        return "\n".join(printable(line) for line in lines)


class UsageError(CsmWeightsError, exit_code=2):
    """An option, a model name or a value that does not exist."""


class MissingInput(CsmWeightsError, exit_code=3):
    """Something the step needs is not on this machine."""


class WrongContent(CsmWeightsError, exit_code=4):
    """Bytes that are here are not the bytes that were pinned."""


class ManifestInvalid(WrongContent):
    """A manifest breaks one or more of its rules."""


class AccessRefused(CsmWeightsError, exit_code=5):
    """A source refuses access: token, terms or scope."""


class NetworkFailed(CsmWeightsError, exit_code=6):
    """The network failed after retries."""


class NoSpace(CsmWeightsError, exit_code=7):
    """The disk has too little room, or takes no more writes."""


class SmokeFailed(CsmWeightsError, exit_code=8):
    """A check of the loaded model is NOT OK."""


class SmokeUnavailable(CsmWeightsError, exit_code=77):
    """The smoke test could not run and was not asked to be skipped."""


class Interrupted(CsmWeightsError, exit_code=130):
    """The run was interrupted; what was verified is kept."""


class Category(enum.Enum):
    """The error that findings lead to; of several the one that comes first here."""

    DISK = NoSpace
    CONTENT = WrongContent
    ACCESS = AccessRefused
    NETWORK = NetworkFailed
    MISSING = MissingInput
    SMOKE = SmokeUnavailable


class Kind(enum.StrEnum):
    """A kind of finding: the word that a person reads, and its category."""

    category: Category

    def __new__(cls, word: str, category: Category) -> Kind:
        """Make a member that is its word."""
        kind = str.__new__(cls, word)
        kind._value_, kind.category = word, category
        return kind

    MISSING = "missing", Category.MISSING
    LFS_POINTER = "git-lfs pointer", Category.MISSING
    NOT_THERE = "not found", Category.MISSING
    OFFLINE = "offline mode", Category.MISSING

    WRONG_SIZE = "wrong size", Category.CONTENT
    WRONG_DIGEST = "wrong digest", Category.CONTENT
    DIFFERENT = "different", Category.CONTENT
    MALFORMED = "malformed", Category.CONTENT
    UNSUPPORTED = "not supported", Category.CONTENT
    ACCESS_PAGE = "access page", Category.CONTENT
    EXTRA_CHUNK_FILE = "unexpected chunk file", Category.CONTENT
    UNREADABLE = "unreadable", Category.CONTENT
    CHANGED = "changed while read", Category.CONTENT
    EDITED = "changed since it was verified", Category.CONTENT
    IN_THE_WAY = "path not usable", Category.CONTENT
    STRANDED = "cannot be continued", Category.CONTENT

    NOT_WRITABLE = "not writable", Category.DISK
    NO_SPACE = "no space", Category.DISK
    NOT_CONSUMABLE = "cannot be consumed", Category.DISK

    NO_TOKEN = "no token", Category.ACCESS
    UNKNOWN_TOKEN = "invalid token", Category.ACCESS
    TERMS = "terms not accepted", Category.ACCESS
    PENDING = "waiting for approval", Category.ACCESS
    REJECTED = "request rejected", Category.ACCESS
    SCOPE = "token lacks the scope", Category.ACCESS
    FORBIDDEN = "access refused", Category.ACCESS

    RATE_LIMITED = "rate limited", Category.NETWORK
    SERVER_TROUBLE = "server error", Category.NETWORK
    NO_NETWORK = "no network", Category.NETWORK
    PROXY = "proxy error", Category.NETWORK
    CERTIFICATE = "certificate refused", Category.NETWORK
    TOO_SLOW = "too slow", Category.NETWORK
    WRONG_ANSWER = "unexpected answer", Category.NETWORK
    REDIRECT = "redirect refused", Category.NETWORK
    DAMAGED = "damaged on the way", Category.NETWORK

    NOT_INSTALLED = "not installed", Category.SMOKE
    FAST_PATH = "fast path not usable", Category.SMOKE


#: Help for a file whose content is not what its name says.
GET_AGAIN = "it is damaged, or not what its name says: get it again"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: where, what was expected, what was found.

    `where` is a path or a manifest key; `help` is what mends it, or empty.
    """

    kind: Kind
    where: str
    expected: str
    found: str
    help: str = ""

    @classmethod
    def missing(cls, where: object, expected: str | int, help: str = "") -> Finding:
        """Return that there is no such file; an int as `expected` is its size in bytes."""
        expected = f"{expected:,} bytes" if isinstance(expected, int) else expected
        return cls(Kind.MISSING, str(where), expected, "no such file", help)

    @classmethod
    def unreadable(cls, where: object, error: Exception | str) -> Finding:
        """Return that a file is there and cannot be read."""
        found = getattr(error, "strerror", None) or str(error)
        help = "check its permissions, and the disk"
        return cls(Kind.UNREADABLE, str(where), "a readable file", found, help)

    @classmethod
    def changed(cls, where: object, found: str = "a change in the meantime") -> Finding:
        """Return that a file was written to while it was read."""
        help = "stop whatever writes to it, and run the same command again"
        return cls(Kind.CHANGED, str(where), "a file that does not change", found, help)

    @classmethod
    def edited(cls, where: object, found: str = "a later change") -> Finding:
        """Return that a file is not the one any more that was verified."""
        help = "inv verify says what is wrong with it, inv weights gets the right one"
        return cls(Kind.EDITED, str(where), "the file that was verified", found, help)

    @classmethod
    def wrong_digest(
        cls, where: object, expected: str, found: str | None, help: str = ""
    ) -> Finding:
        """Return that bytes have another sha256 than the expected one."""
        return cls(Kind.WRONG_DIGEST, str(where), f"sha256 {expected}", f"sha256 {found}", help)

    def line(self) -> str:
        """Return the finding as one line of text that cannot drive a terminal."""
        text = f"{self.where}: {self.kind}: expected {self.expected}, found {self.found}"
        return printable(f"{text} -> {self.help}" if self.help else text)


#: Letters that cannot be seen, though they count as printable: fillers, joiners and selectors.
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)


def printable(text: str) -> str:
    """Return the text with all that cannot be seen escaped: controls, line ends, marks, fillers."""
    if text.isascii() and text.isprintable():
        return text
    escaped = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return _INVISIBLE.sub(lambda c: c[0].encode("unicode_escape").decode(), "".join(escaped))


def columns(text: str) -> int:
    """Return the columns that a text takes on a terminal: wide letters two, marks on them none."""
    if text.isascii():
        return len(text)
    marks = sum(unicodedata.category(c) in ("Mn", "Me") for c in text)
    return len(text) - marks + sum(unicodedata.east_asian_width(c) in "WF" for c in text)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the end of a message that suggests the known word most like this one, or ""."""
    import difflib

    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def from_os_error(error: OSError) -> CsmWeightsError:
    """Return the error of this package for one of the operating system's that got this far."""
    refused = Finding.unreadable(error.filename or "the disk", error)
    expected = "a file or folder that can be used"
    return WrongContent(
        "the operating system reported an error", [replace(refused, expected=expected)]
    )


def error_for(message: str, findings: Iterable[Finding], advice: str = "") -> CsmWeightsError:
    """Return the one error for many findings: that of the first category among theirs."""
    findings = tuple(findings)
    categories = {f.kind.category for f in findings}
    first = next((c for c in Category if c in categories), Category.MISSING)
    error: type[CsmWeightsError] = first.value
    return error(message, findings, advice)
