"""A file of weights, found and read as data: in either format, whole or in its parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from csm_weights.errors import Finding, Kind, MissingInput, WrongContent, from_os_error
from csm_weights.formats.multipart import MultipartFile, find_chunk_files
from csm_weights.formats.tensor_index import TensorIndex, read_checkpoint, read_safetensors
from csm_weights.untrusted import Malformed

#: The weight files of a folder, in the order in which they are looked for, and
#: the folder for the parts of each below it, as the chunk repositories have them.
WEIGHT_FILES = {"model.safetensors": "chunks/safetensors", "ckpt.pt": "chunks/ckpt"}

#: How a zip begins. A safetensors header of so many bytes is over the reader's ceiling.
_ZIP = b"PK\x03\x04"


@dataclass(frozen=True)
class WeightsFile:
    """The tensors of one file of weights, and its bytes to read them from.

    `format` is the manifest's word: "safetensors" or "torch-zip".
    """

    source: MultipartFile
    table: TensorIndex
    format: str

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.source.close()


def open_weights(paths: Sequence[Path | str]) -> WeightsFile:
    """Opens a file, or its parts in order, and reads where each tensor lies.

    The format is told by the first bytes. Raises MissingInput, WrongContent.
    """
    try:
        source = MultipartFile(paths)
    except FileNotFoundError as error:
        raise missing(Path(str(error.filename)), "a file", "no such file") from None
    except OSError as error:
        raise from_os_error(error) from None
    except Malformed as error:
        finding = Finding(Kind.MALFORMED, str(paths[0]), error.expected, error.found)
        raise WrongContent("the weights cannot be read", [finding]) from None
    try:
        is_zip = source.read(0, len(_ZIP)) == _ZIP
        table = read_checkpoint(source) if is_zip else read_safetensors(source)
    except BaseException:
        source.close()
        raise
    return WeightsFile(source, table, "torch-zip" if is_zip else "safetensors")


def find_weights(path: Path) -> list[Path]:
    """The file of weights at `path`, or its parts in order.

    `path` is a file; or a folder with a weight file, or with the parts of
    one, or with the folders of a chunk repository. Raises MissingInput.
    """
    if not path.is_dir():
        if path.exists():
            return [path]
        raise missing(path, "a file or a folder", "neither")
    for name in WEIGHT_FILES:
        if (path / name).is_file():
            return [path / name]
    for name, below in WEIGHT_FILES.items():
        for folder in (path, path / below):
            if parts := find_chunk_files(folder, name):
                return parts
    raise missing(path, f"{' or '.join(WEIGHT_FILES)}, or parts", "neither")


def locate(path: str | Path | Sequence[Path]) -> tuple[list[Path], Path]:
    """The files of weights that `find_weights` finds, or as given, and the folder beside them.

    That folder, where the model's other files are, is the one given, or else
    that of the first file.
    """
    if not isinstance(path, str | Path):
        return list(path), path[0].parent
    path = Path(path)
    return find_weights(path), path if path.is_dir() else path.parent


def missing(path: Path, expected: str, found: str) -> MissingInput:
    """The error for weights that are not there."""
    finding = Finding(Kind.MISSING, str(path), expected, found, "inv weights")
    return MissingInput("the model's files are not here", [finding])
