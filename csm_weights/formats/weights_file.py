"""A file of weights in either format, whole or in chunk files: find it, open it, read its index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from csm_weights.errors import Finding, Kind, MissingInput, WrongContent, from_os_error
from csm_weights.formats import FORMATS, sniff
from csm_weights.formats.multipart import MultipartFile, find_chunk_files
from csm_weights.formats.tensor_index import HEAD, TensorIndex
from csm_weights.untrusted import Malformed, show

#: The weight files of a folder, in the order of preference.
WEIGHT_FILES = tuple(one.filename for one in FORMATS)


@dataclass(frozen=True)
class WeightsFile:
    """The tensors of one file of weights, and its bytes to read them from.

    `format` is the manifest's word: "safetensors" or "torch-zip".
    """

    source: MultipartFile
    index: TensorIndex
    format: str

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.source.close()


def open_weights(paths: Sequence[Path | str]) -> WeightsFile:
    """Open a file, or its chunk files in order, and read where each tensor lies.

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
        head = source.read(0, HEAD)
        found = sniff(head, source.paths[0].name.partition(".part-")[0])
        if found is None:
            expected = f"weights as {' or '.join(one.name for one in FORMATS)}"
            words = (expected, f"a file that starts {show(head[:16])}")
            finding = Finding(Kind.UNSUPPORTED, source.where, *words)
            raise WrongContent("the weights cannot be read", [finding])
        return WeightsFile(source, found.read_index(source), found.name)
    except BaseException:
        source.close()
        raise


def find_weights(path: Path) -> list[Path]:
    """Find the file of weights at `path`, or its chunk files in order.

    `path` is a file; or a folder with a weight file, or with the chunk files
    of one, or with the folders of a chunk repository. Raises MissingInput.
    """
    if not path.is_dir():
        if path.exists():
            return [path]
        raise missing(path, "a file or a folder", "neither")
    for name in WEIGHT_FILES:
        if (path / name).is_file():
            return [path / name]
    for one in FORMATS:
        for folder in (path, path / "chunks" / one.choice):
            if parts := find_chunk_files(folder, one.filename):
                return parts
    raise missing(path, f"{' or '.join(WEIGHT_FILES)}, or chunk files of one", "neither")


def locate(path: str | Path | Sequence[Path]) -> tuple[list[Path], Path]:
    """Find the files of weights at `path`, or take those given, and name the folder beside them.

    That folder, where the model's other files are, is the one given, or else
    that of the first file.
    """
    if not isinstance(path, str | Path):
        return list(path), path[0].parent
    path = Path(path)
    return find_weights(path), path if path.is_dir() else path.parent


def missing(path: Path, expected: str, found: str) -> MissingInput:
    """Return the error for weights that are not there."""
    finding = Finding(Kind.MISSING, str(path), expected, found, "inv weights")
    return MissingInput("the model's files are not here", [finding])
