"""A stand-in for GitHub's runner: it runs the steps of a composite action as a shell would.

    runner = Runner(action=REPOSITORY, workspace=checkout, temp=tmp_path / "temp", caches={})
    job = runner.run({"model": "csm-tiny"}, event={"pull_request": ...})
    assert job.ok and job.outputs["model"] == "csm-tiny"

Each `run:` is a file that bash runs with `-e -o pipefail`, as GitHub does; its `env:` is all
that the inputs come in by. With `in_process` the steps of Python are called in this process,
which takes a tenth of the time. Of other actions it knows those of the cache, kept in a dict, and
passes over setup-python. Expressions have paths, strings, ==, !=, && and ||.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

from csm_weights.commands import action

#: What a cache holds: the files, by the key and the paths that they were saved with.
Caches = dict[tuple[str, str], dict[str, bytes]]

#: The folder of the job, in the paths of a cache.
_TEMP = "$RUNNER_TEMP"

#: The Python that the action installs itself into.
_PYTHON = re.escape("$RUNNER_TEMP/csm-weights/venv/bin/python")

#: A path of an expression, such as steps.fetch.outputs.path.
_PATH = re.compile(r"'[^']*'|\b(?:inputs|steps|env|runner|github)(?:\.[\w-]+)+")


@dataclass
class Job:
    """What became of a job: outputs of the action and of its steps, all that was printed."""

    ok: bool = True
    outputs: dict[str, str] = field(default_factory=dict)
    steps: dict[str, dict[str, str]] = field(default_factory=dict)
    log: str = ""
    summary: str = ""
    ran: list[str] = field(default_factory=list)


@dataclass
class Runner:
    """A machine with a checkout, an empty folder for the job, and the caches of a repository.

    `skip` are steps that are not run. `environment` is that of the job.
    """

    action: Path
    workspace: Path
    temp: Path
    caches: Caches
    environment: Mapping[str, str] = field(default_factory=dict)
    skip: Iterable[str] = ()
    in_process: bool = False

    def run(
        self,
        inputs: Mapping[str, str],
        event: Mapping[str, Any] | None = None,
        name: str = "pull_request",
        actor: str = "alice",
    ) -> Job:
        """Run the steps of the action until one fails."""
        spec = yaml.safe_load((self.action / "action.yml").read_text())
        assert inputs.keys() <= spec["inputs"].keys()
        defaults = {key: value.get("default", "") for key, value in spec["inputs"].items()}
        self._inputs, job = {**defaults, **inputs}, Job()
        self.temp.mkdir(parents=True, exist_ok=True)
        files = {key: self.temp / f"runner-{key}" for key in ("event", "summary")}
        files["event"].write_text(json.dumps(event or {}))
        files["summary"].write_text("")
        self._github = {
            "GITHUB_ACTIONS": "true",
            "GITHUB_ACTION_PATH": str(self.action),
            "GITHUB_ACTOR": actor,
            "GITHUB_EVENT_NAME": name,
            "GITHUB_EVENT_PATH": str(files["event"]),
            "GITHUB_STEP_SUMMARY": str(files["summary"]),
            "GITHUB_WORKSPACE": str(self.workspace),
            "RUNNER_TEMP": str(self.temp),
        }
        for step in spec["runs"]["steps"]:
            if job.ok and step["id"] not in self.skip and self._is_due(step, job):
                self._step(step, job)
        job.outputs = {k: self.fill(v["value"], job) for k, v in spec["outputs"].items()}
        job.summary = files["summary"].read_text()
        return job

    def fill(self, text: object, job: Job) -> str:
        """Return a text with its expressions evaluated."""
        replaced = re.sub(r"\$\{\{(.*?)\}\}", lambda m: self._value(m[1], job), str(text))
        assert "${{" not in replaced
        return replaced

    def _is_due(self, step: Mapping[str, Any], job: Job) -> bool:
        return "if" not in step or self._value(step["if"], job) == "true"

    def _value(self, expression: str, job: Job) -> str:
        def looked_up(match: re.Match[str]) -> str:
            if match[0].startswith("'"):
                return match[0]
            root, *rest = match[0].split(".")
            if root == "steps":
                return repr(job.steps.get(rest[0], {}).get(rest[2], ""))
            return repr({"inputs": self._inputs, "env": self.environment}[root].get(rest[0], ""))

        python = _PATH.sub(looked_up, expression)
        python = python.replace("||", " or ").replace("&&", " and ")
        value = eval(python.strip(), {"__builtins__": {}})
        return str(value).lower() if isinstance(value, bool) else str(value)

    def _step(self, step: Mapping[str, Any], job: Job) -> None:
        job.ran.append(step["id"])
        outputs = job.steps.setdefault(step["id"], {})
        given = {k: self.fill(v, job) for k, v in step.get("with", {}).items()}
        match step.get("uses", "").partition("@")[0]:
            case "":
                self._shell(step, job, outputs)
            case "actions/cache/restore":
                outputs |= self._restore(given)
            case "actions/cache/save":
                self._save(given)
            case "actions/setup-python":
                outputs["python-path"] = sys.executable
            case other:
                raise ValueError(f"the runner knows no action {other}")

    def _shell(self, step: Mapping[str, Any], job: Job, outputs: dict[str, str]) -> None:
        assert step["shell"] == "bash"
        assert "${{" not in step["run"], "an expression in a script is run by the shell"
        script, output = self.temp / "runner-step.sh", self.temp / "runner-output"
        script.write_text(step["run"])
        output.write_text("")
        variables = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.temp),
            "GITHUB_OUTPUT": str(output),
            **self.environment,
            **self._github,
            **{key: self.fill(value, job) for key, value in step.get("env", {}).items()},
        }
        module = re.fullmatch(rf'"{_PYTHON}" -P -m {action.__name__} (\w+)', step["run"])
        if self.in_process and module:
            code = self._call(module[1], variables, job)
        else:
            command = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", str(script)]
            done = subprocess.run(
                command,
                cwd=self.workspace,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            job.log, code = job.log + done.stdout.decode(), done.returncode
        job.ok, outputs["exit code"] = code == 0, str(code)
        for found in re.finditer(r"^(.+?)<<(.+)\n((?:.*\n)*?)\2\n", output.read_text(), re.M):
            outputs[found[1]] = found[3].removesuffix("\n")

    def _call(self, step: str, variables: Mapping[str, str], job: Job) -> int:
        said = io.StringIO()
        with (
            mock.patch.dict(os.environ, variables, clear=True),
            mock.patch.object(sys, "argv", ["action", step]),
            contextlib.chdir(self.workspace),
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
        ):
            try:
                action.main()
            except SystemExit as ended:
                job.log += said.getvalue()
                return int(str(ended.code))
        raise AssertionError("the step has not ended the process")

    def _restore(self, given: Mapping[str, str]) -> dict[str, str]:
        paths, saved = self._anywhere(given["path"]), self.caches.items()
        of_paths = {key: files for (key, saved_as), files in saved if saved_as == paths}
        older = [key for key in of_paths if key.startswith(given["restore-keys"])]
        key = given["key"] if given["key"] in of_paths else (older or [""])[-1]
        for name, data in of_paths.get(key, {}).items():
            path = Path(name.replace(_TEMP, str(self.temp)))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return {"cache-hit": str(key == given["key"]).lower() if key else ""}

    def _save(self, given: Mapping[str, str]) -> None:
        paths = given["path"].splitlines()
        files = {self._anywhere(path): Path(path).read_bytes() for path in paths}
        self.caches.setdefault((given["key"], self._anywhere(given["path"])), files)

    def _anywhere(self, paths: str) -> str:
        """Return paths that are the same on each machine, as GitHub's are."""
        return paths.replace(str(self.temp), _TEMP)

    def clear(self) -> None:
        """Empty the folder of the job, as between two jobs."""
        shutil.rmtree(self.temp, ignore_errors=True)
