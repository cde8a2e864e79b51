"""Installed files in the Hub's cache: only verified ones, and as the real client wants them."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from csm_weights import hashing
from csm_weights.commands import seed_cache as command
from csm_weights.commands.seed_cache import Seeding, seed_cache
from csm_weights.errors import Finding, Kind, MissingInput, NoSpace, UsageError, WrongContent
from csm_weights.manifest.types import Artifact
from csm_weights.pipeline import apply
from csm_weights.pipeline.request import Request
from csm_weights.store import hub_cache, install
from csm_weights.store.hub_cache import How
from csm_weights.store.inspect import FileState
from csm_weights.store.receipts import receipt_path
from tests.store.test_hub_cache import ask_client, git_sha1, hows, sha256, stamps
from tests.support.clone import copy_tiny
from tests.support.toy import Toy, flip

REPO = "acme/toy"
COMMIT = "feed" * 10
OTHER = "beef" * 10

#: Loads a model as CSM's own code does: a mixin, a config of its own type, every name required.
LOAD = """
import dataclasses
import safetensors.torch
from huggingface_hub import PyTorchModelHubMixin
from csm_weights.formats.architecture import parse_config
from csm_weights.model.csm import Model

@dataclasses.dataclass
class Arguments:
    audio_num_codebooks: int
    audio_vocab_size: int
    backbone_flavor: str
    decoder_flavor: str
    text_vocab_size: int

class Speaker(Model, PyTorchModelHubMixin):
    def __init__(self, config: Arguments):
        text = json.dumps(dataclasses.asdict(config)).encode()
        super().__init__(parse_config(text, "config.json"))

speaker = Speaker.from_pretrained(repo, strict=True)
wanted = safetensors.torch.load_file(hf_hub_download(repo, "model.safetensors"))
tensors = speaker.state_dict()
result["tensors"] = len(tensors)
result["equal"] = all(bool((tensors[name] == wanted[name]).all()) for name in wanted)
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the Hub's libraries that does not exist yet."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "hf"
    monkeypatch.setenv("HF_HOME", str(folder))
    return folder


@pytest.fixture
def model(toy: Toy) -> Toy:
    """The toy model, installed and verified, with a repository on the Hub."""
    toy.write_manifest(replace(toy.manifest, repo=REPO, revision=COMMIT))
    assert apply.weights(toy.request(), smoke=False).error is None
    return toy


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are hashed to be verified."""
    names: list[str] = []
    real = hashing.measure

    def measuring(jobs: Any, on_progress: Any) -> Any:
        names.extend(job.path.name for job in jobs)
        return real(jobs, on_progress)

    monkeypatch.setattr("csm_weights.verify.gates.measure", measuring)
    return names


def repository(home: Path) -> Path:
    return home / "hub" / "models--acme--toy"


def snapshot(home: Path, path: str) -> bytes:
    return (repository(home) / "snapshots" / COMMIT / path).read_bytes()


def names(seeded: Seeding) -> dict[str, str]:
    return {item.path: item.blob.name for item in seeded.files}


def is_verified(toy: Toy) -> bool:
    return apply.status(toy.request(), check=True).error is None


def edit(toy: Toy, path: str, change: Callable[[Artifact], Artifact]) -> None:
    """Writes the manifest with another entry for one artifact."""
    artifacts = tuple(change(a) if a.path == path else a for a in toy.manifest.artifacts)
    toy.write_manifest(replace(toy.manifest, artifacts=artifacts))


def pin_note(artifact: Artifact) -> Artifact:
    """The edition of the note that is installed, as the pinned one."""
    own = artifact.alternatives[0]
    return replace(artifact, size=own.size, sha256=own.sha256, text=own.text, alternatives=())


# ---- what is seeded


def test_verified_files_are_linked_into_the_cache(model: Toy, home: Path) -> None:
    """Every chosen file is in the snapshot of the manifest's commit, which main stands for."""
    seeded = seed_cache(model.request())
    assert (seeded.cache, seeded.main) == (home / "hub", COMMIT)
    assert [note for note in seeded.notes if "read-only in both" in note]
    assert hows(seeded.files) == [How.LINKED] * 3
    for artifact in model.manifest.artifacts:
        assert snapshot(home, artifact.path) == model.good(artifact.path)


def test_what_is_not_chosen_is_not_seeded(model: Toy) -> None:
    """A selection holds for the cache as for everything else."""
    assert list(names(seed_cache(model.request("a.bin")))) == ["a.bin"]


def test_a_seeded_file_is_still_known_without_hashing(model: Toy, counted: list[str]) -> None:
    """The link changes a file's change time; its receipt is written anew, so nothing is hashed."""
    seed_cache(model.request())
    assert is_verified(model)
    assert seed_cache(model.request()).main == COMMIT
    assert counted == []


def test_a_second_time_nothing_is_done(model: Toy) -> None:
    """All is there already, and no file of the model or the cache is touched."""
    seed_cache(model.request())
    before = stamps(model.root)
    assert hows(seed_cache(model.request()).files) == [How.KEPT] * 3
    assert stamps(model.root) == before


def test_another_destination_is_seeded_from_there(model: Toy, home: Path) -> None:
    """With a destination of one's own, the files there are what the cache gets."""
    request = model.request(dest="models/elsewhere")
    apply.weights(request, smoke=False)
    shutil.rmtree(model.root / "models" / "toy")
    seed_cache(request)
    assert snapshot(home, "a.bin") == model.good("a.bin")
    assert apply.status(request, check=True).error is None


def test_the_cache_is_where_the_environment_says(
    model: Toy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """HF_HUB_CACHE counts before HF_HOME, as for the client; relative to the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", "mine")
    assert seed_cache(model.request()).cache == tmp_path / "mine"
    assert (tmp_path / "mine" / "models--acme--toy" / "refs" / "main").is_file()


# ---- the names of blobs


def test_small_files_are_named_by_their_git_id(model: Toy) -> None:
    """What the Hub keeps in git has the git blob id, what is pinned as large the sha256."""
    found = names(seed_cache(model.request()))
    assert found == {
        "a.bin": sha256(model.good("a.bin")),
        "b.bin": sha256(model.good("b.bin")),
        "note.txt": git_sha1(model.good("note.txt")),
    }


def test_a_pinned_git_id_says_how_the_hub_keeps_a_file(
    model: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A manifest that has the git id of a file's content names its blob by it, of any size."""
    monkeypatch.setattr(command, "LARGE", 1)
    good = git_sha1(model.good("a.bin"))
    edit(model, "a.bin", lambda a: replace(a, blob_id=None, git_sha1=good))
    assert names(seed_cache(model.request("a.bin"))) == {"a.bin": good}


def test_a_file_of_ten_megabytes_is_named_by_its_sha256(
    model: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a pinned id the size decides, as it does on the Hub."""
    edit(model, "a.bin", lambda a: replace(a, blob_id=None))
    size = model.artifact("a.bin").size
    monkeypatch.setattr(command, "LARGE", size + 1)
    assert names(seed_cache(model.request("a.bin")))["a.bin"] == git_sha1(model.good("a.bin"))
    shutil.rmtree(seed_cache(model.request("a.bin")).cache)
    monkeypatch.setattr(command, "LARGE", size)
    assert names(seed_cache(model.request("a.bin")))["a.bin"] == sha256(model.good("a.bin"))


# ---- what is not seeded


def test_files_without_a_receipt_are_hashed_first(model: Toy, counted: list[str]) -> None:
    """A right file that nobody has verified yet is hashed once, and then has a receipt."""
    for path in ("a.bin", "note.txt"):
        receipt_path(model.installed(path).parent, path).unlink()
    seed_cache(model.request())
    assert counted == ["a.bin", "note.txt"]
    assert is_verified(model)


def test_a_file_verified_by_its_git_id_alone_gets_a_receipt(model: Toy, counted: list[str]) -> None:
    """Where the manifest has no other digest, the receipt has the git id too."""
    good = git_sha1(model.good("note.txt"))
    edit(model, "note.txt", lambda a: replace(pin_note(a), sha256=None, git_sha1=good))
    receipt_path(model.installed("note.txt").parent, "note.txt").unlink()
    assert names(seed_cache(model.request("note.txt"))) == {"note.txt": good}
    assert names(seed_cache(model.request("note.txt"))) == {"note.txt": good}
    assert counted == ["note.txt"]


def test_one_wrong_file_and_nothing_is_seeded(model: Toy, home: Path) -> None:
    """A file that was changed since it was verified is found out; the right ones wait for it."""
    flip(model.installed("b.bin"))
    with pytest.raises(WrongContent) as caught:
        seed_cache(model.request())
    assert [f.kind for f in caught.value.findings] == [Kind.WRONG_DIGEST]
    assert not home.exists()


def test_missing_files_are_named_with_the_command_for_them(model: Toy, home: Path) -> None:
    """A file that is not installed ends the command with 3, and names the one that installs it."""
    model.installed("a.bin").unlink()
    with pytest.raises(MissingInput) as caught:
        seed_cache(model.request())
    assert [f.help for f in caught.value.findings] == ["inv weights --model toy"]
    assert not home.exists()


def test_a_model_without_a_repository_has_no_cache_to_go_to(toy: Toy) -> None:
    """A manifest without a [hub] section is refused by that name."""
    with pytest.raises(UsageError, match="no \\[hub\\]"):
        seed_cache(toy.request())


def test_a_branch_is_no_name_of_a_snapshot(model: Toy) -> None:
    """Where another revision is asked for it has to be a commit, as the cache has them."""
    with pytest.raises(UsageError, match="'main' is not"):
        seed_cache(replace(model.request(), revision="main"))
    assert seed_cache(replace(model.request(), revision=OTHER)).main == OTHER


def test_another_edition_is_seeded_with_a_word_about_it(model: Toy, home: Path) -> None:
    """What the commit does not have stands in for what it has, and that is said."""
    seeded = seed_cache(model.request("note.txt"))
    assert [note for note in seeded.notes if "note.txt" in note and "hf cache verify" in note]
    assert snapshot(home, "note.txt") == model.good("note.txt")


def test_another_edition_does_not_replace_the_hubs_own(model: Toy, home: Path) -> None:
    """Where the cache has the commit's file, that stays."""
    pinned = repository(home) / "snapshots" / COMMIT / "note.txt"
    pinned.parent.mkdir(parents=True)
    pinned.write_bytes(b"another edition")
    seeded = seed_cache(model.request())
    assert "note.txt" not in names(seeded)
    assert [note for note in seeded.notes if note.startswith("note.txt: left")]
    assert pinned.read_bytes() == b"another edition"


def test_main_of_another_commit_stays_and_that_is_said(model: Toy, home: Path) -> None:
    """The note names the commit and the option that moves it, which then does."""
    hub_cache.repository(home / "hub", REPO).joinpath("refs").mkdir(parents=True)
    (repository(home) / "refs" / "main").write_text(OTHER)
    left = seed_cache(model.request("a.bin"))
    assert left.main == OTHER
    assert OTHER in left.notes[-1]
    assert "--move-main" in left.notes[-1]
    moved = seed_cache(model.request("a.bin"), move_main=True)
    assert (moved.main, moved.notes) == (COMMIT, ())


def test_a_folder_of_receipts_that_is_closed_is_a_note(
    model: Toy, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache is good all the same; the next run will hash once more."""
    closed = Finding(Kind.NOT_WRITABLE, "receipts", "a place to write", "read-only")

    def refuse(*_: object) -> None:
        raise NoSpace("closed", [closed])

    monkeypatch.setattr(install, "record", refuse)
    assert closed.line() in seed_cache(model.request()).notes
    assert snapshot(home, "a.bin") == model.good("a.bin")


def test_after_a_failure_receipts_hold_all_the_same(
    model: Toy, counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link that was made before something failed leaves no file to be hashed again."""
    real = hub_cache.seed

    def seed_and_fail(*arguments: Any) -> Any:
        real(*arguments)
        raise NoSpace("full")

    monkeypatch.setattr(hub_cache, "seed", seed_and_fail)
    with pytest.raises(NoSpace):
        seed_cache(model.request())
    assert is_verified(model)
    assert counted == []


def test_a_write_while_seeding_is_found_out(model: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that changes between the proof and the link gets no new receipt, but an error."""
    real = hub_cache.seed

    def seed_and_write(*arguments: Any) -> Any:
        flip(model.installed("a.bin"))
        return real(*arguments)

    monkeypatch.setattr(hub_cache, "seed", seed_and_write)
    with pytest.raises(WrongContent):
        seed_cache(model.request())
    state = apply.status(model.request()).state
    assert state.artifacts[0].installed.state is FileState.UNVERIFIED


def test_a_bad_blob_is_mended_once_the_file_is(model: Toy, home: Path) -> None:
    """Damage to the linked bytes is in both places; weights mends one, seeding the other."""
    seed_cache(model.request())
    model.installed("a.bin").chmod(0o644)
    flip(model.installed("a.bin"))
    assert snapshot(home, "a.bin") != model.good("a.bin")
    with pytest.raises(WrongContent):
        seed_cache(model.request())
    assert apply.weights(model.request(), smoke=False).error is None
    assert seed_cache(model.request()).files[0].how is How.REPLACED
    assert snapshot(home, "a.bin") == model.good("a.bin")


# ---- a dry run


def test_a_dry_run_says_what_would_be_done_and_does_nothing(model: Toy, home: Path) -> None:
    """Each file with its size, what is known of it and where it would be; nothing is written."""
    receipt_path(model.installed("b.bin").parent, "b.bin").unlink()
    before = stamps(model.root)
    seeded = command.seed_cache(model.request(), dry=True)
    assert stamps(model.root) == before
    assert not home.exists()
    a, b, _ = seeded.notes
    target = repository(home) / "snapshots" / COMMIT
    assert a == f"a.bin: {model.artifact('a.bin').size:,} bytes, verified, would be {target}/a.bin"
    assert "not verified yet" in b


def test_a_dry_run_fails_on_what_is_missing(model: Toy) -> None:
    """It ends as the real run would, as far as is known without hashing."""
    model.installed("a.bin").unlink()
    with pytest.raises(MissingInput):
        command.seed_cache(model.request(), dry=True)


# ---- the real client


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Request:
    """csm-tiny with a repository on the Hub, safetensors and config.json installed."""
    root = copy_tiny(tmp_path_factory.mktemp("tiny"))
    hub = f'[hub]\nrepo = "{REPO}"\nrevision = "{COMMIT}"\n\n[smoke]'
    manifest = root / "manifests" / "csm-tiny.toml"
    manifest.write_text(manifest.read_text().replace("[smoke]", hub))
    request = Request(root, "csm-tiny", ("safetensors",))
    assert apply.weights(request, smoke=False).error is None
    return request


def digests(request: Request) -> dict[str, str]:
    """What the manifest pins of the files that csm-tiny is loaded from."""
    data = tomllib.loads((request.root / "manifests" / "csm-tiny.toml").read_text())
    loaded = ("model.safetensors", "config.json")
    return {a["path"]: a["sha256"] for a in data["artifact"] if a["path"] in loaded}


def test_a_model_is_loaded_from_the_seeded_cache(tiny: Request, home: Path) -> None:
    """PyTorchModelHubMixin.from_pretrained has every tensor, offline, and opens no socket."""
    seeded = seed_cache(tiny)
    assert sorted(names(seeded)) == ["config.json", "model.safetensors"]
    pinned = digests(tiny)
    answer = ask_client(home, REPO, list(pinned), LOAD)
    assert answer["files"] == pinned
    assert (answer["sockets"], answer["equal"]) == (0, True)
    header = (tiny.root / "models" / "csm-tiny" / "model.safetensors").read_bytes()
    size = int.from_bytes(header[:8], "little")
    assert answer["tensors"] == len(json.loads(header[8 : 8 + size]))
