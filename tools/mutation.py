"""Change single places of the code at random, and list the changes that no test notices.

`python -m tools.mutation [--seed 1] [--count 150]` draws places in the rooms below and makes one
change at each, in copies of the repository. One run of the suite under coverage tells which tests
run which lines, also in programs that they start. A change is shown to the tests that run its
statement, those of its room and the fastest first, until one fails. What survives is printed as a
diff. A person decides whether such a change alters behaviour.
"""

from __future__ import annotations

import argparse
import ast
import math
import os
import random
import re
import shlex
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import Any

try:
    from cosmic_ray import plugins
    from cosmic_ray.ast import ast_nodes, get_ast_from_path
    from cosmic_ray.mutating import mutate_and_test, mutate_code
    from cosmic_ray.work_item import MutationSpec, TestOutcome
    from coverage import CoverageData
except ModuleNotFoundError:
    sys.exit("cosmic-ray or coverage is not installed. Run `make mutation`.")

ROOT = Path(__file__).parents[1]
ROOMS = ("formats", "pipeline", "store", "transfer", "verify")

#: Seconds of tests, as measured, that are run at once: the others follow if the change survives.
SHARES = (10.0, 60.0, math.inf)

#: The settings of coverage in every process of the run that it measures.
SETTINGS = """
[run]
include = */csm_weights/*
context = ${{PYTEST_CURRENT_TEST-}}
data_file = {folder}/data
parallel = true
[paths]
package =
    {root}/csm_weights
    */csm_weights
"""


def main() -> None:
    """Draw the changes, test each, and print what survived."""
    parser = argparse.ArgumentParser(prog="python -m tools.mutation", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=150)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="copies that work at once")
    parser.add_argument("--rooms", nargs="+", default=ROOMS, choices=ROOMS)
    parser.add_argument("--quick", action="store_true", help="at most a minute of tests a change")
    parser.add_argument("--measured", type=Path, help="folder of such a run's coverage, to keep it")
    options = parser.parse_args()
    chosen = draw(options.rooms, options.count, random.Random(options.seed))
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="mutation-") as scratch:
        copies: SimpleQueue[Path] = SimpleQueue()
        for number in range(options.jobs):
            copy = Path(scratch, str(number))
            subprocess.run(["git", "clone", "-q", "--shared", ROOT, copy], check=True)
            # Later runs write no bytecode, and are faster with what is there.
            subprocess.run(tests_of(copy, ["--collect-only", "-qq", "tests"]), check=True)
            copies.put(copy)
        suite = Suite.measure(copy, options.measured or Path(scratch, "measured"))

        def examine(change: MutationSpec) -> tuple[str, str]:
            copy = copies.get()
            try:
                return run(change, copy, suite, options.quick)
            finally:
                copies.put(copy)

        with ThreadPoolExecutor(options.jobs) as pool:
            for change, (outcome, told) in zip(chosen, pool.map(examine, chosen), strict=True):
                outcomes[outcome] += 1
                place = f"{change.module_path}:{change.start_pos[0]}"
                print(f"{outcome}: {change.operator_name.split('/')[-1]} at {place}", flush=True)
                print(told, flush=True)
    print(", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items())))


@dataclass(frozen=True)
class Suite:
    """The tests that run each line of a module, and the seconds that each test takes."""

    lines: dict[str, dict[int, list[str]]]
    seconds: dict[str, float]

    @classmethod
    def measure(cls, copy: Path, folder: Path) -> Suite:
        """Run the whole suite in a copy under coverage, unless `folder` has what that gives."""
        found, times = folder / "combined", folder / "seconds"
        if not found.exists():
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o777)  # some tests give up their privileges
            settings = folder / "coveragerc"
            settings.write_text(SETTINGS.format(folder=folder.absolute(), root=ROOT))
            tests = tests_of(copy, ["-p", "tools.mutation_contexts", "-n", "auto", "tests"])
            tests += ["--ignore", "tests/tools"]
            under = {**os.environ, "COVERAGE_PROCESS_START": str(settings.absolute())}
            subprocess.run([t for t in tests if t != "-x"], env=under, check=False)
            combine = [sys.executable, "-m", "coverage", "combine", "-q", f"--rcfile={settings}"]
            data = folder.absolute().glob("data.*")
            subprocess.run([*combine, f"--data-file={found}", *data], check=True)
        data = CoverageData(found)
        data.read()
        lines = {
            str(Path(file).relative_to(ROOT)): {
                line: [re.sub(r" \((setup|call|teardown)\)$", "", test) for test in tests]
                for line, tests in data.contexts_by_lineno(file).items()
            }
            for file in data.measured_files()
            if Path(file).is_relative_to(ROOT)
        }
        pairs = [line.split(" ", 1) for line in times.read_text().splitlines()]
        return cls(lines, {test: float(seconds) for seconds, test in pairs})

    def tests(self, change: MutationSpec) -> list[str]:
        """Return the tests that run what is changed: those of its room, then the fastest first."""
        module = str(change.module_path)
        statement = lines_of((ROOT / module).read_text(), change.start_pos[0])
        by_line = self.lines.get(module, {})
        found = {test for line, tests in by_line.items() if line in statement for test in tests}
        room = f"tests/{change.module_path.parts[1]}/"
        known = found & self.seconds.keys()
        return sorted(known, key=lambda t: (not t.startswith(room), self.seconds[t]))


def lines_of(source: str, line: int) -> range:
    """Return the lines whose run shows that the statement at `line` has run.

    These are its own, up to its body. A statement that runs while the module is imported acts
    on all of the module's functions, and the head of a function on that function.
    """
    nodes = [
        node for node in ast.walk(ast.parse(source)) if getattr(node, "lineno", line + 1) <= line
    ]
    kinds = (ast.stmt, ast.ExceptHandler)
    around = [n for n in nodes if isinstance(n, kinds) and line <= (n.end_lineno or n.lineno)]
    inner = max(around, key=lambda node: node.lineno, default=None)
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    if inner is None or not any(isinstance(node, functions) for node in around):
        return range(1, len(source.splitlines()) + 1)
    last = inner.end_lineno or inner.lineno
    if isinstance(body := getattr(inner, "body", None), list) and not isinstance(inner, functions):
        last = max(inner.lineno, body[0].lineno - 1)
    return range(inner.lineno, last + 1)


def draw(rooms: tuple[str, ...], count: int, chance: random.Random) -> list[MutationSpec]:
    """Return one change for each of `count` places, drawn evenly over the places of the rooms."""
    places: dict[tuple[str, tuple[int, int], str], list[MutationSpec]] = defaultdict(list)
    modules = [path for room in rooms for path in sorted(ROOT.glob(f"csm_weights/{room}/**/*.py"))]
    for path in modules:
        unevaluated = list(annotation_ranges(path.read_text()))
        nodes = list(ast_nodes(get_ast_from_path(path)))
        for name in sorted(plugins.operator_names()):
            kind: Any = plugins.get_operator(name)
            if kind.arguments():
                continue
            operator = kind()
            found = (place for node in nodes for place in operator.mutation_positions(node))
            for occurrence, (start, end) in enumerate(found):
                if any(first <= start < last for first, last in unevaluated):
                    continue
                module = str(path.relative_to(ROOT))
                change = MutationSpec(module, name, occurrence, start, end)
                family = name.split("/")[-1].split("_")[0]
                places[module, start, family].append(change)
    changes = (chance.choice(places[place]) for place in chance.sample(sorted(places), len(places)))
    return list(islice(filter(is_python, changes), count))


def is_python(change: MutationSpec) -> bool:
    """Return whether the change can be made, and the changed module compiles.

    `not` before `x := y` does not compile. cosmic-ray cannot change `except (a.b, c)`.
    """
    operator: Any = plugins.get_operator(change.operator_name)
    source = (ROOT / change.module_path).read_text()
    try:
        compile(mutate_code(source, operator(), change.occurrence) or "", "changed", "exec")
    except (SyntaxError, AttributeError):
        return False
    return True


def annotation_ranges(source: str) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Yield the half-open ranges of type annotations, which never run."""
    for node in ast.walk(ast.parse(source)):
        for field in ("annotation", "returns"):
            part = getattr(node, field, None)
            if isinstance(part, ast.expr):
                last = (part.end_lineno or part.lineno, part.end_col_offset or 0)
                yield (part.lineno, part.col_offset), last


def tests_of(copy: Path, arguments: list[str]) -> list[str]:
    """Return the command that runs tests of a copy, up to the first that fails."""
    pytest = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-n", "0"]
    return ["env", "-C", str(copy), f"PYTHONPATH={copy}", *pytest, *arguments]


def run(change: MutationSpec, copy: Path, suite: Suite, is_quick: bool) -> tuple[str, str]:
    """Make the change in a copy and run its tests there; return the outcome and what tells it.

    That is the test that noticed the change, or the diff.
    """
    inside = MutationSpec(
        copy / change.module_path,
        change.operator_name,
        change.occurrence,
        change.start_pos,
        change.end_pos,
    )
    left, total = suite.tests(change), 0.0
    listed = copy.with_suffix(".tests")
    for most in SHARES[:-1] if is_quick else SHARES:
        part = []
        while left and total < most:
            part.append(left.pop(0))
            total += suite.seconds[part[-1]]
        listed.write_text("\n".join(part))
        command = tests_of(copy, [f"@{listed}"]) if part else ["true"]
        # A change that makes the tests hang is noticed.
        limit = 60 + 5 * sum(suite.seconds[test] for test in part)
        result = mutate_and_test([inside], shlex.join(command), limit)
        if result.test_outcome != TestOutcome.SURVIVED:
            break
    outcome = result.test_outcome.name if result.test_outcome else result.worker_outcome.name
    told = result.diff or ""
    if outcome == "KILLED":
        noticed = re.findall(r"^(?:FAILED|ERROR) .*", result.output, re.M)
        told = noticed[0] if noticed else result.output or "the tests cannot be imported"
    return outcome, f"{told}\n({len(left)} tests were not run)" if left else told


if __name__ == "__main__":
    main()
