"""SHA256SUMS files, as `sha256sum -c` reads them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from csm_weights.errors import Finding, Kind, WrongContent
from csm_weights.manifest.paths import path_problem

#: The two forms that `sha256sum -c` takes: its own, and that of `sha256sum --tag`.
_SUM_LINE = re.compile(r"(?P<digest>[0-9a-fA-F]{64}) [ *](?P<path>.+)")


_TAG_LINE = re.compile(r"SHA256 \((?P<path>.+)\) = (?P<digest>[0-9a-fA-F]{64})")


#: Bad lines that are told one by one.
MAX_BAD_LINES = 20


def render_sums(digests: Mapping[str, str]) -> str:
    """The text of a SHA256SUMS file, as `sha256sum -c` reads it: path and hex digest."""
    return "".join(f"{digest}  {path}\n" for path, digest in digests.items())


def parse_sums(text: str, where: str) -> dict[str, str]:
    """Path and digest of each line of a SHA256SUMS file.

    Raises WrongContent with every line that is neither, or whose path leaves
    the folder.
    """
    sums: dict[str, str] = {}
    findings = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line or line.startswith("#"):
            continue
        match = _SUM_LINE.fullmatch(line) or _TAG_LINE.fullmatch(line)
        path = match["path"].removeprefix("./") if match else ""
        digest = match["digest"].lower() if match else ""
        if path_problem(path) or sums.setdefault(path, digest) != digest:
            expected = "DIGEST  PATH, each path once"
            findings.append(
                Finding(Kind.MALFORMED, f"{where}:{number}", expected, repr(line[:100]))
            )
    if findings or not sums:
        raise WrongContent(f"{where} is not a SHA256SUMS file", findings[:MAX_BAD_LINES])
    return sums
