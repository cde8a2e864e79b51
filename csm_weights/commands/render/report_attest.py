"""What `inv attest` wrote, as text for a person and JSON for a machine. Pure: prints nothing."""

from __future__ import annotations

from csm_weights.commands.attest import Attesting
from csm_weights.commands.render.report import dump, table
from csm_weights.errors import printable


def attesting_text(done: Attesting) -> str:
    """The subjects with their digests, and who vouches for them."""
    blocks = [printable(f"{done.model} -> {done.file}")]
    blocks.append(table(("subject", "sha256"), list(done.subjects.items())))
    if done.new_keys:
        private, public = done.new_keys
        blocks.append(printable(f"new key: {private} (keep it secret), {public} (hand it out)"))
    if done.signer:
        blocks.append(f"OK: attested, signed by {done.signer.scheme} key {done.signer.keyid[:16]}")
    else:
        blocks.append("OK: attested, but NOBODY SIGNED IT: --key or --new-key signs it")
    return "\n\n".join(blocks)


def attesting_json(done: Attesting) -> str:
    """`inv attest --json`."""
    return dump(
        model=done.model,
        ok=True,
        exit_code=0,
        attestation=str(done.file),
        subjects=dict(done.subjects),
        key=done.signer.keyid if done.signer else None,
        scheme=done.signer.scheme if done.signer else None,
        new_keys=[str(path) for path in done.new_keys],
    )
