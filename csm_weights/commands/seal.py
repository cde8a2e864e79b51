"""Seal the installed files, and renew their receipts."""

from dataclasses import replace

from csm_weights.errors import Finding, WrongContent
from csm_weights.files import Fingerprint
from csm_weights.pipeline.request import Request
from csm_weights.pipeline.session import Outcome, Session, begin, gate_error, now
from csm_weights.progress import Progress, label_for
from csm_weights.store import install
from csm_weights.store.inspect import ArtifactState
from csm_weights.store.lock import locked
from csm_weights.verify.seal import Sealed, seal


def seal_placed(request: Request, outcome: Outcome) -> Outcome:
    """Seal what a command has installed; a second time there is nothing to do.

    Files that failed verification are left as they are. A smoke test that failed
    or could not run changes nothing of that: it says nothing against the bytes.
    Raises WrongContent, or NoSpace where a file cannot be sealed.
    """
    if gate_error(outcome.results):
        return outcome
    only = tuple(item.artifact.path for item in outcome.state.artifacts)
    run = begin(replace(request, only=only))
    run.paths = outcome.state.paths
    with locked(run.paths, with_destination=True), Progress(label_for("sealing", only)):
        sealed = tuple(_seal(run, item) for item in run.inspect().artifacts)
    return replace(outcome, state=run.inspect(), sealed=sealed)


def _seal(run: Session, item: ArtifactState) -> Sealed:
    """Seal one file and renew its receipt at once, so that a kill costs one hashing at most."""
    receipt = item.installed.valid_receipt
    if receipt is None:
        finding = Finding.edited(item.installed.path, str(item.installed.state))
        raise WrongContent("only verified files are sealed; run the same command again", [finding])
    done = seal(run.paths.destination, receipt)
    sealed = Fingerprint.of(item.installed.path.stat())
    if sealed == receipt.fingerprint:
        return done
    if not sealed.same_bytes(receipt.fingerprint):
        # The kernel has set the time of writing as it froze the file: hash what it froze.
        file = next(i.installed for i in run.inspect().artifacts if i.artifact == item.artifact)
        (verified,) = run.verify([(item.artifact, file)])
        if verified is None or verified.sha256 != receipt.sha256:
            found = run.known_bad.get(file.path) or Finding.edited(file.path)
            raise WrongContent("a file was changed while it was being sealed", [found])
        receipt = replace(receipt, fingerprint=verified.fingerprint, verified_at=now())
    install.record(run.paths.destination, receipt)
    return done
