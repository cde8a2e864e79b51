"""The registry of weight formats, and the lists elsewhere that have to agree with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from csm_weights import formats
from csm_weights.errors import WrongContent
from csm_weights.formats import FORMATS, format_named, sniff
from csm_weights.formats.multipart import MultipartFile
from csm_weights.formats.tensor_index import Format, TensorIndex, TensorInfo
from csm_weights.formats.weights_file import open_weights
from csm_weights.manifest.pin import group_of
from csm_weights.manifest.types import WEIGHT_FORMATS
from tests.support import hostile

GOOD = {"safetensors": hostile.good_safetensors(), "torch-zip": hostile.good_checkpoint()}


def test_the_manifest_knows_every_format() -> None:
    """The formats that a manifest may name are those of the registry, and no others."""
    assert [one.name for one in FORMATS] == list(WEIGHT_FORMATS)
    assert [format_named(one.name) for one in FORMATS] == list(FORMATS)


def test_the_usual_file_of_a_format_is_chosen_by_its_word() -> None:
    """The word for --only, that lock and split give a file, is the one of its format."""
    assert [group_of(one.filename) for one in FORMATS] == [one.choice for one in FORMATS]
    assert [(one.choice, one.suffixes[0]) for one in FORMATS] == list(WEIGHT_FORMATS.values())
    assert all(one.filename.endswith(one.suffixes) for one in FORMATS)


@pytest.mark.parametrize("name", GOOD)
def test_content_outweighs_the_ending(name: str) -> None:
    """The first bytes decide; the ending does only if no format has such bytes."""
    for other in FORMATS:
        assert sniff(GOOD[name][:512], other.filename) is format_named(name)
        assert sniff(b"nothing known", other.filename) is other
    assert sniff(b"nothing known", "weights.onnx") is None
    assert sniff(b"nothing known", "pytorch_model.bin") is None


def test_content_of_no_format_is_named(tmp_path: Path) -> None:
    """A file that neither begins nor ends like weights is refused with its first bytes."""
    path = hostile.written(tmp_path, b"\x08\x07onnx", "model.onnx")
    with pytest.raises(WrongContent, match=r"not supported: .*safetensors or torch-zip.*onnx"):
        open_weights([path])


def test_a_format_is_added_with_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A third format in the registry is read from then on, by its content."""

    def read(source: Path | str | MultipartFile) -> TensorIndex:
        assert isinstance(source, MultipartFile)
        return TensorIndex({"w": TensorInfo("w", "U8", (4,), 4, (1,))}, source.size)

    third = Format("gguf", "gguf", "model.gguf", (".gguf",), lambda h: h[:4] == b"GGUF", read)
    monkeypatch.setattr(formats, "FORMATS", (*FORMATS, third))
    path = hostile.written(tmp_path, b"GGUF1234", "any")
    with open_weights([path]) as weights:
        assert (weights.format, list(weights.index.tensors)) == ("gguf", ["w"])
