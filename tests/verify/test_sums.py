"""SHA256SUMS files: what is written, what is read, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from csm_weights.commands import verify
from csm_weights.errors import Finding, Kind, WrongContent
from csm_weights.manifest.types import Artifact, Piece
from csm_weights.verify.sums import parse_sums, render_chunk_list
from tests.support.toy import Toy

A, B = "a" * 64, "b" * 64
PIECES = (Piece("chunks/m.bin.part-aa", 0, 6, A), Piece("chunks/m.bin.part-ab", 6, 4, B))
ARTIFACT = Artifact("sub/m.bin", "m", "opaque", 10, "5" * 64, "6" * 40, pieces=PIECES)
HEAD = (
    "# Chunk files. To check them: sha256sum -c SHA256SUMS, or shasum -c SHA256SUMS.\n"
    "# To join them: recombine.sh, which reads the comments on the joined files.\n"
)
PARTS = f"{A}  m.bin.part-aa\n{B}  m.bin.part-ab\n"
LIST = f"# m.bin: 10 bytes, sha256 {'5' * 64}, Hub blob id {'6' * 40}\n{PARTS}"
OTHERS = f"# mine\n{A}  m.bin\n{B} *n.bin.part-aa\n# m.bin.part-aa: 5 bytes\n"


@pytest.mark.parametrize(
    ("known", "text"),
    [
        ("", HEAD + LIST),
        ("\n\n", HEAD + LIST),
        (HEAD + LIST, HEAD + LIST),
        (f"# m.bin: 9 bytes\n{B} *m.bin.part-zz", HEAD + LIST),
        (OTHERS, OTHERS + LIST),
        (OTHERS.replace("\n", "\n\n") + LIST, OTHERS + LIST),
        (LIST + OTHERS, OTHERS + LIST),
    ],
)
def test_the_list_of_chunk_files_is_written_anew_and_other_lines_stay(
    known: str, text: str
) -> None:
    """The lines about the joined file and its parts are replaced, and empty ones go."""
    assert render_chunk_list(ARTIFACT, known) == text


def test_the_list_of_chunk_files_has_the_digests_that_are_known() -> None:
    """Those that the manifest does not pin are left out of the comment."""
    by_pieces = replace(ARTIFACT, sha256=None, blob_id=None)
    assert render_chunk_list(by_pieces) == f"{HEAD}# m.bin: 10 bytes\n{PARTS}"


@pytest.mark.parametrize(
    ("line", "read"),
    [
        (f"{A}  a b.bin", {"a b.bin": A}),
        (f"{A} *./a/b", {"a/b": A}),
        (f"SHA256 (a (b).bin) = {'A' * 64}", {"a (b).bin": A}),
        (f"{A}  x\n{'A' * 64}  x", {"x": A}),
    ],
)
def test_lines_of_all_kinds_are_read(line: str, read: dict[str, str]) -> None:
    """In text, binary and tag mode, in capitals too, and twice with the same digest."""
    assert parse_sums(f"# sums\n\n{line}\n{B}  last\n", "SUMS") == read | {"last": B}


def test_each_wrong_line_is_told_up_to_twenty() -> None:
    """Each with its number and its first hundred characters; right ones between them are not."""
    lines = [f"{A}  same", f"{B}  same", *(f"{n}" * 101 for n in range(1, 10)), "short"]
    with pytest.raises(WrongContent, match=r"^SUMS is not a SHA256SUMS file") as caught:
        parse_sums("\n".join([*lines, *["no sum"] * 11]), "SUMS")
    shown = [f"{B}  same", *(f"{n}" * 100 for n in range(1, 10)), "short", *["no sum"] * 9]
    assert caught.value.findings == tuple(
        Finding(
            Kind.MALFORMED,
            f"SUMS:{number}",
            "DIGEST  PATH, each path once",
            repr(line),
            "remove or correct the line",
        )
        for number, line in enumerate(shown, start=2)
    )


def test_a_list_of_sums_is_a_file_of_at_most_64_mib(toy: Toy) -> None:
    """Whatever else is in its place is not read, and the message says what may be."""
    with pytest.raises(WrongContent, match="a regular file of at most 67,108,864 bytes, found"):
        verify.verify(toy.request(), sums=str(toy.root))
