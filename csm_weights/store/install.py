"""The one door out: a proven file gets its final name here, and nowhere else.

Order: the bytes are made durable, then renamed in one step, then the folder
is made durable, and the receipt goes last. Whatever stops between two of
these leaves either no file or a good file without a receipt, which the next
run proves again.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from csm_weights.errors import Finding, WrongContent
from csm_weights.files import Fingerprint
from csm_weights.store.atomic import make_folder, stay_inside, sync, write_whole, writing
from csm_weights.store.receipts import Receipt, dump_receipt, receipt_path


def install(proven: Path, directory: Path, receipt: Receipt) -> Receipt:
    """Renames `proven` to `directory/receipt.path` and records it.

    Both must be on one file system. `receipt.fingerprint` is that of the
    moment the bytes were proven: a file touched since is refused with
    WrongContent and keeps its unfinished name; so is a way there that a link
    leads out of `directory`. Returns the receipt as
    written, with the fingerprint of the file under its final name.
    """
    final = directory / receipt.path
    sync(proven)
    if not Fingerprint.of(proven.stat()).same_bytes(receipt.fingerprint):
        raise _changed(proven)
    stay_inside(final.parent, directory)
    with writing(final):
        make_folder(final.parent)
        proven.replace(final)
    if not Fingerprint.of(final.stat()).same_bytes(receipt.fingerprint):
        # Exchanged between the last look and the rename: it may not keep the name.
        with writing(final):
            final.replace(proven)
        raise _changed(proven)
    sync(final.parent)
    if proven.parent != final.parent:
        sync(proven.parent)
    return record(directory, receipt)


def record(directory: Path, receipt: Receipt) -> Receipt:
    """Writes the receipt of a proven file that is already in place.

    Raises WrongContent when the file was touched since it was proven.
    """
    final = directory / receipt.path
    now = Fingerprint.of(final.stat())
    if not now.same_bytes(receipt.fingerprint):
        raise _changed(final)
    written = replace(receipt, fingerprint=now)
    stay_inside(receipt_path(directory, receipt.path).parent, directory)
    write_whole(receipt_path(directory, receipt.path), dump_receipt(written) + "\n")
    return written


def forget(directory: Path, path: str) -> None:
    """Removes the receipt of a file that has been moved away."""
    receipt_path(directory, path).unlink(missing_ok=True)


def _changed(path: Path) -> WrongContent:
    finding = Finding.changed(path)
    return WrongContent(f"{path} was changed while it was being placed", [finding])
