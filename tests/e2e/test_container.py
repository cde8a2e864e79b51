"""The image and the pod: what their files say, and, with buildah and crun, what they do."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from csm_weights.commands import cli
from tests.support.clone import REPOSITORY
from tests.support.gated import FILES, REPO, WEIGHTS, manifest
from tests.support.hub import HubServer

DOCKERFILE = (REPOSITORY / "Dockerfile").read_text()
RECIPE = REPOSITORY / "recipes" / "kubernetes" / "csm-1b.yaml"
OBJECTS = list(yaml.safe_load_all(RECIPE.read_text()))
POD = next(one for one in OBJECTS if one["kind"] == "Deployment")["spec"]["template"]["spec"]
GROUP = POD["securityContext"]["fsGroup"]
[INIT], [APP] = POD["initContainers"], POD["containers"]

TOKEN = "hf_secret_of_the_build"

#: Before a command that knows no machine with both versions of cgroups.
OWN_CGROUPS = (
    *("unshare", "--mount", "sh", "-c"),
    'umount -R /sys/fs/cgroup; mount -t cgroup2 none /sys/fs/cgroup; exec "$@"',
    "sh",
)


# ---- what the files say


def test_the_token_is_a_secret_of_the_build() -> None:
    """It is mounted for one command; no argument or variable of the image is named like one."""
    named = re.findall(r"^(?:ARG|ENV)\s+(.*)$", DOCKERFILE, re.MULTILINE)
    assert len(named) == 5 and not any(re.search("token|secret|key", n, re.I) for n in named)
    assert DOCKERFILE.count("--mount=type=secret,id=hf_token") == 1
    assert "COPY . " not in DOCKERFILE


def test_only_what_is_needed_goes_into_the_build() -> None:
    """The build gets named files, so that no file with a token is among them."""
    lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    copied = set(re.findall(r"^COPY (?!--)(.*) \S+$", DOCKERFILE, re.MULTILINE))
    names = {name for line in copied for name in line.split()}
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == names


@pytest.mark.parametrize("version", ["1.28", "1.33"])
@pytest.mark.parametrize("number", range(len(OBJECTS)))
def test_the_recipe_is_what_kubernetes_takes(number: int, version: str) -> None:
    """Each object has the keys of its kind, and no others."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    kubernetes_validate.validate(OBJECTS[number], version, strict=True)


@pytest.mark.parametrize("number", [0, 1])
def test_the_job_for_a_shared_volume_is_what_kubernetes_takes(number: int) -> None:
    """Each object of the Indexed Job has the keys of its kind, and no others."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    text = RECIPE.with_name("indexed-job.yaml").read_text()
    kubernetes_validate.validate(list(yaml.safe_load_all(text))[number], "1.33", strict=True)


def test_the_pod_has_no_privileges() -> None:
    """Neither container is root, writes to its root, or has a capability."""
    assert POD["securityContext"]["runAsNonRoot"] and POD["securityContext"]["runAsUser"] > 0
    for container in (INIT, APP):
        limits = container["securityContext"]
        assert limits["readOnlyRootFilesystem"] and not limits["allowPrivilegeEscalation"]
        assert limits["capabilities"] == {"drop": ["ALL"]}


def test_only_the_init_container_has_the_token() -> None:
    """The program gets the weights, to read; the token is a file, and no variable."""
    [mount] = APP["volumeMounts"]
    assert (mount["name"], mount["readOnly"], "env" in APP) == ("weights", True, False)
    assert {item["name"] for item in INIT["env"]} == {"HF_TOKEN_PATH"}
    task = cli.collection(REPOSITORY)[INIT["args"][0]]
    flags = {f"--{name}" for one in task.get_arguments() for name in one.names} | {"--no-smoke"}
    assert {word.partition("=")[0] for word in INIT["args"][1:]} <= flags
    verdict = next(word for word in INIT["args"] if word.startswith("--verdict="))
    assert verdict == f"--verdict={INIT['terminationMessagePath']}"


# ---- what they do


@dataclass
class Images:
    """Images in a store of their own, and the root file systems of those that are run."""

    folder: Path

    def buildah(self, *words: str | Path) -> str:
        """Run buildah; return what it prints."""
        own = ("--root", self.folder / "root", "--runroot", self.folder / "run")
        command = ["buildah", *own, "--storage-driver", "vfs", *words]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def build(self, tag: str, *options: str | Path) -> None:
        """Build a target of the Dockerfile, with the network of this machine."""
        network = ("--isolation", "chroot", "--network", "host")
        base = ("--build-arg", "BASE=localhost/base")
        self.buildah("bud", *network, *base, "-t", tag, *options, self.folder / "context")

    def rootfs(self, tag: str) -> Path:
        """Return the root file system of an image, unpacked."""
        container = self.buildah("from", "--pull-never", f"localhost/{tag}")
        return Path(self.buildah("mount", container))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Images]:
    """A store with Debian's Python in place of the base image, and the context of a build."""
    for tool in ("buildah", "crun", "mmdebstrap"):
        if os.geteuid() or not shutil.which(tool):
            pytest.skip(f"needs root and {tool}, from Debian")
    folder = tmp_path_factory.mktemp("images")
    made = Images(folder)
    debian = ["mmdebstrap", "--variant=minbase", "--include=python3-venv,ca-certificates"]
    subprocess.run([*debian, "bookworm", folder / "base"], check=True, capture_output=True)
    if certificates := os.environ.get("PIP_CERT"):
        shutil.copy(certificates, folder / "base" / "etc" / "ca.crt")
        (folder / "base" / "etc" / "pip.conf").write_text("[global]\ncert = /etc/ca.crt\n")
    container = made.buildah("from", "scratch")
    made.buildah("copy", "-q", container, folder / "base", "/")
    made.buildah("commit", "-q", container, "localhost/base")
    context = folder / "context"
    context.mkdir()
    for name in ("Dockerfile", ".dockerignore", "pyproject.toml", "constraints.txt", "README.md"):
        shutil.copy(REPOSITORY / name, context)
    for name in ("csm_weights", "manifests"):
        shutil.copytree(REPOSITORY / name, context / name, symlinks=True)
    (context / "token.txt").write_text(TOKEN)
    yield made
    for container in made.buildah("containers", "-q").split():
        made.buildah("umount", container)
    shutil.rmtree(folder, ignore_errors=True)  # some gigabytes


@pytest.fixture(scope="module")
def hub(images: Images) -> Iterator[HubServer]:
    """A Hub with a gated model that a manifest of the images pins."""
    with HubServer() as hub:
        hub.add_token(TOKEN)
        commit = hub.add_repo(REPO, FILES, gated=True)
        path = images.folder / "context" / "manifests" / "gated.toml"
        path.write_text(manifest(commit))
        yield hub


@dataclass
class Pod:
    """The init container of the recipe: its volume, its secret, its termination message."""

    rootfs: Path
    folder: Path
    hub: HubServer
    uid: int = POD["securityContext"]["runAsUser"]
    said: str = ""

    def __post_init__(self) -> None:
        for name in ("weights", "hf"):
            (self.folder / name).mkdir()
        (self.folder / "hf" / "token").write_text(TOKEN)
        self.message = self.folder / "message"

    def run(self, *args: str, program: str = "csm-weights", volumes: bool = True) -> int:
        """Run it, or a program with other arguments, as Kubernetes does; return the exit code.

        It may be any user, has no capability, and a root that can only be read.
        """
        self.message.write_text("")
        self.message.chmod(0o666)
        volume, token = self.folder / "weights", self.folder / "hf" / "token"
        for path, mode in ((volume, 0o2775), (token, 0o440)):
            os.chown(path, 0, GROUP)
            path.chmod(mode)
        secret = next(m["mountPath"] for m in INIT["volumeMounts"] if m["name"] == "token")
        binds = [("/dev/termination-log", self.message, "rw")]
        if volumes:
            binds += [("/weights", volume, "rw"), (secret, token.parent, "ro")]
        words = [word.replace("csm-1b", "gated") for word in (args or INIT["args"])]
        config = self._config([program, *words], binds)
        (self.folder / "config.json").write_text(json.dumps(config))
        name, state = f"csm-weights-{os.getpid()}", str(self.folder / "crun")
        crun = ("crun", "--root", state, "--cgroup-manager=disabled", "run")
        command = [*OWN_CGROUPS, *crun, "--bundle", str(self.folder), name]
        done = subprocess.run(command, capture_output=True, text=True)
        self.said = done.stdout + done.stderr
        return done.returncode

    def _config(self, command: list[str], binds: list[tuple[str, Path, str]]) -> dict[str, object]:
        """The bundle's config: on this machine's network, where the Hub is."""
        variables = {item["name"]: item["value"] for item in INIT["env"]}
        variables |= {"PATH": "/opt/csm-weights/bin:/usr/bin:/bin", "HOME": "/"}
        variables |= {"PYTHONDONTWRITEBYTECODE": "1", "HF_ENDPOINT": self.hub.endpoint}
        sets = ("bounding", "effective", "permitted", "inheritable", "ambient")
        mounts: list[dict[str, object]] = [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]},
        ]
        for where, path, mode in binds:
            bind = {"type": "bind", "source": str(path), "options": ["bind", mode]}
            mounts.append({"destination": where, **bind})
        return {
            "ociVersion": "1.0.2",
            "process": {
                "user": {"uid": self.uid, "gid": self.uid, "additionalGids": [GROUP]},
                "args": command,
                "env": [f"{name}={value}" for name, value in variables.items()],
                "cwd": "/weights",
                "capabilities": {name: [] for name in sets},
                "noNewPrivileges": True,
            },
            "root": {"path": str(self.rootfs), "readonly": True},
            "mounts": mounts,
            "linux": {"namespaces": [{"type": kind} for kind in ("mount", "pid", "ipc", "uts")]},
        }


@pytest.fixture(scope="module")
def tool(images: Images, hub: HubServer) -> Path:
    """The image with the program alone, unpacked."""
    assert hub.endpoint
    images.build("tool")
    return images.rootfs("tool")


@pytest.fixture
def pod(tool: Path, hub: HubServer, tmp_path: Path) -> Pod:
    """A pod with an empty volume."""
    hub.clear()
    return Pod(tool, tmp_path, hub)


@pytest.mark.integration
@pytest.mark.parametrize("uid", [POD["securityContext"]["runAsUser"], 4242])
def test_the_init_container_brings_the_weights(pod: Pod, uid: int) -> None:
    """As any user, with a read-only root; the verdict is its message; again, it asks nobody."""
    pod.uid = uid
    assert pod.run() == 0, pod.said
    assert pod.message.read_text() == "OK: installed and verified: gated, 2 files, 1.1 MiB\n"
    file = pod.folder / "weights" / "gated" / WEIGHTS
    assert (file.read_bytes(), file.stat().st_uid) == (FILES[WEIGHTS], uid)
    pod.hub.clear()
    assert pod.run() == 0, pod.said
    assert pod.hub.log == []


@pytest.mark.integration
def test_a_pod_does_not_start_on_wrong_bytes(pod: Pod) -> None:
    """A wrong token, and a file that is wrong and cannot be repaired, end it with a message."""
    (pod.folder / "hf" / "token").write_text("hf_wrong")
    assert pod.run() == 5
    assert pod.message.read_text().startswith("NOT OK: weights gated: exit code 5: ")
    assert "invalid token" in pod.message.read_text()
    (pod.folder / "hf" / "token").write_text(TOKEN)
    assert pod.run() == 0
    with (pod.folder / "weights" / "gated" / WEIGHTS).open("r+b") as file:
        file.seek(300_000)
        file.write(b"poison")
    message = "--verdict=/dev/termination-log"
    assert pod.run("verify", "--model=gated", "--dest=/weights/gated", message) == 4
    assert "bytes 204,800 to 409,599: wrong digest" in pod.message.read_text()


@pytest.mark.integration
def test_the_root_is_read_only_and_nothing_is_allowed(pod: Pod) -> None:
    """The tests of a pod hold it to what its recipe says."""
    code = "print(open('/proc/self/status').read(), flush=True); open('/opt/x', 'w')"
    assert pod.run("-c", code, program="python3") == 1
    assert re.findall(r"Cap\w+:\s+(\w+)", pod.said) == ["0" * 16] * 5
    assert "Read-only file system" in pod.said


@pytest.mark.integration
def test_an_image_with_weights_has_no_token(images: Images, hub: HubServer, tmp_path: Path) -> None:
    """No layer, no history and no variable has it; the weights are in it, and verify as anyone."""
    secret = ("--secret", f"id=hf_token,src={images.folder / 'context' / 'token.txt'}")
    arguments = ("--build-arg", "MODEL=gated", "--build-arg", f"HF_ENDPOINT={hub.endpoint}")
    images.build("weights", "--target", "weights", *secret, *arguments)
    assert any(TOKEN in request.headers.get("authorization", "") for request in hub.log)
    images.buildah("push", "-q", "localhost/weights", f"dir:{tmp_path / 'image'}")
    blobs = [read(path) for path in (tmp_path / "image").iterdir()]
    assert [TOKEN.encode() in blob for blob in blobs].count(True) == 0
    assert any(FILES[WEIGHTS][:1000] in blob for blob in blobs)
    assert any(b"hf_token" in blob for blob in blobs)  # the history has the command
    (tmp_path / "pod").mkdir()
    pod = Pod(images.rootfs("weights"), tmp_path / "pod", hub, uid=4242)
    hub.clear()
    words = ("verify", "--model=gated", "--dest=/weights/gated")
    assert pod.run(*words, volumes=False) == 0, pod.said
    assert hub.log == []


def read(path: Path) -> bytes:
    """The bytes of a blob, unpacked."""
    data = path.read_bytes()
    return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
