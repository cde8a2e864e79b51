"""Which files a path to weights means: whole files, chunk files, shards and their index."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from csm_weights.errors import (
    GET_AGAIN,
    CsmWeightsError,
    Finding,
    Kind,
    MissingInput,
    UsageError,
    WrongContent,
)
from csm_weights.formats.weights_file import find, is_shard, locate, open_weights
from tests.support import hostile

Fill = Callable[..., Path]


def index_of(*names: str) -> bytes:
    return json.dumps({"weight_map": {f"t{n}": name for n, name in enumerate(names)}}).encode()


@pytest.fixture
def fill(tmp_path: Path) -> Fill:
    """Makes a folder of empty files, of those whose content is given, and of folders."""

    def make(names: str = "", **contents: bytes) -> Path:
        folder = tmp_path / "some"
        for name in names.split():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir() if name.endswith("/") else path.touch()
        for name, content in contents.items():
            folder.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        return folder

    return make


def found(path: Path, folder: Path) -> str:
    """Return what is found, in words: chunk files joined by `+`."""
    return " ".join("+".join(str(p.relative_to(folder)) for p in one) for one in find(path))


CHUNKS = "model.safetensors.part-aa model.safetensors.part-ab"


@pytest.mark.parametrize(
    ("names", "path", "expected"),
    [
        # a file, or what it would be called
        ("w.pt", "w.pt", "w.pt"),
        ("w.pt w.pt.part-aa", "w.pt", "w.pt"),
        ("w.pt.part-ab w.pt.part-aa", "w.pt", "w.pt.part-aa+w.pt.part-ab"),
        ("w.pt.part-ab w.pt.part-aa", "w.pt.part-ab", "w.pt.part-aa+w.pt.part-ab"),
        ("w.pt w.pt.part-aa", "w.pt.part-aa", "w.pt.part-aa"),
        ("w.pt.part-aa", "w.pt.part-zz", "w.pt.part-aa"),
        ("w.pt.part-1", "w.pt.part-1", "w.pt.part-1"),
        ("a.part-x.part-aa a.part-aa", "a.part-x.part-aa", "a.part-x.part-aa"),
        # a folder
        ("pytorch_model.bin ckpt.pt model.safetensors", "", "model.safetensors"),
        ("pytorch_model.bin ckpt.pt other.safetensors", "", "ckpt.pt"),
        ("pytorch_model.bin other.safetensors", "", "pytorch_model.bin"),
        (f"ckpt.pt {CHUNKS}", "", "ckpt.pt"),
        ("model.safetensors/ ckpt.pt", "", "ckpt.pt"),
        (f"{CHUNKS} ckpt.pt.part-aa", "", CHUNKS.replace(" ", "+")),
        ("ckpt.pt.part-aa chunks/ckpt/ckpt.pt.part-ab", "", "ckpt.pt.part-aa"),
        ("chunks/ckpt/ckpt.pt.part-aa", "", "chunks/ckpt/ckpt.pt.part-aa"),
        (
            "chunks/ckpt/ckpt.pt.part-aa chunks/safetensors/model.safetensors.part-aa",
            "",
            "chunks/safetensors/model.safetensors.part-aa",
        ),
        ("chunks/ckpt/model.safetensors.part-aa ckpt.pt", "", "ckpt.pt"),
        # shards
        ("m-1-of-2.pt m-2-of-2.pt", "m-2-of-2.pt", "m-1-of-2.pt m-2-of-2.pt"),
        ("m-0-of-2.pt m-1-of-2.pt", "", "m-0-of-2.pt m-1-of-2.pt"),
        ("m-0-of-1.bin", "", "m-0-of-1.bin"),
        ("m-1-of-1.pth", "", "m-1-of-1.pth"),
        ("m-10-of-010.pt M-9-of-10.PT", "m-9-of-10.pt", None),
        ("m-01-of-02.pt M-2-of-002.PT", "", "m-01-of-02.pt M-2-of-002.PT"),
        ("m-1-of-1.pt m-1-of-1.onnx m-1-of-1.json", "", "m-1-of-1.pt"),
        ("a-1-of-1.pt m-1-of-1.pt z-1-of-1.pt m-1-of-2.pt", "m-1-of-1.pt", "m-1-of-1.pt"),
        ("m-1-of-1.pt model.safetensors", "", "model.safetensors"),
        ("model.x-1-of-1.pt model.safetensors", "", "model.safetensors"),
        ("model.safetensors ckpt.pt ckpt-1-of-1.pt", "", "model.safetensors"),
    ],
)
def test_a_path_means_these_files(names: str, path: str, expected: str | None, fill: Fill) -> None:
    """Whole files come before chunk files, and those before shards of another name."""
    folder = fill(names)
    if expected is None:
        with pytest.raises(MissingInput):
            find(folder / path)
    else:
        assert found(folder / path, folder) == expected


@pytest.mark.parametrize(
    ("names", "indexes", "path", "expected"),
    [
        # named by its index
        ("b.pt a.pt c.pt", {"x.pt": "b.pt a.pt"}, "x.pt.index.json", "a.pt b.pt"),
        ("b.pt a.pt c.pt", {"x.pt": "b.pt a.pt"}, "b.pt", "a.pt b.pt"),
        ("b.pt a.pt c.pt", {"x.pt": "b.pt a.pt"}, "c.pt", "c.pt"),
        ("b.pt a.pt c.pt", {"x.pt": "b.pt a.pt"}, "", "a.pt b.pt"),
        ("b.PT a.pt", {"x.Pt": "b.PT a.pt"}, "b.PT", "a.pt b.PT"),
        # a file of a folder, and the index of its name
        ("ckpt.pt more.pt", {"ckpt.pt": "ckpt.pt more.pt"}, "", "ckpt.pt more.pt"),
        ("ckpt.pt more.pt", {"other.pt": "ckpt.pt more.pt"}, "", "ckpt.pt more.pt"),
        ("ckpt.pt a.pt", {"ckpt.pt": "ckpt.pt a.pt"}, "", "a.pt ckpt.pt"),
        ("ckpt.pt", {"ckpt.pt": "ckpt.pt"}, "", "ckpt.pt"),
        ("ckpt.pt.part-aa", {"ckpt.pt": "ckpt.pt"}, "", None),
        ("ckpt.pt more.pt", {"other.pt": "more.pt"}, "", "ckpt.pt"),
        ("ckpt.pt more.pt", {"a.pt": "more.pt"}, "", "ckpt.pt"),
        ("ckpt.pt", {"model.safetensors": "ckpt.safetensors"}, "", "ckpt.pt"),
        ("ckpt.pt ckpt-1-of-1.pt", {"ckpt.pt": "ckpt.pt ckpt-1-of-1.pt"}, "",
         "ckpt-1-of-1.pt ckpt.pt"),
        # one of two indexes lists a file
        ("a.pt b.pt c.pt", {"x.pt": "a.pt", "y.pt": "b.pt c.pt"}, "c.pt", "b.pt c.pt"),
        ("a.pt b.pt", {"x.pt": "a.pt b.pt", "y.pt": "a.pt b.pt"}, "a.pt", "a.pt b.pt"),
        ("a.pt b.pt", {"a.bin": "a.bin", "x.pt": "a.pt b.pt"}, "a.pt", "a.pt b.pt"),
        # shards and their index
        ("m-1-of-2.pt m-2-of-2.pt", {"m.pt": "m-1-of-2.pt m-2-of-2.pt"}, "",
         "m-1-of-2.pt m-2-of-2.pt"),
        ("m-1-of-1.pt", {"M.PT": "m-1-of-1.pt x.pt"}, "", None),
        ("m-1-of-1.pt x.pt", {"M.PT": "m-1-of-1.pt x.pt"}, "", "m-1-of-1.pt x.pt"),
        ("m-1-of-1.pt", {"m.safetensors": "other.safetensors"}, "", "m-1-of-1.pt"),
        ("m-1-of-1.pt o.pt", {"a.pt": "o.pt", "n.pt": "o.pt"}, "", "m-1-of-1.pt"),
        ("a-1-of-1.pt m-1-of-1.pt z-1-of-1.pt", {"m.pt": "m-1-of-1.pt"}, "m.pt.index.json",
         "m-1-of-1.pt"),
    ],
)  # fmt: skip
def test_an_index_means_all_that_it_lists(
    names: str, indexes: dict[str, str], path: str, expected: str | None, fill: Fill
) -> None:
    """One beside a file counts where it lists the file, or is that of its set of shards."""
    listed = {f"{n}.index.json": index_of(*value.split()) for n, value in indexes.items()}
    folder = fill(names, **listed)
    if expected is None:
        with pytest.raises(MissingInput):
            find(folder / path)
    else:
        assert found(folder / path, folder) == expected


NOTHING = "model.safetensors or ckpt.pt, or chunk files of one"
NUMBERS = "the numbers 1 to 2, each once"


@pytest.mark.parametrize(
    ("names", "indexes", "path", "findings"),
    [
        # what is not there
        ("w.pt", {}, "v.pt", ["v.pt: a file or a folder: no such file: check the path"]),
        ("w.pt", {}, "x.pt.index.json", [
            "x.pt.index.json: an index of shards: no such file: check the path"
        ]),
        ("w.pt", {}, "", [f"{NOTHING}: none of them: inv weights"]),
        ("m-1-of-3.pt", {}, "m-1-of-3.pt", [
            "m-2-of-3.pt: one of 3 shards: no such file: ",
            "m-3-of-3.pt: one of 3 shards: no such file: ",
        ]),
        ("m-0-of-002.pt", {}, "", ["m-1-of-002.pt: one of 2 shards: no such file: "]),
        ("", {}, "m-003-of-3.PT", [
            f"m-00{n}-of-3.PT: one of 3 shards: no such file: " for n in (1, 2, 3)
        ]),
        ("b.pt", {"x.pt": "b.pt c.pt a.pt"}, "b.pt", [
            "a.pt: one of 3 shards: no such file: ",
            "c.pt: one of 3 shards: no such file: ",
        ]),
        # shards that do not fit together
        ("m-1-of-2.pt m-2-of-2.pt m-3-of-2.pt m-0-of-2.pt", {}, "", [
            f"m-0-of-2.pt: {NUMBERS}: another shard: move it away",
            f"m-3-of-2.pt: {NUMBERS}: another shard: move it away",
        ]),
        ("m-1-of-2.pt m-2-of-2.pt m-02-of-2.pt", {}, "m-1-of-2.pt", [
            f"m-2-of-2.pt: {NUMBERS}: another shard: move it away"
        ]),
        ("m-0-of-2.pt m-1-of-2.pt m-3-of-2.pt", {}, "", [
            "m-3-of-2.pt: the numbers 0 to 1, each once: another shard: move it away"
        ]),
        ("m-1-of-1.pt x.pt", {"m.pt": "x.pt"}, "", [
            "m-1-of-1.pt: a file that m.pt.index.json lists: another shard: move it away"
        ]),
        ("m-1-of-1.pt m-2-of-3.PT x.pt", {"M.pt": "x.pt"}, "M.pt.index.json", [
            f"{n}: a file that M.pt.index.json lists: another shard: move it away"
            for n in ("m-1-of-1.pt", "m-2-of-3.PT")
        ]),
        ("a.pt b.pt c.pt", {"x.pt": "a.pt b.pt", "y.pt": "b.pt c.pt"}, "a.pt", [
            "a.pt: a file that y.pt.index.json lists: another shard: move it away"
        ]),
        # more than there can be
        ("", {}, "m-1-of-0.pt", [f"m-1-of-0.pt: 1 to 200 shards: 0: {GET_AGAIN}"]),
        ("", {}, "m-1-of-201.pt", [f"m-1-of-201.pt: 1 to 200 shards: 201: {GET_AGAIN}"]),
        ("", {"x.pt": ""}, "x.pt.index.json", [
            f"x.pt.index.json: 1 to 200 shards: 0: {GET_AGAIN}"
        ]),
        ("", {"x.pt": " ".join(f"{n}.pt" for n in range(300))}, "x.pt.index.json", [
            f"x.pt.index.json: 1 to 200 shards: 201: {GET_AGAIN}"
        ]),
    ],
)  # fmt: skip
def test_what_is_missing_or_does_not_fit_is_named(
    names: str, indexes: dict[str, str], path: str, findings: list[str], fill: Fill
) -> None:
    """Each file is a finding, in the order of names."""
    listed = {f"{n}.index.json": index_of(*value.split()) for n, value in indexes.items()}
    folder = fill(names + " z.txt", **listed)
    with pytest.raises((MissingInput, WrongContent)) as caught:
        find(folder / path)
    told = [f"{f.where}: {f.expected}: {f.found}: {f.help}" for f in caught.value.findings]
    assert [line.replace(f"{folder}: ", "").replace(f"{folder}/", "") for line in told] == findings
    kind = Kind.MISSING if isinstance(caught.value, MissingInput) else Kind.MALFORMED
    assert {finding.kind for finding in caught.value.findings} == {kind}


@pytest.mark.parametrize("total", [1, 200])
def test_a_set_has_at_most_200_shards(total: int, fill: Fill) -> None:
    """So has an index."""
    names = [f"m-{n:03}-of-{total}.pt" for n in range(1, total + 1)]
    folder = fill(" ".join(names))
    assert found(folder, folder).split() == names
    (folder / "x.pt.index.json").write_bytes(index_of(*names))
    assert found(folder / "x.pt.index.json", folder).split() == names


def test_at_most_20_files_that_do_not_fit_are_named(fill: Fill) -> None:
    folder = fill("m-1-of-1.pt " + " ".join(f"m-{n}-of-1.pt" for n in range(2, 40)))
    with pytest.raises(WrongContent, match="do not fit together") as caught:
        find(folder)
    assert len(caught.value.findings) == 20


@pytest.mark.parametrize(
    ("names", "indexes", "said"),
    [
        ("ckpt.pt ckpt-1-of-1.pt", {}, "has ckpt.pt and ckpt-1-of-1.pt: name one of them"),
        ("ckpt.pt CKPT-2-of-1.bin", {}, "has ckpt.pt and CKPT-2-of-1.bin: name one of them"),
        (
            "ckpt.pt ckpt-1-of-1.pt ckpt-1-of-1.bin a.pt",
            {"ckpt.pt": "a.pt"},
            "has ckpt.pt and ckpt-1-of-1.bin: name one of them",
        ),
        ("ckpt.pt a.pt", {"CKPT.PT": "a.pt"}, "has ckpt.pt and CKPT.PT.index.json: name one"),
        (
            "ckpt.pt.part-aa ckpt.pt.part-ab ckpt-1-of-1.pt",
            {},
            "has ckpt.pt.part-aa and ckpt-1-of-1.pt: name one of them",
        ),
        ("a-1-of-1.pt b-1-of-1.pt", {}, "of several models: a-1-of-1.pt, b-1-of-1.pt"),
        ("a-1-of-1.pt a-1-of-2.pt", {}, "of several models: a-1-of-1.pt, a-1-of-2.pt"),
        ("a-1-of-1.pt a-1-of-1.bin", {}, "of several models: a-1-of-1.bin, a-1-of-1.pt"),
        (
            "x.pt",
            {"b.pt": "x.pt", "a.pt": "x.pt"},
            "of several models: a.pt.index.json, b.pt.index.json",
        ),
    ],
)
def test_one_of_several_models_is_not_guessed(
    names: str, indexes: dict[str, str], said: str, fill: Fill
) -> None:
    """The error names one file of each."""
    listed = {f"{n}.index.json": index_of(*value.split()) for n, value in indexes.items()}
    folder = fill(names, **listed)
    with pytest.raises(UsageError) as caught:
        find(folder)
    assert caught.value.message.startswith(str(folder))
    assert said in caught.value.message


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "expected one of {, found"),
        (b"[]", "expected one of {, found ["),
        (b'{"weight_map": {"a": "b.pt"}} x', "something after the end"),
        (b'{"weight_map": {"a": 1}}', "the file 1"),
        (b'{"weight_map": {"a": null}}', "the file None"),
        (b'{"weight_map": {"a": "b.bin"}}', "the file b.bin"),
        (b'{"weight_map": {"a": "../b.pt"}}', "the file ../b.pt"),
        (b'{"weight_map": {"a": "/b.pt"}}', "the file /b.pt"),
        (b'{"weight_map": {"a": "b\\u0000.pt"}}', r"the file 'b\x00.pt'"),
        (b'{"weight_map": {"a": "b.pt", "c": 1}}', "the file 1"),
        (b'{"x": ' + b"[" * 200_000, "maximum recursion depth"),
    ],
)
def test_an_index_that_cannot_be_used_is_refused(content: bytes, found: str, fill: Fill) -> None:
    """It is the same whether it is named, or lies beside a file of its ending."""
    folder = fill("b.pt b.bin", **{"x.pt.index.json": content})
    for path in (folder / "x.pt.index.json", folder / "b.pt", folder):
        with pytest.raises(WrongContent, match="index of the shards cannot be used") as caught:
            find(path)
        (finding,) = caught.value.findings
        assert (finding.kind, finding.where) == (Kind.MALFORMED, str(folder / "x.pt.index.json"))
        assert finding.expected == "a weight_map from tensors to files *.pt beside it"
        assert finding.found.startswith(found)
        assert finding.help == GET_AGAIN
    assert find(folder / "b.bin") == [[folder / "b.bin"]]


def test_what_else_an_index_has_is_passed_over(fill: Fill) -> None:
    """Any key may stand before the map and after it."""
    content = b'{"a": [1], "weight_map": {"t": "b.PT", "u": "b.PT"}, "metadata": {"x": null}} \n'
    folder = fill("b.PT", **{"x.pt.index.json": content})
    assert found(folder / "x.pt.index.json", folder) == "b.PT"


@pytest.mark.parametrize(
    ("kind", "words"),
    [("folder", "a folder"), ("pipe", "neither file nor folder"), ("dangling", "no such file")],
)
def test_an_index_that_is_no_file_is_refused(kind: str, words: str, fill: Fill) -> None:
    """A folder, a pipe or a link to nothing of such a name is never passed over."""
    folder = fill("b.pt")
    index = folder / "x.pt.index.json"
    make = {"folder": index.mkdir, "pipe": lambda: os.mkfifo(index)}
    make.get(kind, lambda: index.symlink_to("none"))()
    for path in (folder / "b.pt", index, folder):
        with pytest.raises(CsmWeightsError) as caught:
            find(path)
        assert str(index) in str(caught.value)
        assert words in str(caught.value).lower()


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("m-1-of-2.safetensors", True),
        ("m-000001-of-999999.bin", True),
        ("a-b.c-1-of-2.PTH", True),
        ("m\n-1-of-2.pt", True),
        ("m-1234567-of-2.pt", False),
        ("m-1-of-1234567.pt", False),
        ("-1-of-2.pt", False),
        ("m-1-of-2.onnx", False),
        ("m-1-of-2.pt.part-aa", False),
        ("m-x-of-2.pt", False),
    ],
)
def test_a_shard_is_known_by_its_name(name: str, is_one: bool) -> None:
    assert is_shard(name) is is_one


def test_several_paths_are_shards_or_chunk_files(tmp_path: Path) -> None:
    """Shards are told by their names; one that is none makes all of them chunk files."""
    shards = [tmp_path / "a" / "m-1-of-2.pt", tmp_path / "b" / "m-2-of-2.pt"]
    assert locate(shards) == ([[shards[0]], [shards[1]]], tmp_path / "a")
    mixed = (shards[0], tmp_path / "other.pt")
    assert locate(mixed) == ([list(mixed)], tmp_path / "a")


def test_the_folder_beside_weights_is_the_one_given(fill: Fill) -> None:
    """For a file it is the one that it is in; text is a path as well."""
    folder = fill("ckpt.pt")
    for path in (folder, folder / "ckpt.pt"):
        assert locate(path) == ([[folder / "ckpt.pt"]], folder)
        assert locate(str(path)) == ([[folder / "ckpt.pt"]], folder)


def test_no_file_stays_open(tmp_path: Path) -> None:
    """Weights are closed in the end, and at once where they are refused."""

    def count() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = count()
    path = hostile.written(tmp_path, hostile.good_safetensors())
    with open_weights([path]) as weights:
        assert (count(), weights.format) == (before + 1, "safetensors")
    assert count() == before
    for content in (b"", b"\x08\x07onnx", hostile.safetensors("[1]")):
        with pytest.raises(WrongContent):
            open_weights([hostile.written(tmp_path, content)])
        assert count() == before


def test_a_format_that_is_named_is_not_told_by_the_content(tmp_path: Path) -> None:
    """The reader of that format refuses the file in its own words."""
    path = hostile.written(tmp_path, hostile.good_safetensors(), "w.pt")
    with open_weights([path], "safetensors") as weights:
        assert weights.format == "safetensors"
    with pytest.raises(WrongContent, match="cannot be read as"):
        open_weights([path], "torch-zip")


def test_chunk_files_are_known_by_the_name_before_their_ending(tmp_path: Path) -> None:
    """Content that no format begins with is read as the first one's says, or is refused."""
    names = ("w.safetensors.part-aa", "other.onnx")
    parts = [hostile.written(tmp_path, b"nothing!", name) for name in names]
    with pytest.raises(WrongContent, match="header length") as caught:
        open_weights(parts)
    assert caught.value.message == "w.safetensors.part-aa cannot be read as safetensors"
    parts = [hostile.written(tmp_path, bytes(range(10)), f"w.onnx.part-a{x}") for x in "ab"]
    with pytest.raises(WrongContent, match="the weights cannot be read") as caught:
        open_weights(parts)
    shown = repr(bytes([*range(10), *range(6)]))
    assert caught.value.findings == (
        Finding(
            Kind.UNSUPPORTED,
            f"{parts[0]} and 1 more chunk files",
            "weights as safetensors or torch-zip",
            f"a file that starts {shown}",
        ),
    )


def test_a_file_that_is_not_there_or_is_none_is_said(tmp_path: Path) -> None:
    """The chunk file that is missing is named, and so is a folder in its place."""
    path = hostile.written(tmp_path, b"some")
    with pytest.raises(MissingInput, match="there are no weights at this path") as missing:
        open_weights([path, tmp_path / "none"])
    words = ("a file", "no such file", "inv weights")
    assert missing.value.findings == (Finding(Kind.MISSING, str(tmp_path / "none"), *words),)
    with pytest.raises(WrongContent, match="the weights cannot be read") as wrong:
        open_weights([path, tmp_path, path])
    assert wrong.value.findings == (
        Finding(Kind.MALFORMED, str(tmp_path), "a regular file", "a folder", GET_AGAIN),
    )


def test_a_folder_in_place_of_a_shard_is_not_called_missing(fill: Fill) -> None:
    """The shard is there, and the finding says what it is."""
    folder = fill("m-1-of-1.safetensors/")
    ((shard,),) = find(folder / "m-1-of-1.safetensors")
    with pytest.raises(WrongContent, match="found a folder"):
        open_weights([shard])
