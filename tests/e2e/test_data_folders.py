"""Data goes where only data lives: no file of a model is taken up by a program by itself."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from csm_weights.commands import lock
from csm_weights.errors import UsageError, WrongContent
from csm_weights.manifest.parse import load
from csm_weights.manifest.paths import SHIPPED, is_code
from csm_weights.manifest.render import render
from csm_weights.manifest.types import Artifact, Manifest
from csm_weights.pipeline import apply
from csm_weights.pipeline.request import Request
from tests.support.hub import HubServer

REPOSITORY = Path(__file__).resolve().parents[2]

#: What a program runs, or takes its settings from, when a file of that name is in its folder.
CODE = (
    *("tasks.py", "csm_weights/__init__.py", "torch.py", "sitecustomize.py", "conftest.py"),
    *("setup.py", "noxfile.py", "manage.py", "evil.pyc", "evil.pyd", "evil.so", "evil.so.1"),
    *("evil.dll", "evil.dylib", "evil.pth", "modeling.py", "sub/__init__.py", "x.pyw"),
    *("pytest.ini", "mypy.ini", "tox.ini", "setup.cfg", "pyproject.toml", "ruff.toml"),
    *("pyvenv.cfg", "flake8.cfg", "pip.ini", "Pipfile.toml", "evil.egg-link", "x.ipynb"),
    *("Makefile", "makefile", "GNUmakefile", "Makefile.sh", "rules.mk", "x.mak", "SConstruct"),
    *("Dockerfile", "Jenkinsfile", "Rakefile", "justfile", "build.sh", "run.bash", "x.zsh"),
    *("x.bat", "x.cmd", "x.ps1", "x.exe", "x.js", "x.mjs", "x.ts", "x.lua", "x.rb", "x.pl"),
    *(".envrc", ".env", ".gitmodules", ".gitattributes", ".gitignore", ".python-version"),
    *(".pylintrc", ".coveragerc", ".editorconfig", ".vimrc", ".exrc", ".nvimrc", ".bashrc"),
    *(".vscode/settings.json", ".vscode/tasks.json", ".idea/workspace.xml", ".dir-locals.el"),
    *(".github/workflows/x.yml", ".pre-commit-config.yaml", ".pth/x.json", ".config/pip/pip.conf"),
    *("invoke.yaml", "invoke.yml", "invoke.json", "package.json", "Pipfile", "docker-compose.yml"),
    *(
        "CMakeLists.txt",
        "build.gradle",
        "pom.xml",
        "meson.build",
        "BUILD",
        "Vagrantfile",
        "Gemfile",
    ),
    *("evil-1.0.dist-info/entry_points.txt", "evil.egg-info/entry_points.txt", "Taskfile.yml"),
    *("evil.whl", "evil.egg", "evil.vbs", "evil.hta", "evil.msi", "evil.lnk", "evil.node", "x.jsx"),
    *("x.desktop", "x.service", "x.command", "init.vim", "TASKS.PY", "SetUp.Cfg"),
)

#: Data by its name, that a program takes up where it lies in the folder of a project.
SETTINGS = (
    *("evil-1.0.dist-info/METADATA", "evil-1.0.dist-info/x", "evil.egg-info/PKG-INFO"),
    *("requirements.txt", "constraints.txt", "environment.yml", "pyrightconfig.json"),
    *("CHANGELOG.md", "README.md"),
    *("chunks/evil/SHA256SUMS", "manifests/csm-1b.golden.json", "docs/x.md", "tests/x.json"),
    *("Config.json", "MODEL.safetensors", "prompts/other.wav", "voice.json/x", "a.bin"),
)
NAMES = CODE + SETTINGS


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout with the files that make it one."""
    root = tmp_path / "checkout"
    for name in ("tasks.py", "Makefile", "csm_weights/__init__.py", ".git/config"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("# ours\n")
    return root


def with_manifest(root: Path, destination: str, *names: str) -> None:
    """Write a manifest of files that need no source: their text is in it."""
    text = "import os\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    files = tuple(Artifact(n, "g", "opaque", len(text), digest, text=text) for n in names)
    path = root / "manifests" / "evil.toml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(render(Manifest("evil", "output/evil", destination, files)))


def files(folder: Path) -> set[str]:
    return {
        p.relative_to(folder).as_posix()
        for p in folder.rglob("*")
        if p.is_file() and ".csm-weights" not in p.parts and p.name != ".lock"
    }


def weights(root: Path, *only: str, dest: str | None = None) -> None:
    outcome = apply.weights(Request(root, "evil", only, dest), smoke=False)
    assert outcome.error is None


def one_of_each(names: Iterable[str]) -> list[str]:
    """The names that can be in one folder on every file system."""
    return list({name.casefold(): name for name in names}.values())


def test_there_are_enough_names() -> None:
    """The table is long, and what is code by its name is told apart from data."""
    assert len(set(NAMES)) >= 100
    assert [name for name in CODE if not is_code(name)] == []
    assert [name for name in SETTINGS if is_code(name)] == []
    assert [name for name in SHIPPED if is_code(name)] == []


@pytest.mark.parametrize("name", ["csm-1b", "csm-tiny"])
def test_all_files_of_the_shipped_manifests_are_shipped_ones(name: str) -> None:
    """The files that a checkout's own folder takes are those of the manifests in it."""
    paths = {a.path for a in load(REPOSITORY / f"manifests/{name}.toml").artifacts}
    assert paths <= SHIPPED
    assert name == "csm-tiny" or paths == SHIPPED


@pytest.mark.parametrize("destination", [".", "csm_weights", "tests", "a/b", "chunks", "manifests"])
def test_no_manifest_brings_a_file_into_the_checkout(destination: str, root: Path) -> None:
    """Each name is refused in every folder that is not for data, and nothing is written."""
    for name in NAMES:
        with_manifest(root, destination, name)
        before = files(root)
        with pytest.raises(WrongContent) as caught:
            weights(root, name)
        assert caught.value.exit_code == 4
        assert files(root) == before


def test_no_dest_brings_a_file_into_a_checkout(root: Path, tmp_path: Path) -> None:
    """Whatever way --dest leads to the checkout, another one, or a package, it is refused."""
    (tmp_path / "link").symlink_to(root)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/pyproject.toml").touch()
    (tmp_path / "package").mkdir()
    (tmp_path / "package/__init__.py").touch()
    ways = [".", str(root), "models/..", str(tmp_path / "link"), str(tmp_path / "link/tests")]
    ways += [str(tmp_path / "other"), str(tmp_path / "package"), str(tmp_path / "x/.git/hooks")]
    ways += [next(entry for entry in sys.path if entry.endswith("site-packages"))]
    for name in NAMES:
        with_manifest(root, "models/evil", name)
        before = files(tmp_path)
        for dest in ways:
            with pytest.raises(WrongContent):
                weights(root, name, dest=dest)
        assert files(tmp_path) == before


def test_a_folder_below_the_destination_may_be_a_project_too(root: Path, tmp_path: Path) -> None:
    """A path that leads from a harmless folder into a project is refused."""
    (tmp_path / "home/project").mkdir(parents=True)
    (tmp_path / "home/project/Makefile").touch()
    with_manifest(root, "models/evil", "project/x.json")
    with pytest.raises(WrongContent, match="Makefile is there"):
        weights(root, "all", dest=str(tmp_path / "home"))
    with_manifest(root, "models/evil", "elsewhere/x.json")
    weights(root, "all", dest=str(tmp_path / "home"))
    assert (tmp_path / "home/elsewhere/x.json").is_file()


def test_a_folder_on_pythons_path_is_refused(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where Python imports from, no file of a model goes, by whatever name."""
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    (tmp_path / "lib/sub").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "lib/sub")
    with_manifest(root, "models/evil", "x.json")
    for way in ("lib", "lib/sub/new", "link", "link/new"):
        with pytest.raises(WrongContent, match="Python imports from"):
            weights(root, "all", dest=str(tmp_path / way))


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_the_files_of_csm_1b_go_where_nothing_is_imported_from(
    name: str, root: Path, tmp_path: Path
) -> None:
    """The checkout's own folder takes them, and a project's; no folder of modules does."""
    for module in ("csm_weights/model/x.py", "tools/x.py", "../package/__init__.py"):
        (root / module).parent.mkdir(exist_ok=True)
        (root / module).touch()
    (tmp_path / "link").symlink_to(root / "csm_weights")
    (tmp_path / "project").mkdir()
    (tmp_path / "project/pyproject.toml").touch()
    with_manifest(root, "models/evil", name)
    ways = ["csm_weights", "csm_weights/model/new", "tools", "models/../tools", ".git"]
    ways += [str(tmp_path / "link"), str(tmp_path / "package")]
    ways += [next(entry for entry in sys.path if entry.endswith("site-packages"))]
    before = files(tmp_path)
    for dest in ways:
        with pytest.raises(WrongContent, match=r"Python imports from|of git"):
            weights(root, "all", dest=dest)
    assert files(tmp_path) == before
    for dest in (".", "weights", str(tmp_path / "project")):
        weights(root, "all", dest=dest)
        assert (root / dest / name).is_file()


def test_code_is_fetched_only_by_its_name(root: Path) -> None:
    """All files of a model are its data; a file that is run is named by itself."""
    with_manifest(root, "models/evil", "a.bin", *one_of_each(CODE))
    weights(root, "all")
    assert files(root / "models/evil") == {"a.bin"}
    weights(root, "modeling.py", ".envrc")
    assert files(root / "models/evil") == {"a.bin", "modeling.py", ".envrc"}
    with_manifest(root, "models/evil", "modeling.py")
    with pytest.raises(UsageError, match="name each"):
        weights(root, "all")


def test_a_repository_of_the_hub_brings_no_code(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Locked and fetched whole, a repository brings its data below models/, and nothing else."""
    # What is named like weights has to have the structure of weights.
    usable = [name for name in one_of_each(NAMES) if not name.endswith(".safetensors")]
    with HubServer() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_HOME", str(root.parent / "hf"))
        hub.add_repo("org/evil", {name: f"# {name}\n".encode() for name in usable})
        lock.lock_repo(root, "org/evil", "", "", "", False)
        with pytest.raises(WrongContent):
            weights(root, "all", dest=".")
        weights(root, "all")
    assert files(root / "models/evil") == set(usable) - set(CODE)
    assert (root / "tasks.py").read_text() == "# ours\n"


def test_a_linked_models_folder_is_the_users_choice(root: Path, tmp_path: Path) -> None:
    """models/ may lie on another disk."""
    (tmp_path / "disk").mkdir()
    (root / "models").symlink_to(tmp_path / "disk")
    with_manifest(root, "models/evil", "a.bin")
    weights(root)
    assert os.listdir(tmp_path / "disk") == ["evil"]  # noqa: PTH208


@pytest.mark.parametrize("led_to", ["csm_weights", ".", "../elsewhere/site-packages"])
def test_a_link_below_models_leads_no_file_out(led_to: str, root: Path) -> None:
    """Only models/ itself may be a link: what lies below it is where it really is."""
    (root / led_to).mkdir(parents=True, exist_ok=True)
    (root / "models").mkdir()
    (root / "models" / "link").symlink_to(Path("..") / led_to)
    with_manifest(root, "models/link", "files.py", "data.bin")
    before = files(root)
    with pytest.raises(WrongContent, match="cannot be installed"):
        weights(root, "files.py", "data.bin")
    assert files(root) == before


def test_a_path_that_climbs_out_of_a_link_is_where_the_kernel_goes(
    root: Path, tmp_path: Path
) -> None:
    """LINK/../csm_weights is a folder of the checkout, though its text is not."""
    (root / "models").mkdir()
    (tmp_path / "link").symlink_to(root / "models")
    with_manifest(root, "models/evil", "data.bin")
    with pytest.raises(WrongContent, match="cannot be installed"):
        weights(root, dest=str(tmp_path / "link" / ".." / "csm_weights"))
    assert not (root / "csm_weights" / "data.bin").exists()


@pytest.mark.parametrize("folder", ["site-packages", "dist-packages/sub"])
def test_packages_of_any_python_are_refused(folder: str, root: Path, tmp_path: Path) -> None:
    """Also of one that is not this one: another environment, or a home."""
    target = tmp_path / "lib" / "python3.11" / folder
    target.mkdir(parents=True)
    with_manifest(root, "models/evil", "evil.pth")
    with pytest.raises(WrongContent, match="cannot be installed"):
        weights(root, "evil.pth", dest=str(target))


@pytest.mark.parametrize("dest", ["~no-such-user/x", "a\0b"])
def test_a_path_that_cannot_be_is_misuse(dest: str, root: Path) -> None:
    """A home that nobody has, or a NUL, is told as what it is."""
    with_manifest(root, "models/evil", "data.bin")
    with pytest.raises(UsageError, match="not a path"):
        weights(root, dest=dest)


def test_a_verified_file_of_another_model_is_not_replaced(root: Path) -> None:
    """It may be the only copy, once its chunk files were consumed."""
    with_manifest(root, "models/evil", "data.bin")
    weights(root)
    path = root / "manifests" / "evil.toml"
    other = path.read_text().replace('name = "evil"', 'name = "other"')
    digest = hashlib.sha256(b"import os\n").hexdigest()
    others = hashlib.sha256(b"import re\n").hexdigest()
    other = other.replace(digest, others).replace("import os", "import re")
    path.with_name("other.toml").write_text(other)
    outcome = apply.status(Request(root, "other"), check=True)
    assert outcome.error is not None
    assert "a verified file of evil" in str(outcome.plan.findings)
    with pytest.raises(WrongContent, match="evil"):
        apply.weights(Request(root, "other"), smoke=False)
    assert (root / "models/evil/data.bin").read_bytes() == b"import os\n"


@pytest.mark.parametrize("part", ["recombine.sh", "models/x/a.bin", "output/a", "chunks"])
def test_chunk_files_lie_below_chunks(part: str, root: Path) -> None:
    """A manifest that calls another file a chunk file, to have it consumed, is refused."""
    piece = f'{{ part = "{part}", offset = 0, size = 1, sha256 = "{"0" * 64}" }}'
    with_manifest(root, "models/evil", "a.bin")
    path = root / "manifests/evil.toml"
    text = path.read_text().partition("text = ")[0].replace("size = 10", "size = 1")
    path.write_text(f"{text}pieces = [{piece}]\n")
    with pytest.raises(WrongContent, match="a file below chunks/"):
        load(path)
