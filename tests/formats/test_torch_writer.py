"""What is written as torch.save writes it, against torch's own files."""

from __future__ import annotations

import zipfile

import pytest
import torch

from csm_weights.formats.tensor_index import ITEM_BITS
from csm_weights.formats.torch_names import DTYPES, STORAGE_NAMES
from csm_weights.formats.torch_writer import (
    CONTENTS,
    Stored,
    archive,
    pickle_state_dict,
)

TORCH = {word: getattr(torch, name.split()[1]) for name, word in DTYPES.items()}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, dict[str, bytes]]:
    """A file of torch with tensors of every dtype and kind, and its records by name."""
    state = {f"whole {word}": torch.zeros(2, 3, dtype=TORCH[word]) for word in STORAGE_NAMES}
    state |= {"scalar": torch.ones(()), "none": torch.ones(0, 4)}
    state["part"] = torch.ones(60, dtype=torch.bfloat16)[10:30].view(4, 5)
    path = tmp_path_factory.mktemp("torch") / "model.pt"
    torch.save(state, path)
    with zipfile.ZipFile(path) as file:
        names = sorted(file.infolist(), key=lambda info: info.header_offset)
        return path.read_bytes(), {i.filename.removeprefix("model/"): file.read(i) for i in names}


def test_the_pickle_is_torchs(records: tuple[bytes, dict[str, bytes]]) -> None:
    """Tensors of every dtype, an empty one and a part of a storage give the very bytes."""
    stored = {f"whole {word}": Stored(word, (2, 3)) for word in STORAGE_NAMES}
    stored |= {"scalar": Stored("F32", ()), "none": Stored("F32", (0, 4))}
    stored["part"] = Stored("BF16", (4, 5), offset=10, elements=60)
    assert pickle_state_dict(stored) == records[1]["data.pkl"]
    sizes = [len(records[1][f"data/{number}"]) for number in range(len(stored))]
    assert [tensor.nbytes for tensor in stored.values()] == sizes
    assert stored["whole C128"].nbytes == 6 * ITEM_BITS["C128"] // 8


def test_records_of_torch_make_its_file(records: tuple[bytes, dict[str, bytes]]) -> None:
    """Content in blocks of any size makes the same archive, of the size told before."""
    whole, contents = records
    blocks = {name: (len(raw), [raw[:5], raw[5:6], raw[6:]]) for name, raw in contents.items()}
    size, written = archive("model", blocks)
    assert size == len(whole)
    assert b"".join(written) == whole


def test_the_other_records_are_like_torchs(records: tuple[bytes, dict[str, bytes]]) -> None:
    """Byte order and version are its own, and the id has as many digits as one of its own."""
    theirs = {name: records[1][name] for name in CONTENTS}
    assert theirs | {".data/serialization_id": b""} == CONTENTS | {".data/serialization_id": b""}
    assert CONTENTS[".data/serialization_id"].isdigit()
    assert list(map(len, CONTENTS.values())) == list(map(len, theirs.values()))
