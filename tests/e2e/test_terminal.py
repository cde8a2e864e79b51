"""Names full of escape sequences, wherever a command shows one: no terminal is driven by them."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csm_weights.errors import Finding, Kind, WrongContent, printable
from csm_weights.progress import Progress
from tests.support import hostile
from tests.support.clone import Clone, Result

#: Clears the screen, names the window, rings; C1; turns text round; ends the line; not text.
EVIL = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202e\u2028\n\udcff"

#: What file names may hold of it and a manifest or command line may not be refused for.
SHORT = "\x1b[2J\x9b\u202e\n"


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A checkout whose folder and Hub cache have such names, with csm-tiny installed."""
    root = tmp_path_factory.mktemp("clone") / "root"
    clone = Clone(Clone.make(root).root, {"HF_HOME": f"/tmp/none{SHORT}", "HF_HUB_OFFLINE": "1"})
    assert clone.inv("weights", "--model", "csm-tiny", "--no-smoke").returncode == 0
    return clone


def shown(result: Result) -> str:
    """All that a command printed, once it is known to drive no terminal."""
    text = result.stdout + result.stderr
    assert "Traceback" not in text
    assert [c for c in text if not (c.isprintable() or c == "\n")] == []
    return text


@pytest.mark.parametrize("evil", [EVIL, SHORT, "\udcff"])
@pytest.mark.parametrize("command", ["status", "verify", "fetch", "doctor", "weights", "clean"])
def test_a_model_of_that_name(command: str, evil: str, clone: Clone) -> None:
    """The name of a model that does not exist is shown without control characters."""
    result = clone.inv(command, "--model", evil)
    assert (result.returncode, "model" in shown(result)) == (2, True)


@pytest.mark.parametrize("command", ["status", "verify", "fetch", "doctor", "weights"])
def test_a_manifest_of_that_name(command: str, clone: Clone, tmp_path: Path) -> None:
    """The path and the values of a broken manifest are shown without control characters."""
    text = hostile.manifest(path=r"a\u001b[2J").replace(b"group", rb'"\u001b[2J"')
    path = hostile.written(tmp_path, text, f"{SHORT}.toml")
    result = clone.inv(command, "--model", str(path))
    assert (result.returncode, "is not a valid manifest" in shown(result)) == (4, True)


@pytest.mark.parametrize("evil", [SHORT, "\udcff"])
@pytest.mark.parametrize("command", ["status", "fetch", "verify", "place", "doctor", "clean"])
def test_a_destination_of_that_name(command: str, evil: str, clone: Clone, tmp_path: Path) -> None:
    """Every command that takes a folder can have one of any name."""
    result = clone.inv(command, "--model", "csm-tiny", "--dest", f"{tmp_path}/to{evil}")
    shown(result)
    assert result.returncode in (0, 3)


@pytest.mark.parametrize("command", ["status", "fetch", "verify", "doctor", "weights"])
def test_chunk_files_of_that_name(command: str, clone: Clone, tmp_path: Path) -> None:
    """The name of an unexpected chunk file is shown without control characters."""
    part = clone.chunk_files("ckpt.pt")[-1]
    stray = part.with_name(f"ckpt.pt.part-{SHORT}")
    stray.write_bytes(b"more")
    extra = part.with_name("ckpt.pt.part-zz")
    extra.write_bytes(b"more")
    try:
        result = clone.inv(command, "--model", "csm-tiny", "--only", "all", "--dest", str(tmp_path))
        shown(result)
    finally:
        stray.unlink()
        extra.unlink()


def test_weights_of_that_name(clone: Clone, tmp_path: Path) -> None:
    """`compare` shows files and tensors by names that do no harm, equal, different or broken."""
    one = hostile.safetensors({EVIL[:-1]: hostile.entry()}, bytes(8))
    other = hostile.safetensors({EVIL[:-1]: hostile.entry()}, bytes(7) + b"x")
    third = hostile.safetensors({"\x1b]0;x\x07": hostile.entry(dtype="\x1b[2J")}, bytes(8))
    files = [
        hostile.written(tmp_path, content, f"{index}{SHORT}.safetensors")
        for index, content in enumerate((one, other, third))
    ]
    codes = []
    for first, second in ((0, 0), (0, 1), (0, 2)):
        result = clone.inv("compare", "--file", str(files[first]), "--file", str(files[second]))
        codes.append(result.returncode)
        assert "\\x1b" in shown(result)
    assert codes == [0, 4, 4]


def test_a_checkpoint_with_names_like_that(clone: Clone, tmp_path: Path) -> None:
    """Globals and records of a checkpoint are shown escaped."""
    bad = [
        hostile.checkpoint(b"\x80\x02c\x1b[2J\n\x9b31m\n."),
        hostile.BAD_ZIPS["name_with_control_characters"][0],
    ]
    for content in bad:
        path = str(hostile.written(tmp_path, content, f"{SHORT}.pt"))
        result = clone.inv("compare", "--file", path, "--file", path)
        assert (result.returncode, "\\x1b" in shown(result)) == (4, True)


def test_shards_of_that_name(clone: Clone, tmp_path: Path) -> None:
    """The names of missing shards, and of several models, are shown without control characters."""
    for name in (SHORT, f"other{SHORT}"):
        hostile.written(tmp_path, b"", f"{name}-00001-of-00002.safetensors")
    shard = str(tmp_path / f"{SHORT}-00001-of-00002.safetensors")
    several = clone.inv("compare", "--file", str(tmp_path))
    missing = clone.inv("compare", "--file", shard)
    shown(several), shown(missing)
    assert (several.returncode, missing.returncode) == (2, 3)


def test_digests_of_files_of_that_name(clone: Clone, tmp_path: Path) -> None:
    """The names in a SHA256SUMS file are shown by what is safe of them."""
    lines = "".join(f"{'1' * 64}  {name}\n" for name in ("\x1b[2J", "a\x9b\u202e", "../x\x07"))
    sums = hostile.written(tmp_path, lines.encode(), f"SUMS{SHORT}")
    result = clone.inv("verify", "--model", "csm-tiny", "--sums", str(sums))
    shown(result)
    assert result.returncode == 4


@pytest.mark.parametrize("arguments", [["split"], ["lock", "--repo"], ["smoke", "--model"]])
def test_other_arguments_of_that_name(arguments: list[str], clone: Clone) -> None:
    """What is refused as a file, a repository or a model is shown by what is safe of it."""
    result = clone.inv(*arguments, EVIL)
    shown(result)
    assert result.returncode in (2, 3)


@pytest.mark.parametrize("option", ["--only", "--source", "--url", "--revision"])
def test_options_of_that_name(option: str, clone: Clone) -> None:
    """A word that no option knows is shown by what is safe of it."""
    result = clone.inv("status", "--model", "csm-tiny", option, EVIL)
    shown(result)
    assert result.returncode == 2


@pytest.mark.parametrize("command", ["status", "verify", "compare"])
def test_json_is_ascii(command: str, clone: Clone, tmp_path: Path) -> None:
    """With --json the same names come as JSON escapes, in ASCII."""
    path = hostile.written(tmp_path, b"", f"{SHORT}.toml")
    options = ["--file", str(path)] * 2 if command == "compare" else ["--model", str(path)]
    result = clone.inv(command, *options, "--json")
    shown(result)
    assert result.stdout.isascii()
    assert json.loads(result.stdout)["exit_code"] == result.returncode == 4


def _with_report(clone: Clone, **changes: Any) -> None:
    """Gives the smoke report of csm-tiny other words, with what it holds for as it is."""
    path = clone.installed / ".csm-weights" / "smoke-report"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_smoke_report_with_words_like_that(clone: Clone) -> None:
    """A report that someone has written into shows its words by what is safe of them."""
    pytest.importorskip("torch")
    smoked = clone.inv("smoke", "--model", "csm-tiny", "--frames", "2", "--device", "cpu")
    assert smoked.returncode == 0, smoked.stderr
    _with_report(clone, device=f"cpu{SHORT}", made_at=SHORT)
    result = clone.inv("weights", "--model", "csm-tiny")
    assert "smoke test on cpu" in result.stdout
    shown(result)


# ---- what everything goes through


def test_progress_lines() -> None:
    """A progress line is one line, whatever its label and text hold."""
    stream = io.StringIO()
    with Progress(f"label{SHORT}", 0, stream) as progress:
        progress.log(EVIL)
    assert stream.getvalue().count("\n") == 1
    assert stream.getvalue()[:-1].isprintable()


@given(st.text())
def test_any_text_is_made_printable(text: str) -> None:
    """Whatever is printed has no line end, control or invisible character, and says what it was."""
    assert printable(text).isprintable()
    assert printable(printable(text)) == printable(text)
    assert len(printable(text)) >= len(text)


@given(st.text(max_size=20))
def test_any_error_is_lines_of_printable_text(text: str) -> None:
    """An error with any words in any field drives no terminal, and adds no line of its own."""
    error = WrongContent(text, [Finding(Kind.MALFORMED, text, text, text, text)], "advice")
    lines = str(error).split("\n")
    assert all(line.isprintable() for line in lines)
    assert len(lines) == 3


def test_a_folder_of_that_name_can_be_worked_in(clone: Clone, tmp_path: Path) -> None:
    """A whole checkout below such a name assembles and verifies files all the same."""
    root = tmp_path / f"here{SHORT}"
    shutil.copytree(clone.root, root, symlinks=True)
    shutil.rmtree(root / "models")
    moved = Clone(root, clone.variables)
    result = moved.inv("weights", "--model", "csm-tiny", "--no-smoke")
    assert (result.returncode, "\\u202e" in shown(result)) == (0, True)
    assert moved.installed.samefile(root / "models" / "csm-tiny")
