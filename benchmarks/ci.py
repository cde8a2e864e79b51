"""Measures what 200 CI jobs ask of a Hub with the real rate limit, and `hf download` beside it.

    make bench-ci
    python -m benchmarks.ci --jobs 20 --write     # fewer, and puts the figures into the report

A fifth of the jobs are pull requests from forks, which have no token. A cold job has an empty
cache, a warm one that of the first cold job. All of them share one address, and so one limit:
3,000 requests for files in five minutes, and 500 of the API. Our jobs are the steps of action.yml,
run as a shell would; those beside run `hf download` of the same two files, with HF_HOME as the
folder that is cached. Results go to stdout as Markdown.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import BIN, ROOT, Row, machine, table, write_report
from tests.support.actions import Caches, Runner
from tests.support.gated import FILES, REPO, WEIGHTS, manifest
from tests.support.hub import HubServer

#: Jobs that run at the same time.
AT_ONCE = 3

FORK = {
    "pull_request": {"head": {"repo": {"full_name": "b/x"}}, "base": {"repo": {"full_name": "a/x"}}}
}


@dataclass(frozen=True)
class Phase:
    """What some jobs came to: how many failed, and what they asked for."""

    jobs: int
    failed: int
    most: int
    to_hub: int
    refused: int
    to_storage: int


class Bench:
    """A Hub with quotas, and folders for jobs."""

    def __init__(self, folder: Path, hub: HubServer, jobs: int) -> None:
        self.folder = folder
        self.hub = hub
        self.tokens = ["" if number % 5 == 4 else f"hf_{number}" for number in range(jobs)]
        for token in filter(None, self.tokens):
            hub.add_token(token)
        self.commit = hub.add_repo(REPO, FILES, gated=True)
        self.caches: Caches = {}
        self.home = folder / "home"

    def ours(self, token: str, folder: Path, is_warm: bool) -> bool:
        """Run the action in a fresh folder; return whether the job passed."""
        venv = folder / "temp" / "csm-weights" / "venv"
        (folder / "checkout" / "manifests").mkdir(parents=True)
        (folder / "checkout" / "manifests" / "gated.toml").write_text(manifest(self.commit))
        venv.parent.mkdir(parents=True)
        venv.symlink_to(sys.prefix)
        caches = self.caches if is_warm else {}
        environment = {"HF_ENDPOINT": self.hub.endpoint, "PYTHONPATH": str(ROOT)}
        runner = Runner(
            ROOT, folder / "checkout", folder / "temp", caches, environment, ["install"]
        )
        event = {} if token else FORK
        job = runner.run({"model": "gated", "token": token}, event)
        if not is_warm and not self.caches:
            self.caches = caches
        if not job.ok:
            print(job.log, file=sys.stderr)
        return job.ok and (job.outputs["cache-hit"] == "true") is (is_warm and bool(token))

    def hf(self, token: str, folder: Path, is_warm: bool) -> bool:
        """Run hf download with an empty HF_HOME, or with that of the first job."""
        home = folder / "home"
        if is_warm:
            shutil.copytree(self.home, home, symlinks=True)
        environment = {
            **{name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ},
            "HF_ENDPOINT": self.hub.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            **({"HF_TOKEN": token} if token else {}),
        }
        words = ["download", REPO, WEIGHTS, "config.json"]
        done = subprocess.run([BIN / "hf", *words], env=environment, capture_output=True)
        if not is_warm and not self.home.exists():
            shutil.copytree(home, self.home, symlinks=True)
        return done.returncode == 0

    def phase(self, run: Callable[[str, Path, bool], bool], is_warm: bool) -> Phase:
        """Run all jobs, a few at a time; the first alone, since it fills the cache."""
        self.hub.clear()
        folders = [self.folder / f"job-{number}" for number in range(len(self.tokens))]

        def job(pair: tuple[str, Path]) -> bool:
            token, folder = pair
            folder.mkdir()
            passed = run(token, folder, is_warm)
            shutil.rmtree(folder)
            return passed

        pairs = list(zip(self.tokens, folders, strict=True))
        with ThreadPoolExecutor(AT_ONCE) as pool:
            passed = [job(pairs[0]), *pool.map(job, pairs[1:])]
        asked = self.hub.requests("hub")
        by_job = Counter(request.headers.get("authorization", "") for request in asked)
        return Phase(
            jobs=len(pairs),
            failed=passed.count(False),
            most=max((count for token, count in by_job.items() if token), default=0),
            to_hub=len(asked),
            refused=sum(request.status == 429 for request in asked),
            to_storage=len(self.hub.requests("storage")),
        )


def measure(folder: Path, jobs: int) -> list[Row]:
    """All four phases: ours and hf, cold and warm, each pair with quotas that begin anew."""
    phases = {}
    for name in ("ours", "hf"):
        with HubServer() as hub:
            hub.has_quotas = True
            bench = Bench(folder, hub, jobs)
            for temperature in ("cold", "warm"):
                run = {"ours": bench.ours, "hf": bench.hf}[name]
                phases[name, temperature] = bench.phase(run, temperature == "warm")
                print(name, temperature, phases[name, temperature], file=sys.stderr)
    goals = {("failed", "cold"): "0", ("failed", "warm"): "0"}
    goals |= {("most", "cold"): "at most 30", ("most", "warm"): "0"}
    words = {
        "failed": "jobs that failed",
        "most": "requests to the Hub with the token of one job, at most",
        "to_hub": "requests to the Hub by all jobs",
        "refused": "requests that the Hub refused with 429",
        "to_storage": "requests to the storage host by all jobs",
    }
    rows = []
    for temperature in ("cold", "warm"):
        ours, hf = phases["ours", temperature], phases["hf", temperature]
        for name, text in words.items():
            figures = f"{getattr(ours, name):,}", f"{getattr(hf, name):,}"
            what = f"{jobs} jobs, {temperature}: {text}"
            rows.append(Row(what, *figures, "", goals.get((name, temperature), "")))
    return rows


def main() -> None:
    """Measures all of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    options = parser.parse_args()
    # Outside the checkout, as a job's own folder is: Python imports from the checkout here.
    with tempfile.TemporaryDirectory(prefix="csm-bench-ci-") as folder:
        rows = measure(Path(folder), options.jobs)
    text = f"{machine()}; one run.\n\n{table(rows)}"
    print(text)
    if options.write:
        write_report(text, "measured jobs")


if __name__ == "__main__":
    main()
