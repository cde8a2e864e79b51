"""`inv doctor`, and `inv seed-cache` after it, as a person calls them."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
from pathlib import Path

import pytest

from tests.pipeline.test_doctor import NO_SOCKETS, REPO, TOKEN, write_manifest
from tests.support.clone import INV, Clone, Result
from tests.support.hub import HubServer


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    """A clone in which nothing has run yet."""
    return Clone.make(tmp_path / "clone")


def inv(clone: Clone, *arguments: str, **variables: str) -> Result:
    """`inv doctor` with these arguments and variables."""
    return clone.run(INV, "doctor", *arguments, env=variables)


def test_a_fresh_clone_is_told_the_ways_to_the_weights(clone: Clone) -> None:
    """Without anything the table, the missing token and five ways; nothing is written."""
    clone.inv("--list")
    before = clone.tree()
    result = inv(clone)
    assert (result.returncode, clone.inv("weights", "--no-smoke").returncode) == (3, 3)
    assert "NOT OK     plan " in result.stdout and "NOT OK     token " in result.stdout
    assert "hf auth login" in result.stdout
    assert re.findall(r"^ *(\d)\. ", result.stderr, re.MULTILINE) == ["1", "2", "3", "4", "5"]
    assert clone.tree() == before


def test_a_clone_with_parts_is_promised_its_model(clone: Clone) -> None:
    """csm-tiny as it is in the repository: all is well, with the smoke test or without."""
    result = inv(clone, "--model", "csm-tiny")
    assert result.returncode == 0, result.stdout
    assert result.stdout.endswith("OK: inv weights --model csm-tiny could succeed\n")
    assert result.stderr.removeprefix("doctor ...\n") == ""


TOLD = {"invalid token": "hf_Another", "terms not accepted": TOKEN}


@pytest.mark.parametrize(("kind", "known"), TOLD.items(), ids=TOLD)
def test_the_token_is_in_no_stream(clone: Clone, kind: str, known: str) -> None:
    """Through the command, with all that the libraries say when asked to, it is not shown."""
    with HubServer() as hub:
        hub.add_token(known, access="none")
        write_manifest(clone.root, hub.add_repo(REPO, {"x": b""}, gated=True))
        shutil.rmtree(clone.root / "chunks")
        variables = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_DEBUG": "1"}
        result = inv(clone, "--model", "csm-tiny", "--json", **variables)
    data = json.loads(result.stdout)
    assert (result.returncode, data["exit_code"], data["ok"]) == (5, 5, False)
    assert [finding["kind"] for finding in data["findings"]] == [kind]
    assert TOKEN not in result.stdout + result.stderr


OFFLINE = [
    ("--model", "csm-tiny"),
    ("--model", "csm-tiny", "--source", "hf"),
    ("--model", "csm-tiny", "--url", "http://127.0.0.1:9/folder"),
    ("--offline",),
]


@pytest.mark.parametrize("arguments", OFFLINE, ids=" ".join)
def test_offline_mode_opens_no_socket(clone: Clone, arguments: tuple[str, ...]) -> None:
    """With HF_HUB_OFFLINE=1 no socket is made, whatever is missing."""
    write_manifest(clone.root, "a" * 40)
    shutil.rmtree(clone.root / "chunks")
    clone.fake("sitecustomize", NO_SOCKETS)
    result = inv(clone, *arguments, HF_HUB_OFFLINE="1", HF_TOKEN=TOKEN)
    assert result.returncode == 3, result.stderr
    assert "a socket was opened" not in result.stderr
    online = inv(clone, "--model", "csm-tiny", HF_TOKEN=TOKEN)
    assert (online.returncode, "a socket was opened" in online.stderr) == (1, True)


def test_ctrl_c_ends_the_waiting(clone: Clone) -> None:
    """While a server does not answer, Ctrl-C ends with 130 and in a sentence."""
    write_manifest(clone.root, "a" * 40)
    shutil.rmtree(clone.root / "chunks")
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"http://127.0.0.1:{mute.getsockname()[1]}"
        variables = {"HF_ENDPOINT": url, "HF_TOKEN": TOKEN}
        process = clone.start(INV, "doctor", "--model", "csm-tiny", env=variables)
        mute.settimeout(60)
        mute.accept()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=7)
    assert process.returncode == 130
    assert "interrupted" in errors and "Traceback" not in errors


def test_seed_cache_says_where_the_files_are_and_who_finds_them(clone: Clone) -> None:
    """Each file with how it came and its blob, in words and in JSON; a dry run changes nothing."""
    write_manifest(clone.root, "a" * 40)
    clone.inv("weights", "--model", "csm-tiny", "--no-smoke")
    cache = clone.extra / ".cache" / "huggingface"
    assert clone.inv("seed-cache", "--model", "csm-tiny", "--dry").returncode == 0
    assert not cache.exists()
    result = clone.inv("seed-cache", "--model", "csm-tiny")
    assert result.returncode == 0, result.stderr
    assert re.search(r"^linked +model\.safetensors +[0-9a-f]{16}$", result.stdout, re.MULTILINE)
    assert result.stdout.rstrip().endswith(
        f'OK: with HF_HUB_OFFLINE=1, from_pretrained("{REPO}") finds it'
    )
    data = json.loads(clone.inv("seed-cache", "--model", "csm-tiny", "--json").stdout)
    assert {file["how"] for file in data["files"]} == {"already there"}
    assert all(Path(file["blob"]).is_file() for file in data["files"])
    checked = json.loads(inv(clone, "--model", "csm-tiny", "--json", "--no-smoke").stdout)
    assert checked["exit_code"] == 0
