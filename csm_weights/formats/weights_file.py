"""Find the files of some weights, and open them: a file, its chunk files, or shards.

All that is named like a shard of the model, or is listed in its index, is read
or refused: a comparison that leaves a file out would call different models equal.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from csm_weights.errors import (
    GET_AGAIN,
    Finding,
    Kind,
    MissingInput,
    UsageError,
    WrongContent,
    from_os_error,
    printable,
)
from csm_weights.formats import FORMATS, format_named, sniff
from csm_weights.formats.json_stream import JsonStream
from csm_weights.formats.multipart import MultipartFile, find_chunk_files
from csm_weights.formats.tensor_index import HEAD, MAX_FINDINGS, TensorIndex
from csm_weights.untrusted import Malformed, show

#: The weight files of a folder, in the order of preference.
WEIGHT_FILES = tuple(one.filename for one in FORMATS)

MAX_SHARDS = 200

_SUFFIXES = "|".join(
    re.escape(suffix) for one in FORMATS for suffix in (*one.suffixes, *one.shared_suffixes)
)
_FLAGS = re.DOTALL | re.IGNORECASE
_SHARD = re.compile(rf"(.+)-([0-9]{{1,6}})-of-([0-9]{{1,6}})({_SUFFIXES})", _FLAGS)
_INDEX = re.compile(rf"(.+)({_SUFFIXES})\.index\.json", _FLAGS)

#: The files of one model, each as its chunk files in order; one path where it is whole.
Files = Sequence[Sequence[Path]]


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


def open_weights(paths: Sequence[Path | str], format_: str = "") -> WeightsFile:
    """Open a file, or its chunk files in order, and read where each tensor lies.

    The format is told by the first bytes, unless `format_` names it. Raises
    MissingInput, WrongContent.
    """
    title = "the weights cannot be read"
    try:
        with ExitStack() as opened:
            source = opened.enter_context(MultipartFile(paths))
            head = source.read(0, HEAD)
            name = source.paths[0].name.partition(".part-")[0]
            found = format_named(format_) if format_ else sniff(head, name)
            if found is None:
                expected = f"weights as {' or '.join(one.name for one in FORMATS)}"
                words = (expected, f"a file that starts {show(head[:16])}")
                finding = Finding(Kind.UNSUPPORTED, source.where, *words)
                raise WrongContent(title, [finding])
            weights = WeightsFile(source, found.read_index(source), found.name)
            opened.pop_all()
            return weights
    except FileNotFoundError as error:
        raise missing(Path(str(error.filename)), "a file", "no such file") from None
    except OSError as error:
        raise from_os_error(error) from None
    except Malformed as error:
        finding = Finding(Kind.MALFORMED, error.at, error.expected, error.found, GET_AGAIN)
        raise WrongContent(title, [finding]) from None


def locate(path: str | Path | Sequence[Path]) -> tuple[Files, Path]:
    """Find the files of weights at `path`, or take those given, and name the folder beside them.

    Several paths are shards, by their names, or else the chunk files of one
    file. The folder, where the model's other files are, is the one given, or
    else that of the first file.
    """
    if not isinstance(path, str | Path):
        are_shards = all(is_shard(one.name) for one in path)
        return [[one] for one in path] if are_shards else [list(path)], path[0].parent
    path = Path(path)
    return find(path), path if path.is_dir() else path.parent


def is_shard(name: str) -> bool:
    """Return whether a file is one of several that hold a model, by its name."""
    return _SHARD.fullmatch(name) is not None


def missing(path: Path, expected: str, found: str, mend: str = "inv weights") -> MissingInput:
    """Return the error for weights that are not there."""
    finding = Finding(Kind.MISSING, str(path), expected, found, mend)
    return MissingInput("there are no weights at this path", [finding])


def find(path: Path) -> Files:
    """Find the files that a path means.

    `path` is a file of weights, or what it would be called if it were not in
    chunk files; any of these; a shard, or the index of shards; a folder with
    any of these, or a chunk repository. A file that an index beside it lists
    means all that the index lists. Raises MissingInput, with every shard that
    is not there, WrongContent for shards that do not make up one model, and
    UsageError for a folder of several models.
    """
    if match := _INDEX.fullmatch(path.name):
        if not path.exists():
            raise missing(path, "an index of shards", "no such file", "check the path")
        return [[shard] for shard in _listed(path, match, _names(path, match[2]))]
    if match := _SHARD.fullmatch(path.name):
        return _numbered(path.parent, match)
    whole = path.parent / path.name.rpartition(".part-")[0] if ".part-" in path.name else path
    if (whole != path or not path.exists()) and (
        parts := find_chunk_files(path.parent, whole.name)
    ):
        return [parts]
    if not path.is_dir():
        if path.exists():
            return [[one] for one in _with_listed([path])]
        raise missing(path, "a file or a folder", "no such file", "check the path")
    # pytorch_model.bin is transformers' name
    whole_files = [path / name for name in (*WEIGHT_FILES, "pytorch_model.bin")]
    places = [(f, one.filename) for one in FORMATS for f in (path, path / "chunks" / one.choice)]
    found = [[file] for file in whole_files if file.is_file()]
    found += [parts for place in places if (parts := find_chunk_files(*place))]
    # one shard of each set, by the set's name, total and ending
    sets = {_set_of(match): match for match in _matches(path)}
    indexes = _matches(path, _INDEX)
    if found:
        first = found[0][0]
        stem, name = first.name.partition(".")[0].lower(), first.name.partition(".part-")[0]
        files = [[one] for one in _with_listed([path / name])]
        if files != [[path / name]]:
            return files
        clash = [match[0] for (stem_, _, _), match in sets.items() if stem_ == stem]
        for index in indexes:
            if (index[1] + index[2]).lower() == name.lower():
                clash += [index[0]] if name not in _names(path / index[0], index[2]) else []
        if clash:
            words = f"{path} has {show(first.name)} and {show(clash[0])}: name one of them"
            raise UsageError(printable(words))
        return found[:1]
    if not sets and len(indexes) == 1:
        return find(path / indexes[0][0])
    if not sets and not indexes:
        raise missing(path, f"{' or '.join(WEIGHT_FILES)}, or chunk files of one", "none of them")
    if len(sets) != 1:
        names = ", ".join(sorted(show(match[0]) for match in sets.values() or indexes))
        raise UsageError(printable(f"{path} has the shards of several models: {names}"))
    return _numbered(path, next(iter(sets.values())))


def _numbered(folder: Path, match: re.Match[str]) -> Files:
    """Find the shards of a set, of which the match is one: numbered from 1, or all from 0."""
    name, digits, total, suffix = match[1], len(match[2]), int(match[3]), match[4]
    _check_count(folder / match[0], total)
    found: dict[int, Path] = {}
    strays = []
    for other in _matches(folder):
        if _set_of(other) == _set_of(match):
            path = folder / other[0]
            if found.setdefault(int(other[2]), path) != path:
                strays.append(path)
    first = 0 if 0 in found and total not in found else 1
    numbers = range(first, first + total)
    _require(found.get(n, folder / f"{name}-{n:0{digits}}-of-{match[3]}{suffix}") for n in numbers)
    strays += [path for number, path in found.items() if number not in numbers]
    _refuse(strays, f"the numbers {first} to {first + total - 1}, each once")
    shards = [found[number] for number in numbers]
    return [[shard] for shard in _with_listed(shards, name)]


def _with_listed(files: list[Path], stem: str = "") -> list[Path]:
    """Return all files that an index beside these lists together with one of them.

    An index of the set of shards called `stem` must list them all.
    """
    folder, mine = files[0].parent, {file.name for file in files}
    for match in _matches(folder, _INDEX):
        index = folder / match[0]
        if not files[0].name.lower().endswith(match[2].lower()):
            continue
        names = _names(index, match[2])
        if match[1].lower() == stem.lower() or mine & names:
            listed = _listed(index, match, names)
            _refuse(set(files) - set(listed), f"a file that {index} lists")
            files, mine = listed, {file.name for file in listed}
    return files


def _names(index: Path, suffix: str) -> set[str]:
    """Read the names of the files that an index lists: beside it, and nowhere else."""
    names: set[str] = set()
    try:
        with MultipartFile([index]) as file:
            stream = JsonStream(file.read)
            for key in stream.read_keys():
                if key != "weight_map":
                    stream.read_value()
                    continue
                for _ in stream.read_keys():
                    name = stream.read_value()
                    is_name = isinstance(name, str) and name.lower().endswith(suffix.lower())
                    if not is_name or "/" in name or "\0" in name:
                        raise ValueError(f"the file {show(name)}")
                    names.add(name)
                    _check_count(index, len(names))
            stream.finish()
    except OSError as error:
        raise from_os_error(error) from None
    except (ValueError, RecursionError, Malformed) as error:
        expected = f"a weight_map from tensors to files *{suffix} beside it"
        found = error.found if isinstance(error, Malformed) else show(str(error))
        finding = Finding(Kind.MALFORMED, str(index), expected, found, GET_AGAIN)
        raise WrongContent("the index of the shards cannot be used", [finding]) from None
    _check_count(index, len(names))
    return names


def _listed(index: Path, match: re.Match[str], names: set[str]) -> list[Path]:
    """Find the files whose names an index lists; `match` is that of its own name."""
    _require(index.parent / name for name in names)
    own = (match[1].lower(), match[2].lower())
    shards = {m[0] for m in _matches(index.parent) if (m[1].lower(), m[4].lower()) == own}
    _refuse([index.parent / name for name in shards - names], f"a file that {index} lists")
    return [index.parent / name for name in sorted(names)]


def _matches(folder: Path, pattern: re.Pattern[str] = _SHARD) -> list[re.Match[str]]:
    """Return what in a folder is named like a shard, or as another pattern says, by name."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return [match for name in names if (match := pattern.fullmatch(name))]


def _set_of(shard: re.Match[str]) -> tuple[str, int, str]:
    """Return the name, total and ending that all shards of a set have, in small letters."""
    return shard[1].lower(), int(shard[3]), shard[4].lower()


def _check_count(where: Path, count: int) -> None:
    if not 1 <= count <= MAX_SHARDS:
        expected = f"1 to {MAX_SHARDS} shards"
        finding = Finding(Kind.MALFORMED, str(where), expected, str(count), GET_AGAIN)
        raise WrongContent("the number of shards makes no sense", [finding])


def _require(paths: Iterable[Path]) -> None:
    wanted = sorted(paths)
    lost = [path for path in wanted if not path.exists()]
    if lost:
        findings = [Finding.missing(path, f"one of {len(wanted)} shards") for path in lost]
        raise MissingInput("not all shards are here", findings)


def _refuse(paths: Iterable[Path], expected: str) -> None:
    """Raise WrongContent for files that are named like shards of a model and do not fit it."""
    findings = [
        Finding(Kind.MALFORMED, str(p), expected, "another shard", "move it away")
        for p in sorted(paths)
    ]
    if findings:
        raise WrongContent("the shards do not fit together", findings[:MAX_FINDINGS])
