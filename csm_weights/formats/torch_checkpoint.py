"""The torch-zip format: what torch.save writes, read as data.

Since torch 1.6 that is a zip of a pickle and storages; before, five pickles and
then the storages. No pickle is executed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from io import BytesIO

from csm_weights.formats.multipart import MultipartFile, read_at
from csm_weights.formats.tensor_index import ITEM_BITS, Format, TensorIndex, TensorInfo, reading
from csm_weights.formats.torch_pickle import MAX_PICKLE, Pickle, View, read_pickle, tensors_of
from csm_weights.formats.torch_zip import LOCAL_SIGN, Record, read_content, read_records
from csm_weights.untrusted import Malformed, Unsupported, show

#: Ceiling of a small record, bytes, and what each of them may say.
MAX_NOTE = 40
_NOTES = {
    "version": rb"[0-9]{1,9}\n?",
    "byteorder": rb"little",
    ".format_version": rb"[0-9]{1,9}\n?",
    ".storage_alignment": rb"[0-9]{1,9}\n?",
    ".data/serialization_id": rb"[0-9]{1,40}",
}

#: How a pickle begins, and the first two values of a file from before torch 1.6.
PROTO = b"\x80"
MAGIC, LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001

#: Most bytes that views which repeat elements may have beyond their storages, in one file.
MAX_REPEATED = 1 << 30


def read_checkpoint(file: MultipartFile) -> TensorIndex:
    """Read the tensors of a torch checkpoint.

    A tensor in nested dicts or lists is named with the keys on its way. A view
    of a larger storage gets the offset and stride of the view. Raises
    WrongContent when the file is not laid out as torch.save lays it out, or
    torch.load(weights_only=True) would refuse its pickle.
    """
    tensors, size = {}, file.size
    with reading(file, "a torch checkpoint") as found:
        if file.read(0, 1) == PROTO:
            pickle, places = _read_legacy(file, size)
        else:
            records = read_records(file, size)
            for name, pattern in _NOTES.items():
                with found.collecting(name):
                    if record := records.get(name):
                        if record.size > MAX_NOTE:
                            raise Malformed(f"at most {MAX_NOTE} bytes", f"{record.size}")
                        text = read_content(file, record, MAX_NOTE)
                        if re.fullmatch(pattern, text) is None:
                            raise Malformed(f"text like {show(pattern)}", show(text))
            content = BytesIO(read_content(file, records["data.pkl"], MAX_PICKLE))
            pickle = read_pickle(content, "data.pkl")
            if content.read(1):
                raise Malformed("one object and nothing after it", "more", "data.pkl")
            if pickle.unread:
                raise pickle.unread
            places = {name[5:]: r for name, r in records.items() if name.startswith("data/")}
        views = tensors_of(pickle.value)
        for key in (key for key in places if key not in pickle.storages):
            found.add(Malformed("a storage of some tensor", "nothing refers to it", f"data/{key}"))
        spare = MAX_REPEATED
        for name, view in views.items():
            with found.collecting(show(name)):
                info = _locate(name, view, places)
                spare -= max(0, info.nbytes - view.storage.nbytes)
                if spare < 0:
                    expected = f"at most {MAX_REPEATED:,} bytes of repeated elements"
                    raise Unsupported(expected, "more")
                tensors[name] = info
    return TensorIndex(tensors, size)


#: How a zip of torch begins: the header of its first record, in the archive's one folder; and
#: a file from before torch 1.6: the magic number, in a frame from pickle protocol 4 on.
_HEAD = re.compile(
    re.escape(LOCAL_SIGN) + rb".{26}[^/\\]{1,255}/(data\.pkl|(data|code|constants)/)"
    rb"|\x80[\x02-\x05](\x95.{8})?\x8a\n" + re.escape(MAGIC.to_bytes(10, "little")),
    re.DOTALL,
)


def _is_torch(head: bytes) -> bool:
    """Check for a zip whose first record is one of torch's, or for the magic number before 1.6."""
    return _HEAD.match(head) is not None


FORMAT = Format(
    name="torch-zip",
    choice="ckpt",
    filename="ckpt.pt",
    suffixes=(".pt", ".pth", ".ckpt"),
    shared_suffixes=(".bin",),
    sniff=_is_torch,
    read_index=read_checkpoint,
)


def _read_legacy(file: MultipartFile, size: int) -> tuple[Pickle, dict[str, Record]]:
    """Read the pickles of a file from before torch 1.6, and find its storages by their keys."""
    stream = BytesIO(file.read(0, MAX_PICKLE))
    if read_pickle(stream, "pickle 1").value != MAGIC:
        raise Malformed("a torch checkpoint", "a pickle of something else")
    rest = [read_pickle(stream, f"pickle {n}") for n in range(2, 6)]
    for unread in (one.unread for one in rest if one.unread):
        raise unread
    version, system, saved, listed = rest
    if version.value != LEGACY_VERSION or not isinstance(system.value, dict):
        raise Malformed(f"version {LEGACY_VERSION} and a system", "others")
    if system.value.get("little_endian") is not True:
        raise Unsupported("numbers in little-endian order", "others")
    keys = listed.value if isinstance(listed.value, list) else []
    if len(keys) != len(saved.storages) or not all(isinstance(key, str) for key in keys):
        raise Malformed("the keys of all storages", "others", "pickle 5")
    places: dict[str, Record] = {}
    at = stream.tell()
    for key in keys:
        storage = saved.storages.get(key)
        if storage is None or key in places:
            raise Malformed("the keys of all storages", f"another: {show(key)}", "pickle 5")
        if int.from_bytes(read_at(file, at, 8), "little") != storage.elements:
            raise Malformed(f"{storage.elements} elements", "others", f"storage {show(key)}")
        places[key] = Record(f"storage {show(key)}", 0, storage.nbytes, at, at + 8)
        at += 8 + storage.nbytes
    if at != size:
        raise Malformed(f"storages up to the end, byte {size}", f"up to byte {at}")
    return saved, places


def _locate(name: str, view: View, places: Mapping[str, Record]) -> TensorInfo:
    """Find a view in the file; it must not leave its storage, nor the storage its record.

    A view without elements may begin anywhere, as for torch.
    """
    storage = view.storage
    record = places.get(storage.key)
    if record is None:
        raise Malformed(f"a record data/{show(storage.key)}", "none")
    if storage.nbytes != record.size:
        raise Malformed(f"{storage.nbytes} bytes in {record.name}", f"{record.size} bytes")
    item = ITEM_BITS[view.dtype] // 8
    steps = zip(view.shape, view.stride, strict=True)
    start = end = 0
    if math.prod(view.shape):
        start = view.offset
        end = 1 + start + sum((size - 1) * step for size, step in steps)
    if end * item > storage.nbytes:
        expected = f"a view of {storage.nbytes // item} elements"
        raise Malformed(expected, f"one up to element {end}")
    offset = record.data + start * item
    return TensorInfo(name, view.dtype, view.shape, offset, view.stride)
