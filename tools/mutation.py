"""Change single places of the code at random, and list the changes that no test notices.

`python -m tools.mutation [--seed 1] [--count 150]` draws places in the rooms below and makes one
change at each, in copies of the repository. The tests of the room run first, then the whole suite.
What survives both is printed as a diff. A person decides whether such a change alters behaviour.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shlex
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

try:
    from cosmic_ray import plugins
    from cosmic_ray.ast import ast_nodes, get_ast_from_path
    from cosmic_ray.mutating import mutate_and_test
    from cosmic_ray.work_item import MutationSpec, TestOutcome
except ModuleNotFoundError:
    sys.exit("cosmic-ray is not installed. Run `make mutation`.")

ROOT = Path(__file__).parents[1]
ROOMS = ("formats", "pipeline", "store", "transfer", "verify")

#: Seconds that the tests of one change may take. A change that makes them hang is noticed.
TIMEOUT = 1800


def main() -> None:
    """Draw the changes, test each, and print what survived."""
    parser = argparse.ArgumentParser(prog="python -m tools.mutation", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=150)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="copies that work at once")
    parser.add_argument("--rooms", nargs="+", default=ROOMS, choices=ROOMS)
    parser.add_argument("--quick", action="store_true", help="run the tests of the room only")
    options = parser.parse_args()
    chosen = draw(options.rooms, options.count, random.Random(options.seed))
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="mutation-") as scratch:
        copies: SimpleQueue[Path] = SimpleQueue()
        for number in range(options.jobs):
            copy = Path(scratch, str(number))
            subprocess.run(["git", "clone", "-q", "--shared", ROOT, copy], check=True)
            copies.put(copy)
        for room in options.rooms:
            subprocess.run(tests_of(copy, [f"tests/{room}"]), check=True)

        def examine(change: MutationSpec) -> tuple[str, str]:
            copy = copies.get()
            try:
                return run(change, copy, options.quick)
            finally:
                copies.put(copy)

        with ThreadPoolExecutor(options.jobs) as pool:
            for change, (outcome, diff) in zip(chosen, pool.map(examine, chosen), strict=True):
                outcomes[outcome] += 1
                place = f"{change.module_path}:{change.start_pos[0]}"
                print(f"{outcome}: {change.operator_name.split('/')[-1]} at {place}", flush=True)
                if outcome == "SURVIVED":
                    print(diff, flush=True)
    print(", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items())))


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
    return [chance.choice(places[place]) for place in chance.sample(sorted(places), count)]


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


def run(change: MutationSpec, copy: Path, quick: bool) -> tuple[str, str]:
    """Make the change in a copy and run the tests there; return the outcome and the diff."""
    room = f"tests/{change.module_path.parts[1]}"
    own = tests_of(copy, [room])
    rest = tests_of(copy, ["tests", "--ignore", room, "--ignore", "tests/tools"])
    inside = MutationSpec(
        copy / change.module_path,
        change.operator_name,
        change.occurrence,
        change.start_pos,
        change.end_pos,
    )
    for tests in [own] if quick else [own, rest]:
        result = mutate_and_test([inside], shlex.join(tests), TIMEOUT)
        if result.test_outcome != TestOutcome.SURVIVED:
            break
    outcome = result.test_outcome.name if result.test_outcome else result.worker_outcome.name
    return outcome, result.diff or result.output or ""


if __name__ == "__main__":
    main()
