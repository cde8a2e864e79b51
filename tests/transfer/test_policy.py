"""Places on this machine: only what they are known to have is taken from them."""

from __future__ import annotations

from typing import Any

import pytest

from csm_weights.manifest.types import Artifact, Piece
from csm_weights.transfer.policy import Candidate, PieceSource
from csm_weights.transfer.source import NotAvailable, PieceWriter, Source

PIECES = tuple(Piece(f"chunks/x-{i}", 10 * i, 10, "5" * 64) for i in range(2))
FILE = Artifact("x", "x", "opaque", 20, pieces=PIECES)


class Willing:
    """A source that would give anything."""

    def deliver(self, artifact: Artifact, piece: Piece, writer: PieceWriter) -> str:  # noqa: ARG002
        return piece.part


@pytest.mark.parametrize(
    ("source", "pieces", "is_given"),
    [(Willing(), {0: "x"}, True), (Willing(), {10: "y"}, False), (None, {0: "x"}, False)],
)
def test_a_candidate_gives_the_pieces_that_it_is_known_to_have(
    source: Source | None, pieces: dict[int, str], is_given: bool
) -> None:
    """What lies in the unfinished file is not read from anywhere."""
    writer: Any = None
    candidate = Candidate(PieceSource.KEPT, pieces, source)
    if is_given:
        assert candidate.deliver(FILE, PIECES[0], writer) == "chunks/x-0"
    else:
        with pytest.raises(NotAvailable):
            candidate.deliver(FILE, PIECES[0], writer)
