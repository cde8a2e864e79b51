"""Measures on a GPU all that rests on it, in one run of under eight minutes.

    python -m benchmarks.gpu                  # 7 GB of disk for a while; make bench-gpu
    python -m benchmarks.gpu --rehearse       # every section on the CPU, with a tiny model

Needs torch (2.11 to 2.13) and Python 3.11 to 3.13: no network, no inv, no virtual environment.
Each section runs in a process of its own, with a time limit: what fails there is a line of the
result, and the next section goes on. Writes one JSON, and prints the rows for docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ROOT, write_report
from csm_weights.byte_ranges import ByteRange
from csm_weights.formats.architecture import read_config
from csm_weights.formats.multipart import find_chunk_files
from csm_weights.formats.transformers_layout import name_tensors
from csm_weights.formats.weights_file import open_weights
from csm_weights.hashing import HashJob, measure
from csm_weights.model.csm import FRAME_MS, Model
from csm_weights.model.decoders import FrameDecoder, describe_device, names_of, open_decoder
from csm_weights.model.fast_decoder import weights_per_frame
from csm_weights.model.generator import Generator
from csm_weights.model.load import load_tensors
from csm_weights.model.smoke import bus_rate, make_prompt
from tools.standin.recipes import RECIPES
from tools.standin.write import write_standin

#: Limits of the rates of loading, GB of the file a second, on any card with PCIe 5.
FIRST_GOAL, LATER_GOAL, VERIFIED_GOAL = 30.0, 40.0, 20.0

#: Limits of the real-time factor by a word of the card's name.
RTF_GOALS = {"H100": 0.06, "H200": 0.047}

#: Frames that are timed, of the reference and of the other paths, and those before them. A
#: rehearsal makes few.
FRAMES, WARM, REHEARSED = {"eager": 20, "fused": 100, "graphs": 100}, 3, 2

#: Bytes copied inside the device to measure its memory; each is read and written.
COPIED = 1 << 30

#: Bytes of a chunk file, and of a pinned range, of the full-size stand-in.
PIECE = 1 << 30


@dataclass(frozen=True)
class Row:
    """One figure, or one failure, where `value` is 0: with the limit that it is held to."""

    what: str
    value: float
    unit: str
    limit: str = "no limit"
    ok: bool | None = None


@dataclass(frozen=True)
class Place:
    """Where a section works: the folder with the stand-in, and the device."""

    folder: Path
    device: torch.device

    @property
    def weights(self) -> list[Path]:
        """The file of weights, or its chunk files."""
        file = self.folder / "model.safetensors"
        return [file] if file.exists() else find_chunk_files(self.folder, file.name)

    @property
    def recipe(self) -> str:
        return "csm-tiny" if self.device.type == "cpu" else "csm-1b-standin"

    def at_least(self, what: str, value: float, unit: str, limit: float) -> Row:
        """A row with a limit, to which a rehearsal is not held."""
        is_ok = value >= limit if self.device.type == "cuda" else None
        return Row(what, value, unit, f"at least {limit:g}", is_ok)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


# ---- measuring


def seconds(place: Place, run: Callable[[], object], count: int) -> float:
    """Seconds of one of `count` runs: on a GPU by its own clock, without what the host adds."""
    place.wait()
    if place.device.type != "cuda":
        start = time.perf_counter()
        for _ in range(count):
            run()
        return (time.perf_counter() - start) / count
    # torch's events have no types
    events: Any = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
    events[0].record()
    for _ in range(count):
        run()
    events[1].record()
    events[1].synchronize()
    return float(events[0].elapsed_time(events[1])) / 1000 / count


def memory_rate(place: Place, size: int) -> float:
    """Bytes a second that the device's memory gives and takes, when it copies `size` bytes."""
    source = torch.zeros(size, dtype=torch.uint8, device=place.device)
    target = torch.empty_like(source)
    seconds(place, lambda: target.copy_(source), 2)
    return 2 * size / min(seconds(place, lambda: target.copy_(source), 5) for _ in range(3))


def kernel_table(place: Place, run: Callable[[], object], most: int = 12) -> list[Row]:
    """The kernels (on the CPU the operators) that a run takes, those with the most time first."""
    is_gpu = place.device.type == "cuda"
    kind = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kind.CUDA if is_gpu else kind.CPU]) as profile:
        run()
        place.wait()
    counts, times = Counter[str](), Counter[str]()
    for event in profile.key_averages():
        taken = event.self_device_time_total if is_gpu else event.self_cpu_time_total
        counts[event.key], times[event.key] = event.count, taken
    shown = [
        Row(f"{name[:70]}, {counts[name]} times", time_ / 1000, "ms")
        for name, time_ in times.most_common(most)
    ]
    return [Row("launches", float(counts.total()), ""), *shown]


def peaks(place: Place) -> Iterator[Row]:
    """The most memory that this process has had."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    yield Row("peak memory, host", host / 1e9, "GB")
    if place.device.type == "cuda":
        yield Row("peak memory, device", torch.cuda.max_memory_allocated(place.device) / 1e9, "GB")


# ---- sections: each is a generator of rows, run in a process of its own


def tests(place: Place) -> Iterator[Row]:
    """The tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-rs"]
    done = subprocess.run(
        [*command, "tests/model/test_gpu.py"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    last = (done.stdout.strip().splitlines() or ["no output"])[-1]
    is_ok = done.returncode == 0 and ("passed" in last or place.device.type == "cpu")
    sys.stderr.write(done.stdout[-4000:])
    yield Row(f"GPU tests: {last.strip('= ')}", float(done.returncode), "exit code", "0", is_ok)


def prepare(place: Place) -> Iterator[Row]:
    """The stand-in of model.safetensors, with the digests of its pieces and blocks."""
    recipe, start = RECIPES[place.recipe], time.perf_counter()
    (place.folder / "config.json").write_text(recipe.config)
    write_standin(read_config(place.folder / "config.json"), 1, place.folder, ("safetensors",))
    (file,) = place.weights
    size, piece = file.stat().st_size, min(PIECE, recipe.piece_size)
    yield Row("stand-in written", size / (time.perf_counter() - start) / 1e9, "GB/s")
    ranges = tuple((at, min(piece, size - at)) for at in range(0, size, piece))
    for name, has_blocks in (("pieces", False), ("pieces and blocks", True)):
        start = time.perf_counter()
        (found,) = measure([HashJob(file, size, ranges, blocks=has_blocks)], lambda _: None)
        rate = size / (time.perf_counter() - start) / 1e9
        yield Row(f"hashed once by {name}, {os.cpu_count()} cores", rate, "GB/s")
    pieces = [ByteRange(*of, sha) for of, sha in zip(ranges, found.ranges, strict=True)]
    digests = {"pieces": pieces, "blocks": found.blocks}
    text = json.dumps({name: [asdict(one) for one in some] for name, some in digests.items()})
    (place.folder / "digests.json").write_text(text)


def digests_of(place: Place, name: str) -> list[ByteRange]:
    """The digests that `prepare` has left."""
    known = json.loads((place.folder / "digests.json").read_text())
    return [ByteRange(**one) for one in known[name]]


def load_rate(place: Place, digests: list[ByteRange] | None = None) -> float:
    """GB of the file a second, from opening it to all tensors in bfloat16 on the device."""
    paths, config = place.weights, read_config(place.folder / "config.json")
    size, start = sum(path.stat().st_size for path in paths), time.perf_counter()
    with open_weights(paths) as weights:
        tensors, together = name_tensors([weights], ()).tensors, config.fused_tensors()
        kept = load_tensors(
            tensors, place.device, torch.bfloat16, together=together, digests=digests or ()
        )
    place.wait()
    rate = size / (time.perf_counter() - start) / 1e9
    del kept
    return rate


def load(place: Place) -> Iterator[Row]:
    """Loading in a fresh process and later, without digests, with those of pieces and blocks."""
    torch.zeros(1, device=place.device)
    name = "one file" if len(place.weights) == 1 else f"{len(place.weights)} chunk files"
    yield place.at_least(f"load, {name}, first of a process", load_rate(place), "GB/s", FIRST_GOAL)
    later = max(load_rate(place) for _ in range(3))
    yield place.at_least(f"load, {name}, later", later, "GB/s", LATER_GOAL)
    verified = max(load_rate(place, digests_of(place, "pieces")) for _ in range(2))
    yield Row(f"load, {name}, verified by pieces", verified, "GB/s")
    verified = max(load_rate(place, digests_of(place, "blocks")) for _ in range(2))
    yield place.at_least(f"load, {name}, verified by blocks", verified, "GB/s", VERIFIED_GOAL)
    if bus := bus_rate(place.device) / 1e9:
        yield Row("bus, from pinned memory", bus, "GB/s")
        yield Row("load, later, share of the bus", later / bus, "")
    yield from peaks(place)


def split(place: Place) -> Iterator[Row]:
    """The file cut into chunk files where it lies, from its end; then loading from those."""
    (file,) = place.weights
    piece = min(PIECE, RECIPES[place.recipe].piece_size)
    for number in reversed(range(-(-file.stat().st_size // piece))):
        part = file.with_name(f"{file.name}.part-a{chr(97 + number)}")
        with file.open("rb") as source, part.open("wb") as target:
            source.seek(number * piece)
            while block := source.read(16 << 20):
                target.write(block)
        os.truncate(file, number * piece)
    file.unlink()
    yield from load(place)


def safetensors(place: Place) -> Iterator[Row]:
    """The same by safetensors' load_file, first and later."""
    from safetensors.torch import load_file

    (file,) = place.weights
    torch.zeros(1, device=place.device)
    for when in ("first of a process", "later"):
        start = time.perf_counter()
        tensors = load_file(file, str(place.device))
        kept = {name: tensors.pop(name).to(torch.bfloat16) for name in list(tensors)}
        place.wait()
        rate = file.stat().st_size / (time.perf_counter() - start) / 1e9
        yield Row(f"safetensors load_file, {when}", rate, "GB/s")
        del kept


def prompt_of(model: Model) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and mask (1, S, K + 1) of the smoke test's prompt."""
    device, words = model.projection.weight.device, make_prompt(model.config)
    shape = 1, len(words), model.config.codebooks + 1
    tokens = torch.zeros(shape, dtype=torch.long, device=device)
    tokens[0, :, -1] = torch.tensor(words, device=device)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[..., -1] = True
    return tokens, mask


def frames(place: Place, path: str) -> Iterator[Row]:
    """Milliseconds a frame of a path, its kernels, and how much of the memory's rate it uses."""
    # before the weights take memory
    is_gpu = place.device.type == "cuda"
    rate = memory_rate(place, COPIED if is_gpu else COPIED >> 6)
    model = Model.from_local(place.weights, place.device, torch.bfloat16)
    start = time.perf_counter()
    decoder: FrameDecoder = open_decoder(model, path)
    decoder.start(*prompt_of(model))
    place.wait()
    yield Row(f"{path}: capture and first frame", time.perf_counter() - start, "s")
    start = time.perf_counter()
    decoder.start(*prompt_of(model))
    place.wait()
    yield Row(f"{path}: first frame of a later prompt", (time.perf_counter() - start) * 1000, "ms")
    for _ in range(WARM if is_gpu else 0):
        decoder.step()
    taken = seconds(place, decoder.step, FRAMES[path] if is_gpu else REHEARSED)
    card = describe_device(place.device)[0]
    yield Row(f"{path}: a frame", taken * 1000, "ms")
    factor = taken * 1000 / FRAME_MS
    goal = next((goal for word, goal in RTF_GOALS.items() if word in card), None)
    limit = (f"at most {goal:g}", factor <= goal) if goal and path == "fused" else ()
    yield Row(f"{path}: real-time factor", factor, "", *limit)
    yield Row("memory, copying within the device", rate / 1e9, "GB/s")
    size = weights_per_frame(model.config) * model.projection.weight.element_size()
    yield Row(f"{path}: share of the memory's rate", size / taken / rate, "")
    yield from peaks(place)
    for row in kernel_table(place, decoder.step):
        yield Row(f"{path}: {row.what}", row.value, row.unit)


def speak(place: Place) -> Iterator[Row]:
    """From a prompt of tokens to 100 frames by the fastest path that runs, as a program does."""
    frames_ = 100 if place.device.type == "cuda" else REHEARSED
    model = Model.from_local(place.weights, place.device, torch.bfloat16)
    for path in names_of(place.device):
        try:
            generator = Generator(model, fast=path)
            generator.generate_frames(make_prompt(model.config), 0, [], FRAME_MS)
        except Exception as error:
            yield Row(f"speaking by {path}: {error}", 0, "", "runs", False)
            continue
        torch.manual_seed(0)
        place.wait()
        start = time.perf_counter()
        codes = generator.generate_frames(make_prompt(model.config), 0, [], frames_ * FRAME_MS)
        place.wait()
        taken = time.perf_counter() - start
        yield Row(f"prompt to {len(codes)} frames by {path}", taken, "s")
        return


def sections(device: torch.device) -> dict[str, tuple[Callable[[Place], Iterator[Row]], float]]:
    """The sections by name, in their order, each with the seconds that it has."""

    def of_path(path: str) -> Callable[[Place], Iterator[Row]]:
        return lambda place: frames(place, path)

    paths = {f"frames-{path}": (of_path(path), 50.0) for path in names_of(device)}
    return {
        "tests": (tests, 120.0),
        "prepare": (prepare, 60.0),
        "load": (load, 40.0),
        "safetensors": (safetensors, 25.0),
        **paths,
        "speak": (speak, 40.0),
        "split": (split, 45.0),
    }


# ---- all of them


def run_section(name: str, place: Place, limit: float) -> list[Row]:
    """Run a section in a child; what it printed counts, and its failure is a row."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--section", name]
    command += ["--folder", str(place.folder), "--device", str(place.device)]
    why = ""
    try:
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=limit, check=False
        )
        output = done.stdout
        if done.returncode:
            why = f"ended with code {done.returncode}"
    except subprocess.TimeoutExpired as late:
        # bytes, whatever was asked for
        output = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        why = f"not done within {limit:g} s"
    rows = [Row(**json.loads(line)) for line in output.splitlines() if line.startswith("{")]
    return [*rows, Row(f"section {name}: {why}", 0, "", "ends", False)] if why else rows


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table, with what each is held to."""
    words = {True: "OK", False: "NOT OK", None: ""}
    lines = ["| what | measured | limit | |", "|---|---|---|---|"]
    for row in rows:
        what = row.what.replace("|", "/")
        lines.append(f"| {what} | {row.value:.3g} {row.unit} | {row.limit} | {words[row.ok]} |")
    return "\n".join(lines)


def main() -> int:
    """Measure everything, or one section as the child of such a run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with a tiny model")
    parser.add_argument("--out", type=Path, default=Path("bench-gpu.json"))
    parser.add_argument("--dir", type=Path, help="folder for the temporary 7 GB")
    parser.add_argument("--write", action="store_true", help="put the rows into docs/")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cuda:0", help="cuda:0, ...")
    options = parser.parse_args()
    device = torch.device("cpu" if options.rehearse else options.device)
    if options.section:
        if options.device == "cpu":
            torch.set_num_threads(1)
        for row in sections(device)[options.section][0](Place(options.folder, device)):
            print(json.dumps(asdict(row)), flush=True)
        return 0
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here; --rehearse runs on the CPU")
    card, driver = describe_device(device)
    machine = (
        f"{card}, driver {driver}, torch {torch.__version__}, Python {platform.python_version()}"
    )
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        for name, (_, limit) in sections(device).items():
            print(f"== {name}", file=sys.stderr, flush=True)
            rows += run_section(name, Place(Path(folder), device), limit)
    result = {"machine": machine, "rows": [asdict(row) for row in rows]}
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    text = f"{machine}; one run.\n\n{table(rows)}"
    print(text)
    if options.write:
        write_report(text, "measured gpu")
    return int(any(row.ok is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
