"""What the doctor and the Hub's cache have to say, as text and JSON. Pure: prints nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict

from csm_weights.commands.doctor import CheckResult, DoctorReport, Verdict
from csm_weights.commands.render.report import dump, table
from csm_weights.commands.seed_cache import Seeding
from csm_weights.errors import Finding, printable


def diagnosis_text(diagnosis: DoctorReport) -> str:
    """Each check with its verdict, what stands in the way, and one verdict."""
    rows = [(check.name, str(check.verdict), check.found) for check in diagnosis.checks]
    blocks = [printable(diagnosis.subject), table(("check", "verdict", "found"), rows)]
    error = diagnosis.error
    in_the_way = _findings(diagnosis.checks, is_ok=False)
    blocks += _lines("what stands in the way:", in_the_way)
    blocks += _lines("good to know:", _findings(diagnosis.checks, is_ok=True))
    if error and error.advice:
        blocks.append("\n".join(printable(line) for line in error.advice.splitlines()))
    verdict = f"NOT OK: {error.message}" if error else f"OK: {diagnosis.promise}"
    return "\n\n".join([*blocks, printable(verdict)])


def _findings(checks: Iterable[CheckResult], is_ok: bool) -> list[Finding]:
    """The findings of checks that are, or are not, NOT OK; each once."""
    some = [check for check in checks if (check.verdict is not Verdict.NOT_OK) is is_ok]
    return list(dict.fromkeys(finding for check in some for finding in check.findings))


def _lines(title: str, findings: Iterable[Finding]) -> list[str]:
    lines = [f"  {finding.line()}" for finding in findings]
    return ["\n".join([title, *lines])] if lines else []


def diagnosis_json(diagnosis: DoctorReport) -> str:
    """`doctor --json`: every check with its findings, and the exit code of `inv weights`."""
    error = diagnosis.error
    return dump(
        subject=diagnosis.subject,
        ok=error is None,
        exit_code=error.exit_code if error else 0,
        message=error.message if error else "",
        checks=[asdict(check) for check in diagnosis.checks],
        findings=[asdict(finding) for finding in error.findings] if error else [],
        advice=error.advice if error else "",
    )


def seeding_text(seeding: Seeding) -> str:
    """Where each file is in the Hub's cache and how it came there, and who finds it now."""
    repo = seeding.manifest.repo
    blocks = [printable(f"{repo} in {seeding.cache}")]
    if seeding.files:
        rows = [(file.path, str(file.how), file.blob.name) for file in seeding.files]
        blocks.append(table(("file", "how", "blob"), rows))
    if seeding.notes:
        blocks.append("\n".join(printable(note) for note in seeding.notes))
    if seeding.files:
        blocks.append(printable(f"OK: with HF_HUB_OFFLINE=1, {_call(seeding)} finds it"))
    return "\n\n".join(blocks)


def _call(seeding: Seeding) -> str:
    """How a program asks for what the cache has now."""
    repo, revision = seeding.manifest.repo, seeding.manifest.revision
    is_main = seeding.main == revision
    return f'from_pretrained("{repo}"{"" if is_main else f", revision={revision!r}"})'


def seeding_json(seeding: Seeding) -> str:
    """`seed-cache --json`: each file's path in the repository, its blob, and how it came."""
    return dump(
        model=seeding.manifest.name,
        ok=True,
        exit_code=0,
        repo=seeding.manifest.repo,
        revision=seeding.manifest.revision,
        main=seeding.main,
        cache=str(seeding.cache),
        files=[
            {"path": file.path, "how": str(file.how), "blob": str(file.blob)}
            for file in seeding.files
        ],
        notes=list(seeding.notes),
    )
