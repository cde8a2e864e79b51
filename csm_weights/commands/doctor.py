"""What stands in the way of `inv weights`, found out before anything is fetched or written.

Servers are asked only where the plan would ask them; see `probe`.
"""

from __future__ import annotations

import contextlib
import enum
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.parse import urlsplit

from csm_weights.commands.probe import ProbeResults, Server, probe
from csm_weights.config import PUBLIC_ENDPOINT, HubEnvironment
from csm_weights.errors import CsmWeightsError, Finding, Kind, MissingInput, error_for
from csm_weights.model import offline_assets
from csm_weights.pipeline import apply
from csm_weights.pipeline.plan import Plan
from csm_weights.pipeline.request import Request, find_manifest
from csm_weights.pipeline.session import Session, StatusReport, begin
from csm_weights.progress import format_size
from csm_weights.transfer.policy import HUB

_ELSEWHERE = "nothing comes from there"
_NO_REPOSITORY = "the manifest names no repository of the Hub"


class Verdict(enum.StrEnum):
    """The result of a check; the value is the word a person reads."""

    OK = "OK"
    NOT_OK = "NOT OK"
    NOTE = "note"
    NOT_ASKED = "not asked"


@dataclass(frozen=True)
class CheckResult:
    """One thing that was checked; its findings stand in the way where it is NOT OK."""

    name: str
    verdict: Verdict
    found: str
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True)
class DoctorReport:
    """All checks, and the error that the command would end with.

    `promise` is what holds where there is none.
    """

    subject: str
    checks: tuple[CheckResult, ...]
    promise: str
    error: CsmWeightsError | None = None


def examine(request: Request, smoke: bool = True) -> DoctorReport:
    """Check whether `inv weights` could do what is asked, and what stands in its way.

    Nothing is hashed or written. Raises UsageError, ManifestInvalid.
    """
    session = begin(request)
    status = apply.status_of(session)
    case = _Case(session, status, HubEnvironment.read(), probe(session, status.plan))
    loads = smoke and any(item.artifact.is_weights for item in status.state.artifacts)
    disk = _disk(case)
    unneeded = [(name, Verdict.NOT_ASKED, "no smoke test is to run") for name in ("torch", "GPU")]
    torch, gpu = (_torch(), _gpu()) if loads else (CheckResult(*check) for check in unneeded)
    network = (_token(case), _access(case), _mirrors(case), _hosts(case), _proxy(case))
    checks = (_plan(case), _chunk_files(case), _cache(case), *network, disk, torch, gpu)
    # inv weights ends with the first of these that it meets.
    hurdles = (case.plan.findings, disk.findings, tuple(case.results.blocking), torch.findings)
    findings = next(filter(None, hurdles), ())
    name = session.manifest.name
    message = f"{name}: inv weights would not succeed"
    options = f"{' --consume' * request.consume}{'' if smoke else ' --no-smoke'}"
    return DoctorReport(
        f"{name} -> {status.state.paths.destination}",
        checks,
        f"{session.paths.command('weights')}{options} could succeed",
        error_for(message, findings, status.advice) if findings else None,
    )


def closure(request: Request) -> DoctorReport:
    """Check which repositories that CSM needs to speak are in the Hub's cache; offline."""
    environment = HubEnvironment.read()
    is_installed = False
    if find_manifest(request.root, request.model).repo == offline_assets.CSM:
        chosen = Request(request.root, request.model, ("safetensors",), request.dest)
        is_installed = apply.status(chosen).plan.is_done
    needs = offline_assets.find_assets(environment.cache, is_installed)
    checks = tuple(_needed(need, environment) for need in needs)
    findings = [finding for check in checks for finding in check.findings]
    error = MissingInput("CSM cannot speak offline yet", findings) if findings else None
    subject = f"what CSM needs to speak offline, in {environment.cache}"
    return DoctorReport(subject, checks, "CSM can speak with HF_HUB_OFFLINE=1", error)


def _needed(need: offline_assets.Asset, environment: HubEnvironment) -> CheckResult:
    if need.here:
        return CheckResult(need.repo, Verdict.OK, f"here: {need.purpose}")
    help_text = need.command
    if need.gated and need.command.startswith("hf "):
        help_text = f"accept the terms at {environment.page(need.repo)}, then {need.command}"
    if need.optional:
        return CheckResult(need.repo, Verdict.NOTE, f"not here: {need.purpose}; {help_text}")
    found = f"no {', '.join(need.missing)}"
    finding = Finding(Kind.MISSING, need.repo, "its files in the cache", found, help_text)
    return CheckResult(need.repo, Verdict.NOT_OK, f"not here: {need.purpose}", (finding,))


# ---- the checks


@dataclass(frozen=True)
class _Case:
    session: Session
    status: StatusReport
    environment: HubEnvironment
    results: ProbeResults

    @property
    def plan(self) -> Plan:
        """The plan of `inv weights`."""
        return self.status.plan

    def judge(self, name: str, found: str, findings: Iterable[Finding] = ()) -> CheckResult:
        """Return a check with these findings: NOT OK where one of them stands in the way."""
        some = tuple(findings)
        in_the_way = {*self.results.blocking, *self.plan.findings}
        verdict = Verdict.NOT_OK if in_the_way.intersection(some) else Verdict.NOTE
        return CheckResult(name, verdict if some else Verdict.OK, found, some)

    def unasked(self, name: str, found: str, problems: Sequence[Finding]) -> CheckResult:
        """Return a check of servers that are not asked: NOT OK where a problem keeps help away."""
        if problems and self.plan.findings:
            return CheckResult(name, Verdict.NOT_OK, str(problems[0].kind), tuple(problems))
        return CheckResult(name, Verdict.NOT_ASKED, found)

    def problems(self, kind: Kind, of_hub: bool = True) -> list[Finding]:
        """Return why the Hub, or else the mirrors, are not among the servers of this run."""
        page = self.environment.page(self.session.manifest.repo or "")
        problems = self.session.policy.problems
        return [f for f in problems if f.kind is kind and (f.where == page) is of_hub]


def _plan(case: _Case) -> CheckResult:
    plan, items = case.plan, case.status.state.artifacts
    if plan.is_done:
        found = f"nothing to do: {len(items)} files installed and verified"
        return CheckResult("plan", Verdict.OK, found)
    planned = {action.artifact.path for action in plan.actions}
    fetches, reads, writes = (
        sum(getattr(action, f"bytes_{name}") for action in plan.actions)
        for name in ("fetched", "read", "written")
    )
    over_network = f"{format_size(fetches)} to fetch, " if fetches else ""
    found = f"{len(planned)} of {len(items)} files can be had"
    found += f": {over_network}{format_size(reads)} to read, {format_size(writes)} to write"
    return case.judge("plan", found, plan.findings)


def _chunk_files(case: _Case) -> CheckResult:
    items = [item for item in case.status.state.artifacts if item.artifact.pieces]
    if not case.session.policy.chunks:
        return CheckResult("parts", Verdict.NOT_ASKED, "the source named takes none")
    if not items:
        return CheckResult("parts", Verdict.NOT_ASKED, "the manifest names none")
    verdict, texts = Verdict.OK, []
    for item in items:
        bad = [*(part.finding for part in item.chunks if part.finding), *item.extras]
        if set(bad).intersection(case.plan.findings):
            verdict = Verdict.NOT_OK
        elif bad and verdict is Verdict.OK:
            verdict = Verdict.NOTE
        wrong = dict.fromkeys(f.kind for f in bad if f.kind is not Kind.MISSING)
        good = sum(part.is_usable for part in item.chunks)
        text = f"{item.artifact.path} {good} of {len(item.chunks)}"
        texts.append(f"{text} ({', '.join(wrong)})" if wrong else text)
    return CheckResult("parts", verdict, "; ".join(texts))


def _cache(case: _Case) -> CheckResult:
    cache, repo = case.environment.cache, case.session.manifest.repo
    if not repo:
        return CheckResult("Hub cache", Verdict.NOT_ASKED, _NO_REPOSITORY)
    if not case.session.policy.cache:
        return CheckResult("Hub cache", Verdict.NOT_ASKED, "the source named does without")
    held = [item.artifact.path for item in case.status.state.artifacts if item.cached]
    if not held:
        return CheckResult("Hub cache", Verdict.NOTE, f"nothing of {repo} in {cache}")
    return CheckResult("Hub cache", Verdict.OK, f"{', '.join(held)} in {cache}")


def _token(case: _Case) -> CheckResult:
    holder, hub = case.environment.token_from, case.results.hub
    if not case.session.manifest.repo:
        return CheckResult("token", Verdict.NOT_ASKED, _NO_REPOSITORY)
    if hub is None:
        found, problems = f"{holder or 'none'}; {_ELSEWHERE}", case.problems(Kind.NO_TOKEN)
        check = case.unasked("token", found, problems)
        is_none = check.verdict is Verdict.NOT_ASKED and not holder
        return CheckResult("token", Verdict.NOTE, check.found) if is_none else check
    of_the_token = (Kind.NO_TOKEN, Kind.UNKNOWN_TOKEN, Kind.SCOPE)
    blamed = [finding for finding in hub.findings if finding.kind in of_the_token]
    if blamed:
        return case.judge("token", f"{holder or 'none'}: {blamed[0].kind}", blamed)
    if not holder:
        return CheckResult("token", Verdict.NOTE, "none, and none is needed")
    owner = case.results.owner or "the Hub did not report whose"
    return case.judge("token", f"{holder}, {owner}")


def _access(case: _Case) -> CheckResult:
    manifest, hub = case.session.manifest, case.results.hub
    if not manifest.repo:
        return CheckResult("access", Verdict.NOT_ASKED, _NO_REPOSITORY)
    if hub is None:
        lacks_token = case.plan.findings and case.problems(Kind.NO_TOKEN)
        reason = "no token to ask with" if lacks_token else _ELSEWHERE
        return case.unasked("access", reason, case.problems(Kind.OFFLINE))
    revision = (manifest.revision or "")[:12]
    return case.judge("access", _given(hub, f"of {manifest.repo} at {revision}"), hub.findings)


def _given(server: Server, place: str) -> str:
    kinds = ", ".join(dict.fromkeys(str(finding.kind) for finding in server.findings))
    found = f"{len(server.gives)} of {len(server.asked)} files {place}"
    return f"{found}: {kinds}" if kinds else found


def _mirrors(case: _Case) -> CheckResult:
    mirrors = case.results.mirrors
    if not mirrors:
        problems = case.problems(Kind.OFFLINE, of_hub=False)
        is_named = problems or any(name != HUB for name in case.session.policy.remote)
        return case.unasked("mirrors", _ELSEWHERE if is_named else "none was named", problems)
    found = "; ".join(_given(mirror, f"from {mirror.url}") for mirror in mirrors)
    return case.judge("mirrors", found, [f for m in mirrors for f in m.findings])


def _hosts(case: _Case) -> CheckResult:
    hosts, endpoint = case.results.hosts, case.environment.endpoint
    if not hosts:
        return CheckResult("hosts", Verdict.NOT_ASKED, "none: nothing comes over the network")
    findings = [f for f in case.results.findings if f.kind in (Kind.NO_NETWORK, Kind.CERTIFICATE)]
    check = case.judge("hosts", ", ".join(hosts), findings)
    is_sent = case.results.hub and case.environment.token_from
    if not is_sent or endpoint == PUBLIC_ENDPOINT:
        return check
    clear = " in the clear" if endpoint.startswith("http:") else ""
    found = f"{check.found}; HF_ENDPOINT: the token goes{clear} to {urlsplit(endpoint).netloc}"
    verdict = check.verdict if findings else Verdict.NOTE
    return CheckResult("hosts", verdict, found, check.findings)


def _proxy(case: _Case) -> CheckResult:
    if not case.results.hosts:
        return CheckResult("proxy", Verdict.NOT_ASKED, "none: nothing comes over the network")
    # The import loads requests, and with it urllib3, which opens a socket to look for IPv6.
    from csm_weights.transfer.http.environment import proxy_for

    ways = {host: proxy_for(url) for host, url in case.results.hosts.items()}
    # Without the credentials that a proxy's URL may have.
    shown = {host: re.sub(r"^([\w+.-]+://)?.*@", r"\1***@", way) for host, way in ways.items()}
    texts = [f"{host} {f'by {way}' if way else 'directly'}" for host, way in shown.items()]
    findings = [f for f in case.results.findings if f.kind is Kind.PROXY]
    return case.judge("proxy", ", ".join(texts) if any(ways.values()) else "none", findings)


def _disk(case: _Case) -> CheckResult:
    """Check the room, in bytes, and the permission for what the plan writes."""
    state, texts = case.status.state, []
    for name, folder, free in (
        ("staging", state.paths.staging, state.free_staging),
        ("destination", state.paths.destination, state.free_destination),
    ):
        if needed := case.plan.room(name):
            texts.append(f"{format_size(needed)} to write in {folder}, {format_size(free)} free")
    findings = [f for f in case.plan.findings if f.kind is Kind.NO_SPACE]
    for folder in () if case.plan.is_done else (state.paths.staging, state.paths.destination):
        above = (folder.absolute(), *folder.absolute().parents)
        if not os.access(next(p for p in above if p.exists()), os.W_OK | os.X_OK):
            help_text = "check its permissions, or choose another --dest"
            words = ("a folder that takes new files", "no permission", help_text)
            findings.append(Finding(Kind.NOT_WRITABLE, str(folder), *words))
    verdict = Verdict.NOT_OK if findings else Verdict.OK
    return CheckResult("disk", verdict, "; ".join(texts) or "nothing to write", tuple(findings))


def _torch() -> CheckResult:
    with contextlib.suppress(PackageNotFoundError):
        if importlib.util.find_spec("torch"):
            return CheckResult("torch", Verdict.OK, version("torch"))
    help_text = (
        "make weights installs it, or .venv/bin/pip install -c constraints.txt -e '.[smoke]';"
        " --no-smoke (make: SMOKE=no) does without"
    )
    expected = "torch, which runs the model in the smoke test"
    finding = Finding(Kind.NOT_INSTALLED, "torch", expected, "none", help_text)
    return CheckResult("torch", Verdict.NOT_OK, "not installed", (finding,))


def _gpu() -> CheckResult:
    """Name the graphics cards without importing torch; having none is not an error."""
    on_cpu = "the smoke test runs on the CPU"
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return CheckResult("GPU", Verdict.NOTE, f"hidden by CUDA_VISIBLE_DEVICES: {on_cpu}")
    program, listed = shutil.which("nvidia-smi"), ""
    if program:
        figures = "--query-gpu=name,memory.free,memory.total"
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = [program, figures, "--format=csv,noheader"]
            listed = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
    cards = [line.split(", ") for line in listed.splitlines() if line.count(", ") == 2]
    if cards:
        found = "; ".join(f"{name}, {free} of {total} free" for name, free, total in cards)
        return CheckResult("GPU", Verdict.OK, found)
    if Path("/dev/nvidiactl").exists():
        return CheckResult("GPU", Verdict.NOTE, "a driver is here, and nvidia-smi names no card")
    return CheckResult("GPU", Verdict.NOTE, f"none: {on_cpu}")
