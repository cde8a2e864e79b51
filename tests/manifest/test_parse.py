"""The manifest: real ones hold, and every broken rule is refused by its key."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csm_weights.errors import Kind, ManifestInvalid, MissingInput, UsageError, WrongContent
from csm_weights.hashing import blob_id
from csm_weights.manifest import types
from csm_weights.manifest.parse import load, parse
from csm_weights.manifest.paths import path_problem
from csm_weights.manifest.pin import MAX_CHUNK_FILES, tiling
from csm_weights.manifest.render import render
from csm_weights.manifest.types import Artifact, Manifest, Piece

FOLDER = Path(__file__).parents[2] / "manifests"

ONES, TWOS, THREES, FOURS = ("1" * 64, "2" * 40, "3" * 64, "4" * 64)

GOOD = f"""\
schema = 1
name = "toy"
description = "a toy"

[layout]
staging = "staged"
destination = "placed"

[hub]
repo = "org/name"
revision = "{"c" * 40}"

[smoke]
golden = "toy.golden.json"

[[artifact]]
path = "model.bin"
group = "weights"
format = "opaque"
size = 30
sha256 = "{ONES}"
blob_id = "{TWOS}"
evidence = {{ size = "A", sha256 = "B" }}
pieces = [
  {{ part = "chunks/p-aa", offset = 0, size = 20, sha256 = "{THREES}" }},
  {{ part = "chunks/p-ab", offset = 20, size = 10, sha256 = "{FOURS}" }},
]

[[artifact]]
path = "note.txt"
group = "note"
format = "opaque"
size = 15
sha256 = "{FOURS}"

[[artifact.alternative]]
size = 4
sha256 = "{hashlib.sha256(b"text").hexdigest()}"
text = "text"
"""


def edited(*changes: tuple[str, str]) -> bytes:
    """The good manifest with the first occurrence of each old text replaced."""
    text = GOOD
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    return text.encode()


def refused_keys(text: bytes) -> list[str]:
    """The keys that `parse` names when it refuses a text."""
    with pytest.raises(ManifestInvalid) as caught:
        parse(text, "toy.toml")
    findings = caught.value.findings
    assert all(f.kind is Kind.MALFORMED and f.expected and f.found for f in findings)
    return [f.where.removeprefix("toy.toml").removeprefix(": ") for f in findings]


# ---- the real manifests


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.toml")), ids=lambda p: p.name)
def test_a_shipped_manifest_is_valid_and_canonical(path: Path) -> None:
    """Every manifest of this repository loads, and is just what `render` writes."""
    assert path.read_text(encoding="utf-8") == render(load(path))


#: Size in bytes and sha256 of each file of the pinned commit, from the public facts.
CSM_1B = {
    "model.safetensors": (
        6_211_186_784,
        "2e7721144afe38b906d4f1048671da639fe142423f4a26283606ecebe894f4bf",
    ),
    "ckpt.pt": (6_219_618_714, None),
    "config.json": (3_280, "b203c014cb5a2f7b4f98d2e945f091182aceb17fa530ce968e8c3437e01a9b70"),
    "prompts/conversational_a.wav": (
        2_646_044,
        "356648c1bc6c1da7883004557e9b21a2ef7d01682d8b9d02d6dcb950b348b04f",
    ),
    "prompts/conversational_b.wav": (
        2_646_044,
        "c247153011385d33aaeed193adfec562c32182e2facd30cc8cd0b3e820e94afb",
    ),
    "prompts/read_speech_a.wav": (
        831_412,
        "59480708f84c77ab2967d14d821c2ccade9d7761685d060575121f49a149005b",
    ),
    "prompts/read_speech_b.wav": (
        576_052,
        "f582640265864499cbe6a8c687ea0f9e08e7fa41eeb2caa923d0a3bada55fcef",
    ),
    "prompts/read_speech_c.wav": (
        385_964,
        "7da15ab3ee7f8bbc8abfce73ce65936a80a535ae4a86db2d9c4756caba69e9c3",
    ),
    "prompts/read_speech_d.wav": (
        435_884,
        "09cad0494f9d0038b0f0eb039f47d752c45e56d92679f96587e20f67b2c1b7d8",
    ),
    "tokenizer.json": (
        17_209_980,
        "80f511469b4aceda8c17ccafef2310eceeda9dd4589cf2c062bd0279eef5646d",
    ),
    "tokenizer_config.json": (
        50_563,
        "250bef77ad6788610c416ccf4e0f6466607a12c0dc3156cca1031c2269170311",
    ),
    "special_tokens_map.json": (
        449,
        "03d62862d41de30db9e05cb4865de4f36c48ab3032327139fcdfacc5798a4828",
    ),
    "generation_config.json": (
        264,
        "7e8155f5846542bb15f8910a8dff0724d2961b28f10e4d98c58327825239b452",
    ),
    "preprocessor_config.json": (
        271,
        "8648040cda0469976874c733acbec88c0ef094cd95628ab63b32950f01872af9",
    ),
    "chat_template.jinja": (
        2_002,
        "b43753fbbc23be93160cccf825d2cf97dec39538cb274350216940e7acbc0fe7",
    ),
}

#: Digests of the chunk files aa to af, as their public git-LFS pointers give them.
PARTS = {
    "chunks/ckpt/ckpt.pt.part-": (
        "2936d06b11ad09e462d2019369985b14e3fdf92aa3885d26540379978b43abd2",
        "046db648f8362f2fb9da4dc871240070e655c61e791205e0c268c9a3d35feeca",
        "af99084f70ddb6921eebbcb8a954eb5e7a42cfe9a9679251a3e03531bf7e8dc4",
        "07ffc978eddf3155c2ba7ace4eccb6fd8a38e63b8fb591d57bd0dfb7154965a3",
        "d36b0cc36da2ed4fcde86c8aa3a76206631e33bcf361f27217016ee89ab08b52",
        "c389bb214fab88f1f95b782f78d223b7ee4c4c4ca6cab34eb7a2ae7ab6e00139",
    ),
    "chunks/safetensors/model.safetensors.part-": (
        "6cb6b21297bf7817165f0a783af4eda2696826342cd0d4f4fa9672ff2acd915d",
        "53f6953b2e658bd2f513dcaa2767e788fff55b8cf77507e8d2c448e071ab0f00",
        "8cfa1adf471f407cc550cdc555423c6cb73f7c2a5d72b6909105cc43a81311ac",
        "b7aafdd33fba7b0dee6cde6dd7bb5efa94f195be12adbdc86bf244251bd34429",
        "5bf32384011b63adaf7bc2c15b0eee1a2498724efdbffa6d12fd581ae5aa3e18",
        "9a90a0f60159d51cfb1f849cd798dd8e0de70791dce5c0958b3290ac5d6e49fb",
    ),
}

LAST_PART = {
    "chunks/ckpt/ckpt.pt.part-": 850_909_594,
    "chunks/safetensors/model.safetensors.part-": 842_477_664,
}


@pytest.fixture(scope="module")
def csm_1b() -> Manifest:
    """The manifest of CSM-1B."""
    return load(FOLDER / "csm-1b.toml")


def test_csm_1b_pins_every_file_of_the_facts(csm_1b: Manifest) -> None:
    """Sizes and digests are the published ones, and no file is missing or extra."""
    assert {a.path: (a.size, a.sha256) for a in csm_1b.artifacts} == CSM_1B


def test_csm_1b_pins_the_commit(csm_1b: Manifest) -> None:
    """The repository and commit are those the facts were read from."""
    expected = ("sesame/csm-1b", "c92a71e1c419772e25be7dc14d952c2521a740ab")
    assert (csm_1b.repo, csm_1b.revision) == expected


@pytest.mark.parametrize("prefix", PARTS)
def test_csm_1b_pins_all_twelve_parts(csm_1b: Manifest, prefix: str) -> None:
    """Names, sizes and digests of the chunk files are those of the chunked repository."""
    sizes = [1 << 30] * 5 + [LAST_PART[prefix]]
    names = [f"{prefix}a{letter}" for letter in "abcdef"]
    pieces = [p for a in csm_1b.artifacts for p in a.pieces if p.part.startswith(prefix)]
    actual = [(p.part, p.size, p.sha256) for p in pieces]
    assert actual == list(zip(names, sizes, PARTS[prefix], strict=True))


def test_csm_1b_blob_ids_are_the_public_ones(csm_1b: Manifest) -> None:
    """The blob id of model.safetensors follows from its sha256; ckpt.pt's is the Hub's."""
    by_path = {a.path: a for a in csm_1b.artifacts}
    safetensors = by_path["model.safetensors"]
    derived = blob_id(CSM_1B["model.safetensors"][1] or "", CSM_1B["model.safetensors"][0])
    assert derived == safetensors.blob_id == "67a4748fc437cb9a2fdeb90e6bec9dedb0ad9f86"
    assert by_path["ckpt.pt"].blob_id == "3f30fe9ef91a183ead3e9282c09a710491edc550"


def test_csm_1b_config_of_march_2025_hashes_to_its_digest(csm_1b: Manifest) -> None:
    """The config text that can be written without a source is the 155-byte edition."""
    config = next(a for a in csm_1b.artifacts if a.path == "config.json")
    edition = config.alternatives[0]
    facts = {
        "audio_num_codebooks": 32,
        "audio_vocab_size": 2051,
        "backbone_flavor": "llama-1B",
        "decoder_flavor": "llama-100M",
        "text_vocab_size": 128256,
    }
    assert edition.text == json.dumps(facts, indent=2)
    digest = hashlib.sha256(edition.text.encode()).hexdigest()
    expected = "34c4f7debeb679e89a2274eba00b15ce66115bcd50399c75094ada3c66511c6e"
    assert (edition.size, edition.sha256, digest) == (155, expected, expected)


# ---- what is accepted


def test_the_good_manifest_is_read_as_written() -> None:
    """Each value of the text arrives where it belongs."""
    toy = parse(GOOD.encode(), "toy.toml")
    model, note = toy.artifacts
    assert (toy.name, toy.staging, toy.destination) == ("toy", "staged", "placed")
    assert (toy.repo, toy.revision, toy.golden) == ("org/name", "c" * 40, "toy.golden.json")
    assert (model.size, model.sha256, model.blob_id) == (30, ONES, TWOS)
    assert [(p.part, p.offset, p.end) for p in model.pieces] == [
        ("chunks/p-aa", 0, 20),
        ("chunks/p-ab", 20, 30),
    ]
    assert [(e.size, e.text) for e in note.editions] == [(15, None), (4, "text")]
    assert dict(model.evidence) == {"size": "A", "sha256": "B"}


def test_the_destination_may_be_the_root() -> None:
    """A destination of "." is the folder that the manifest's paths are relative to."""
    text = edited(('destination = "placed"', 'destination = "."'))
    assert parse(text, "toy.toml").destination == "."


@pytest.mark.parametrize("path", ["a", "a/b.c", "été.wav", "a b", "x" * 200, ".hidden", "git"])
def test_an_ordinary_path_is_fine(path: str) -> None:
    """Names that mean no harm are taken."""
    assert path_problem(path) == ""


def test_select_takes_groups_paths_and_all() -> None:
    """A word may be a group or a path, and `all` is every artifact, in manifest order."""
    toy = parse(GOOD.encode(), "toy.toml")
    model, note = toy.artifacts
    assert toy.select(["weights"]) == (model,)
    assert toy.select(["note.txt", "weights"]) == (model, note)
    assert toy.select(["all"]) == (model, note)


def test_select_refuses_a_word_that_names_nothing() -> None:
    """A misspelt word is a usage error that names the groups there are."""
    with pytest.raises(UsageError, match="note, weights, all"):
        parse(GOOD.encode(), "toy.toml").select(["wieghts"])


# ---- what is refused


def one(old: str, new: str, *keys: str) -> tuple[list[tuple[str, str]], list[str]]:
    """A case with one change and the keys that are to be named."""
    return [(old, new)], list(keys)


P = 'path = "model.bin"'
KEY = "artifact[0].path"
SHA = f'sha256 = "{ONES}"'
VIOLATIONS = {
    "hole": one("offset = 20", "offset = 21", "artifact[0].pieces[1].offset", "artifact[0].size"),
    "overlap": one(
        "offset = 20", "offset = 19", "artifact[0].pieces[1].offset", "artifact[0].size"
    ),
    "first piece not at 0": one(
        "offset = 0", "offset = 1", "artifact[0].pieces[0].offset", "artifact[0].pieces[1].offset"
    ),
    "sum": one("size = 30", "size = 31", "artifact[0].size"),
    "empty piece": one(
        "offset = 20, size = 10", "offset = 20, size = 0", "artifact[0].pieces[1].size",
        "artifact[0].size",
    ),
    "bad hex": one(SHA, f'sha256 = "{"g" * 64}"', "artifact[0].sha256"),
    "short hex": one(SHA, f'sha256 = "{"1" * 63}"', "artifact[0].sha256"),
    "long hex": one(SHA, f'sha256 = "{"1" * 65}"', "artifact[0].sha256"),
    "hex and newline": one(SHA, f'sha256 = "{"1" * 64}\\n"', "artifact[0].sha256"),
    "foreign digits": one(SHA, f'sha256 = "{chr(0x661) * 64}"', "artifact[0].sha256"),
    "uppercase hex": one(SHA, f'sha256 = "{"A" * 64}"', "artifact[0].sha256"),
    "empty digest": one(SHA, 'sha256 = ""', "artifact[0].sha256"),
    "uppercase hex of a piece": one(THREES, "A" * 64, "artifact[0].pieces[0].sha256"),
    "empty digest of a piece": one(THREES, "", "artifact[0].pieces[0].sha256"),
    "bad blob id": one(TWOS, "2" * 41, "artifact[0].blob_id"),
    "bad commit": one("c" * 40, "main", "hub.revision"),
    "empty commit": one("c" * 40, "", "hub.revision"),
    "bad repo": one("org/name", "https://evil.example/x", "hub.repo"),
    "repo of dots": one("org/name", "../..", "hub.repo"),
    "hub without commit": one(f'revision = "{"c" * 40}"', "", "hub.revision"),
    "traversal": one(P, 'path = "a/../../b"', KEY),
    "absolute": one(P, 'path = "/etc/passwd"', KEY),
    "dot component": one(P, 'path = "./model.bin"', KEY),
    "empty component": one(P, 'path = "a//b"', KEY),
    "trailing slash": one(P, 'path = "a/"', KEY),
    "empty path": one(P, 'path = ""', KEY),
    "backslash": one(P, "path = 'a\\..\\b'", KEY),
    "drive": one(P, 'path = "C:x"', KEY),
    "newline": one(P, 'path = "a\\nb"', KEY),
    "escape sequence": one(P, 'path = "a\\u001b[2Jb"', KEY),
    "C1 control": one(P, 'path = "a\\u009bb"', KEY),
    "DEL": one(P, 'path = "a\\u007fb"', KEY),
    "NUL": one(P, 'path = "a\\u0000b"', KEY),
    "too long a component": one(P, f'path = "{"x" * 201}"', KEY),
    "dot at the end": one(P, 'path = "a."', KEY),
    "space at the end": one(P, 'path = "a "', KEY),
    "git": one(P, 'path = ".git/config"', KEY),
    "git in capitals": one(P, 'path = "a/.GIT/config"', KEY),
    "receipts": one(P, 'path = ".csm-weights/model.bin.json"', KEY),
    "partial": one(P, 'path = "model.bin.partial"', KEY),
    "journal": one(P, 'path = "model.bin.partial.journal"', KEY),
    "part outside": one("chunks/p-aa", "../p-aa", "artifact[0].pieces[0].part"),
    "part in git": one("chunks/p-aa", ".git/p-aa", "artifact[0].pieces[0].part"),
    "golden outside": one("toy.golden.json", "/etc/passwd", "smoke.golden"),
    "staging outside": one('"staged"', '"../staged"', "layout.staging"),
    "destination outside": one('"placed"', '"/"', "layout.destination"),
    "staging is destination": one('"staged"', '"placed"', "layout.staging"),
    "staging is destination, case folded": one('"staged"', '"Placed"', "layout.staging"),
    "same path twice": one('path = "note.txt"', P, "artifact[1].path"),
    "same path in other case": one(
        'path = "note.txt"', 'path = "MODEL.bin"', "artifact[1].path"
    ),
    "a path below another file": one(
        'path = "note.txt"', 'path = "model.bin/note.txt"', "artifact[1].path"
    ),
    "same part twice": one("chunks/p-ab", "chunks/p-aa", "artifact[0].pieces[1].part"),
    "unknown key": one("schema = 1", "schema = 1\nmirror = 2", "mirror"),
    "unknown key of an artifact": one(P, f"{P}\nmode = 7", "artifact[0].mode"),
    "unknown key of a piece": one("offset = 0,", "offset = 0, x = 1,", "artifact[0].pieces[0].x"),
    "unknown key of the layout": one('staging = "st', 'x = 1\nstaging = "st', "layout.x"),
    "unknown key of an edition": one(
        'text = "text"', 'text = "text"\nx = 1', "artifact[1].alternative[0].x"
    ),
    "other schema": one("schema = 1", "schema = 2", "schema"),
    "no schema": one("schema = 1\n", "", "schema"),
    "schema as bool": one("schema = 1", "schema = true", "schema"),
    "schema as float": one("schema = 1", "schema = 1.0", "schema"),
    "size as bool": one("size = 15", "size = true", "artifact[1].size"),
    "size as float": one("size = 15", "size = 15.0", "artifact[1].size"),
    "size as text": one("size = 15", 'size = "15"', "artifact[1].size"),
    "negative": one("size = 15", "size = -1", "artifact[1].size"),
    "2**63": one("size = 15", f"size = {2**63}", "artifact[1].size"),
    "a number of 40,000 bits": one("size = 15", f"size = 0x{'f' * 10_000}", "artifact[1].size"),
    "negative offset": one(
        "offset = 0", "offset = -1", "artifact[0].pieces[0].offset"
    ),
    "name as number": one('name = "toy"', "name = 1", "name"),
    "name with a slash": one('name = "toy"', 'name = "a/b"', "name"),
    "empty name": one('name = "toy"', 'name = ""', "name"),
    "no name": one('name = "toy"\n', "", "name"),
    "empty group": one('group = "note"', 'group = ""', "artifact[1].group"),
    "unknown format": one('format = "opaque"', 'format = "pickle"', "artifact[0].format"),
    "missing digest": one(f'size = 15\nsha256 = "{FOURS}"', "size = 15", "artifact[1].sha256"),
    "bad evidence mark": one('size = "A"', 'size = "D"', "artifact[0].evidence.size"),
    "evidence as number": one('size = "A"', "size = 1", "artifact[0].evidence.size"),
    "text of another length": one(
        'text = "text"', 'text = "texts"', "artifact[1].alternative[0].text"
    ),
    "text in more bytes than letters": one(
        'text = "text"', 'text = "téxt"', "artifact[1].alternative[0].text"
    ),
    "text of another digest": one(
        'text = "text"', 'text = "tezt"', "artifact[1].alternative[0].text"
    ),
    "layout as number": one('[layout]\nstaging = "staged"\ndestination = "placed"', "layout = 1",
        "layout", "layout.staging", "layout.destination"),
    "artifacts as number": one("[[artifact]]", "[artifact]", ""),
    "a list as name": one('"toy"', "[" * 60 + "]" * 60, "name"),
    "keys 3,000 deep": one('name = "toy"', f"name{'.a' * 3000} = 1", ""),
    "an inline table 100 deep": one('"toy"', "{a=" * 100 + "1" + "}" * 100, "name"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "keys"), VIOLATIONS.values(), ids=VIOLATIONS.keys())
def test_a_broken_rule_is_refused_by_its_key(
    changes: list[tuple[str, str]], keys: list[str]
) -> None:
    """Each violation is refused with exit 4, and the finding names the key it is at."""
    assert sorted(set(refused_keys(edited(*changes)))) == sorted(keys)


def test_no_artifacts_are_refused() -> None:
    """A manifest of nothing is no manifest."""
    assert refused_keys(GOOD.partition("[[artifact]]")[0].encode()) == ["artifact"]


def test_ten_violations_are_reported_at_once() -> None:
    """A person mends all broken rules in one round."""
    changes = [
        ('name = "toy"', 'name = "TOY"'),
        ("org/name", "name"),
        ("c" * 40, "HEAD"),
        ('"placed"', '"/placed"'),
        (P, 'path = "../model.bin"'),
        (ONES, "x"),
        (TWOS, "y"),
        ("chunks/p-aa", "chunks/../p-aa"),
        ('path = "note.txt"', 'path = ".git/note"'),
        ('format = "opaque"', 'format = "exe"'),
    ]
    expected = [
        "name",
        "hub.repo",
        "hub.revision",
        "layout.destination",
        "artifact[0].path",
        "artifact[0].sha256",
        "artifact[0].blob_id",
        "artifact[0].pieces[0].part",
        "artifact[1].path",
        "artifact[0].format",
    ]
    assert sorted(refused_keys(edited(*changes))) == sorted(expected)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("schema = 1\nname = \n", "line 2"),
        ("schema = 1\nschema = 1\n", "line 2"),
        ("schema = 1\n\n[layout\n", "line 3"),
    ],
)
def test_a_syntax_error_tells_its_line(text: str, words: str) -> None:
    """What is not TOML is refused with the line it breaks at."""
    with pytest.raises(ManifestInvalid, match=words):
        parse(text.encode(), "toy.toml")


@pytest.mark.parametrize(
    "text",
    [
        b"\xff\xfe",
        GOOD.encode("utf-16"),
        b"x = " + b"[" * 100_000,
        b"x = " + b"{a=" * 100_000,
        b"x = " + b"9" * 5000,
        b"#" * (types.MAX_TEXT + 1),
        b"",
        b"\x00",
    ],
    ids=["not UTF-8", "UTF-16", "arrays", "tables", "digits", "too large", "empty", "NUL"],
)
def test_hostile_text_is_refused_quickly(text: bytes) -> None:
    """No text, however bad, gives anything but a ManifestInvalid."""
    assert refused_keys(text)


def test_control_characters_do_not_reach_a_message_unescaped() -> None:
    """A refused value is shown escaped, so that it cannot drive a terminal."""
    with pytest.raises(ManifestInvalid) as caught:
        parse(edited((P, 'path = "a\\u001b[2Jb"')), "toy.toml")
    assert "\x1b" not in str(caught.value)


def test_a_manifest_that_is_not_there_is_a_missing_input(tmp_path: Path) -> None:
    """`load` of a missing file is exit 3 and names the file."""
    with pytest.raises(MissingInput) as caught:
        load(tmp_path / "none.toml")
    assert [f.where for f in caught.value.findings] == [str(tmp_path / "none.toml")]


def test_load_refuses_a_file_that_is_too_large(tmp_path: Path) -> None:
    """A file beyond the ceiling is refused without being read whole."""
    path = tmp_path / "large.toml"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(WrongContent, match="at most"):
        load(path)


# ---- properties


def tiled(size: int, piece_size: int) -> Manifest:
    """A manifest of one artifact that only its pieces pin."""
    digests = (hashlib.sha256(bytes([i % 256])).hexdigest() for i in range(MAX_CHUNK_FILES))
    ranges = zip(tiling(size, piece_size), digests, strict=False)
    pieces = tuple(Piece(f"chunks/p-{o}", o, n, d) for (o, n), d in ranges)
    artifact = Artifact("a.bin", "a", "opaque", size, pieces=pieces)
    return Manifest("toy", "staged", "placed", (artifact,), where="toy.toml")


@st.composite
def tilings(draw: st.DrawFn) -> Manifest:
    size = draw(st.integers(1, 1 << 45))
    count = draw(st.integers(1, min(size, 12)))
    return tiled(size, -(-size // count))


@settings(max_examples=60, deadline=None)
@given(tilings())
def test_any_tiling_reads_back_equal(manifest: Manifest) -> None:
    """What `tiling` cuts is accepted and read back as it was."""
    assert parse(render(manifest).encode(), "toy.toml") == manifest


@settings(max_examples=120, deadline=None)
@given(manifest=tilings(), data=st.data())
def test_any_perturbed_tiling_is_refused(manifest: Manifest, data: st.DataObject) -> None:
    """A piece dropped, doubled, swapped, moved or resized is found."""
    (artifact,) = manifest.artifacts
    pieces = list(artifact.pieces)
    index = data.draw(st.integers(0, len(pieces) - 1))
    delta = data.draw(st.integers(-3, 3).filter(bool))
    act = data.draw(st.sampled_from(["drop", "double", "swap", "move", "resize"]))
    if act == "drop":
        del pieces[index]
    elif act == "double":
        pieces.insert(index, replace(pieces[index], part="chunks/other"))
    elif act == "swap" and index:
        pieces[index - 1], pieces[index] = pieces[index], pieces[index - 1]
    elif act == "move":
        pieces[index] = replace(pieces[index], offset=pieces[index].offset + delta)
    else:
        pieces[index] = replace(pieces[index], size=pieces[index].size + delta)
    bad = replace(manifest, artifacts=(replace(artifact, pieces=tuple(pieces)),))
    assert refused_keys(render(bad).encode())


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_any_words_read_back_equal(words: str) -> None:
    """Free text survives rendering, whatever characters it has."""
    text = words.encode()
    note = Artifact(
        "note",
        "note",
        "opaque",
        len(text),
        hashlib.sha256(text).hexdigest(),
        text=words,
        evidence={"size": "C"},
        note=words,
    )
    manifest = Manifest("toy", "staged", "placed", (note,), description=words, where="toy.toml")
    assert parse(render(manifest).encode(), "toy.toml") == manifest


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab./\\.~\x00\n:\u202e ", max_size=12))
def test_an_accepted_path_stays_inside_its_folder(path: str) -> None:
    """No accepted path leaves its folder, whichever way it is joined."""
    if not path_problem(path):
        base = Path("/base/folder")
        assert (base / path).resolve().is_relative_to(base)
        assert str(base / path) == f"/base/folder/{path}"
