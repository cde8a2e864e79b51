"""SHA256SUMS files: of installed files, and of the chunk files in a folder.

`sha256sum -c` and `shasum -c` read both. The list in a folder of chunk files
describes each joined file in a comment, which both skip and recombine.sh reads.
"""

import re
from collections.abc import Mapping
from pathlib import PurePosixPath

from csm_weights.errors import Finding, Kind, WrongContent
from csm_weights.manifest.paths import path_problem
from csm_weights.manifest.types import Artifact

#: Name of the file beside what it lists.
SUMS = "SHA256SUMS"

#: Most bytes read of such a file: a line has about a hundred.
MAX_SUMS = 64 << 20

#: The two forms that `sha256sum -c` takes: its own, and that of `sha256sum --tag`.
_SUM_LINE = re.compile(r"(?P<digest>[0-9a-fA-F]{64}) [ *](?P<path>.+)")
_TAG_LINE = re.compile(r"SHA256 \((?P<path>.+)\) = (?P<digest>[0-9a-fA-F]{64})")

_CHUNK_LIST = (
    "# Chunk files. To check them: sha256sum -c SHA256SUMS, or shasum -c SHA256SUMS.\n"
    "# To join them: recombine.sh, which reads the comments on the joined files."
)


def render_sums(digests: Mapping[str, str]) -> str:
    """Return the text of a SHA256SUMS file from hex digests by path."""
    return "".join(f"{digest}  {path}\n" for path, digest in digests.items())


def render_chunk_list(artifact: Artifact, known: str = "") -> str:
    """Return the text of the SHA256SUMS beside the chunk files of an artifact.

    `known` is the present text; its lines about other files stay as they are.
    """
    name = PurePosixPath(artifact.path).name
    about = f"# {name}: "
    kept = [
        line
        for line in known.split("\n")
        if line and not line.startswith(about) and not line[66:].startswith(f"{name}.part-")
    ]
    ids = {"sha256": artifact.sha256, "Hub blob id": artifact.blob_id}
    pins = [f"{artifact.size} bytes", *(f"{id_} {value}" for id_, value in ids.items() if value)]
    digests = {PurePosixPath(p.part).name: p.sha256 for p in artifact.pieces}
    lines = "".join(f"{line}\n" for line in [*(kept or [_CHUNK_LIST]), about + ", ".join(pins)])
    return lines + render_sums(digests)


def parse_sums(text: str, where: str) -> dict[str, str]:
    """Return the digest of each path in a SHA256SUMS file; `where` is its name in messages.

    Raises WrongContent with the lines that are neither digests nor comments,
    or whose path leaves the folder.
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
            words = ("DIGEST  PATH, each path once", repr(line[:100]), "remove or correct the line")
            findings.append(Finding(Kind.MALFORMED, f"{where}:{number}", *words))
    if findings or not sums:
        raise WrongContent(f"{where} is not a SHA256SUMS file", findings[:20])
    return sums
