"""Give a verified file its final name: the only module that does.

Order: the bytes are made durable, then renamed in one step, then the folder
is made durable, and the receipt goes last. Whatever stops between two of
these leaves either no file or a good file without a receipt, which the next
run verifies again.
"""

from dataclasses import replace
from pathlib import Path

from csm_weights.errors import Finding, WrongContent
from csm_weights.files import Fingerprint
from csm_weights.store.atomic import make_folder, stay_inside, sync, write_whole, writing
from csm_weights.store.receipts import Receipt, dump_receipt, receipt_path


def install(source: Path, directory: Path, receipt: Receipt) -> Receipt:
    """Rename a verified file to `directory/receipt.path` and write its receipt.

    Both must be on one file system. Returns the receipt as written, with the
    fingerprint of the file under its final name. Raises WrongContent for a
    file that was touched since `receipt.fingerprint` was taken, which keeps
    its name, and where a link leads out of `directory`.
    """
    final = directory / receipt.path
    sync(source)
    _require_unchanged(source, receipt)
    stay_inside(final.parent, directory)
    with writing(final):
        make_folder(final.parent)
        source.replace(final)
    try:
        _require_unchanged(final, receipt)
    except WrongContent:
        # Exchanged between the check and the rename: it may not keep the name.
        with writing(final):
            final.replace(source)
        raise
    for folder in dict.fromkeys((final.parent, source.parent)):
        sync(folder)
    return record(directory, receipt)


def record(directory: Path, receipt: Receipt) -> Receipt:
    """Write the receipt of a verified file that is in place; return it as written.

    Raises WrongContent when the file was touched since it was verified.
    """
    written = replace(receipt, fingerprint=_require_unchanged(directory / receipt.path, receipt))
    path = receipt_path(directory, receipt.path)
    stay_inside(path.parent, directory)
    write_whole(path, dump_receipt(written) + "\n")
    return written


def forget(directory: Path, path: str) -> None:
    """Remove the receipt of a file that has been moved away."""
    receipt_path(directory, path).unlink(missing_ok=True)


def _require_unchanged(path: Path, receipt: Receipt) -> Fingerprint:
    """Return the fingerprint of a file; raise WrongContent if it was touched."""
    now = Fingerprint.of(path.stat())
    if not now.same_bytes(receipt.fingerprint):
        message = f"{path} was changed while it was being installed"
        raise WrongContent(message, [Finding.changed(path)])
    return now
