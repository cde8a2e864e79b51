"""Results as JUnit XML, which CI systems show as tests: one for each gate of each file. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from xml.etree import ElementTree

from csm_weights.commands.render import verdict
from csm_weights.commands.render.verdict import Ended
from csm_weights.errors import printable
from csm_weights.pipeline.session import Outcome


@dataclass(frozen=True)
class _Case:
    """One test: `ok` is None where it was not run."""

    group: str
    name: str
    ok: bool | None
    message: str
    details: str = ""


def render(ended: Ended) -> str:
    """Return a task as a suite: its checks one by one, and last itself, with all findings."""
    details = str(ended.error) if ended.error else ""
    words = (verdict.render(ended), details)
    cases = [*_checks(ended), _Case(ended.command, ended.title, not ended.error, *words)]
    failed, skipped = ([case.ok for case in cases].count(ok) for ok in (False, None))
    numbers = {"tests": len(cases), "failures": failed, "errors": 0, "skipped": skipped}
    attributes = {name: str(number) for name, number in numbers.items()}
    attributes |= {"name": printable(ended.title), "time": f"{ended.seconds:.3f}"}
    root = ElementTree.Element("testsuites", attributes)
    suite = ElementTree.SubElement(root, "testsuite", attributes)
    for case in cases:
        names = {"classname": printable(case.group), "name": printable(case.name)}
        seconds = f"{ended.seconds:.3f}" if case is cases[-1] else "0"
        element = ElementTree.SubElement(suite, "testcase", {**names, "time": seconds})
        if not case.ok:
            kind = {"message": printable(case.message)}
            word = "skipped" if case.ok is None else "failure"
            ElementTree.SubElement(element, word, kind).text = case.details or None
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True)


def _checks(ended: Ended) -> Iterator[_Case]:
    """Yield each gate of each file, each check of a smoke test, and each of the doctor's."""
    if isinstance(ended.result, Outcome):
        for gate in ended.result.results:
            details = "\n".join(finding.line() for finding in gate.findings)
            found = f"expected {gate.expected}, found {gate.found}"
            yield _Case(f"{ended.model}.{gate.path}", gate.gate, gate.ok, found, details)
        for check in ended.result.smoke.checks if ended.result.smoke else ():
            found = f"found {check.value}, limit {check.limit}"
            yield _Case(f"{ended.model}.smoke", check.name, check.ok, found)
    else:  # the doctor's
        for check in getattr(ended.result, "checks", ()):
            ok = None if check.verdict == "not asked" else check.verdict != "NOT OK"
            details = "\n".join(finding.line() for finding in check.findings)
            yield _Case("doctor", check.name, ok, check.found, details)
