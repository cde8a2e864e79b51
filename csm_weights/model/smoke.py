"""Smoke test: load a model, generate frames, and check them against numbers and limits.

The model runs in bfloat16 on a GPU and in float32 on the CPU. Golden frames are
float32's, so where there are some the model is loaded in float32 as well. The
prompt is made from the config alone: no tokenizer, no audio codec.

On a GPU the verdict rests on the reference. The fast paths are then checked
against it in a child process, and a wrong one is no fault of the model.

Importing this module raises SmokeUnavailable where there is no torch.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from csm_weights.config import pip_command
from csm_weights.errors import (
    CsmWeightsError,
    Finding,
    Kind,
    MissingInput,
    SmokeUnavailable,
    UsageError,
    WrongContent,
)
from csm_weights.files import read_bounded
from csm_weights.formats.architecture import CsmConfig
from csm_weights.formats.weights_file import locate
from csm_weights.model.path_checks import PathCheck, PathRequest, check_in_child
from csm_weights.model.smoke_report import Check, Figures, SmokeReport
from csm_weights.store.atomic import write_whole
from csm_weights.untrusted import dump_record, parse_record

try:
    import torch
    from torch import Tensor
except (ImportError, OSError) as error:
    raise SmokeUnavailable(
        f"the smoke test needs torch ({error}): {pip_command('torch')};"
        " or skip the smoke test with --no-smoke (make: SMOKE=no)"
    ) from None

from csm_weights.model.csm import FRAME_MS, Model
from csm_weights.model.decoders import FrameDecoder, describe_device, names_of, open_decoder
from csm_weights.model.fast_decoder import weights_per_frame

#: Most that a logit of step-by-step decoding may differ from the parallel
#: pass's, as a share of the largest logit, by dtype. Measured with random
#: weights of CSM-1B's size and of the tiny model: float32 rounding 1e-6 to 6e-6;
#: a cache rounded to bfloat16, the mildest of the faults tried, 3e-3 to 1e-2; one
#: wrong key or value 0.3 and more. Rounding in bfloat16 7e-3 to 9e-3, in float16 8e-4.
CACHE_LIMITS = {"float32": 3e-4, "bfloat16": 4e-2, "float16": 5e-3}

#: Elements examined at once for being finite; bounds the extra memory to a few of MB.
_CHUNK = 1 << 22

#: Most bytes read of golden frames: a frame has a few hundred.
MAX_GOLDEN = 16 << 20


#: The release of torch that runs: golden frames are exact with the one that made them.
RELEASE = torch.__version__.partition("+")[0]


@dataclass(frozen=True)
class Golden:
    """Codes, a row a frame, that follow on a prompt of text tokens, and the torch that made them.

    `torch` is its release, or empty where that was not recorded.
    """

    prompt: list[int]
    frames: list[list[int]]
    torch: str = ""


def run(
    path: Path,
    *,
    device: str | None = None,
    require_gpu: bool = False,
    frames: int = 8,
    golden: Path | None = None,
    dtype: str | None = None,
    max_rtf: float | None = None,
) -> SmokeReport:
    """Load the model at `path`, a folder or a file of weights, generate frames, and check them.

    `device` is torch's word; None is the first CUDA device if there is one,
    else the CPU. `dtype` is a key of CACHE_LIMITS; None is bfloat16 on a GPU
    and float32 on the CPU. `frames` are 80 ms each, at least 2; more are made
    when `golden`, a file of `record_golden`, has more. `max_rtf` is the largest
    real-time factor that passes; None leaves the speed unchecked.

    A check that fails does not raise: the report has it. Raises
    SmokeUnavailable when the GPU asked for or its memory is not there,
    MissingInput or WrongContent when the files cannot be loaded at all.
    """
    _check_count(frames)
    expected = None if golden is None else read_golden(golden)
    place = _find_device(device, require_gpu)
    word = dtype or ("bfloat16" if place.type == "cuda" else "float32")
    if word not in CACHE_LIMITS:
        raise UsageError(f"the dtype {word!r}; known are {', '.join(CACHE_LIMITS)}")
    report = _run_verdict(path, place, word, frames, expected)
    if names := to_check(place):
        # the child needs the memory
        synchronize(place)
        if place.type == "cuda":
            torch.cuda.empty_cache()
        request = PathRequest(str(path), str(place), word, frames, names)
        report = replace(report, paths=check_in_child(request))
    if best := next((one for one in report.paths if one.ok), None):
        rate = 1000 / best.ms
        report = replace(report, frames_per_second=rate, real_time_factor=best.ms / FRAME_MS)
    if max_rtf is not None:
        name, rtf = "real-time factor, below 1 is faster", report.real_time_factor
        speed = Check(name, f"{rtf:.3g}", f"at most {max_rtf:g}", rtf <= max_rtf)
        report = replace(report, checks=(*report.checks, speed))
    return report


def to_check(place: torch.device) -> tuple[str, ...]:
    """Return the paths of a device that are checked in a child process: a GPU's fast ones."""
    return names_of(place)[:-1] if place.type == "cuda" else ()


def _run_verdict(
    path: Path,
    place: torch.device,
    word: str,
    frames: int,
    expected: Golden | None,
) -> SmokeReport:
    """Return the report of the path on which the verdict rests: the reference on a GPU.

    `word` is a dtype.
    """
    on_gpu = place.type == "cuda"
    name = "eager" if to_check(place) else names_of(place)[0]
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(place)
    with _computing(place):
        # load until all tensors are on the device
        start = time.perf_counter()
        model = Model.from_local(path, place, getattr(torch, word))
        synchronize(place)
        seconds = time.perf_counter() - start
        # generate, and check what came of it
        prompt = make_prompt(model.config)
        count = max(frames, len(expected.frames) if expected else 0)
        codes, logits, rate = _generate(model, open_decoder(model, name), prompt, count)
        rtf = 1000 / (rate * FRAME_MS)
        checks = _checks(model, prompt, codes, logits, CACHE_LIMITS[word])
        # measure the device, before another model takes memory
        machine, driver = describe_device(place)
        weight = model.text_embeddings.weight
        sizes = [p.stat().st_size for paths in locate(path)[0] for p in paths]
        is_mapped = weight.untyped_storage().nbytes() in sizes
        figures = Figures(
            machine=machine,
            driver=driver,
            torch=torch.__version__,
            dtype=word,
            loaded_bytes=0 if is_mapped else sum(sizes),
            bus_rate=bus_rate(place),
            frame_bytes=weights_per_frame(model.config) * weight.element_size(),
            memory_rate=memory_rate(weight),
            # in KiB, but on macOS
            peak_host=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            * (1 if sys.platform == "darwin" else 1024),
            peak_device=torch.cuda.max_memory_allocated(place) if on_gpu else 0,
        )
        if expected is not None:
            if word != "float32":
                model = Model.from_local(path, place, torch.float32)
                codes, *_ = _generate(model, open_decoder(model, name), prompt, count)
            checks.append(_check_golden(expected, model, prompt, codes, word))
    return SmokeReport(str(place), tuple(checks), rate, rtf, seconds, figures)


def record_golden(directory: Path, path: Path, frames: int) -> None:
    """Write, as JSON at `path`, the frames that the model in `directory` gives on the CPU.

    Only for a model that is already known to be right. Raises as `run` does.
    """
    _check_count(frames)
    place = torch.device("cpu")
    with _computing(place):
        model = Model.from_local(directory, place, torch.float32)
        prompt = make_prompt(model.config)
        decoder = open_decoder(model, names_of(place)[0])
        codes, *_ = _generate(model, decoder, prompt, frames)
    rows = ",\n    ".join(json.dumps(row) for row in codes.tolist())
    write_whole(
        path,
        "{\n"
        f'  "about": "greedy frames, float32, after {len(prompt)} text tokens; one row a frame",\n'
        f'  "torch": "{RELEASE}",\n'
        f'  "prompt": {json.dumps(prompt)},\n'
        f'  "frames": [\n    {rows}\n  ]\n'
        "}\n",
    )


def read_golden(path: Path) -> Golden:
    """Read a file of `record_golden`; raises MissingInput or WrongContent."""
    try:
        data = json.loads(read_bounded(path, MAX_GOLDEN))
        golden = Golden(data["prompt"], data["frames"], str(data.get("torch", "")))
        for row in (golden.prompt, *golden.frames):
            if type(row) is not list or not all(type(code) is int for code in row):
                raise ValueError("a row that is not a list of whole numbers")
    except FileNotFoundError:
        finding = Finding.missing(path, "golden frames")
        raise MissingInput("the golden frames are not here", [finding]) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        found = f"{type(error).__name__}: {error}"[:200]
        finding = Finding(
            Kind.MALFORMED, str(path), "golden frames as JSON", found, "git restore it"
        )
        raise WrongContent("the golden frames cannot be used", [finding]) from None
    return golden


def make_prompt(config: CsmConfig) -> list[int]:
    """Return text tokens spread over the vocabulary, always the same for a config."""
    vocab = config.text_vocab
    return [(1 + index * 7919) % vocab for index in range(12)]


def _check_count(frames: int) -> None:
    if frames < 2:
        raise UsageError(f"{frames} frames; the smoke test needs at least 2, to use the cache")


def _find_device(device: str | None, require_gpu: bool) -> torch.device:
    """Return the device asked for; raises SmokeUnavailable where it cannot be used."""
    has_gpu = torch.cuda.is_available()
    if require_gpu and not has_gpu:
        raise SmokeUnavailable("a GPU is required, and torch finds no CUDA device here")
    name = device or ("cuda" if has_gpu else "cpu")
    try:
        place = torch.device(name)
    except RuntimeError:
        raise UsageError(f"{name!r} is no device that torch knows") from None
    if require_gpu and place.type != "cuda":
        raise UsageError(f"a GPU is required, and the device asked for is {place}")
    try:
        torch.zeros(1, device=place).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise SmokeUnavailable(f"the device {place} cannot be used: {reason}") from None
    return place


@contextlib.contextmanager
def _computing(place: torch.device) -> Iterator[None]:
    """Use float32 without TF32, whose rounding would drown what the checks look for.

    Raises SmokeUnavailable for too little memory on the device.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise SmokeUnavailable(f"too little memory on {place}: {error}") from None
    finally:
        torch.set_float32_matmul_precision(before)


def _frames(model: Model, prompt: list[int], codes: Tensor) -> tuple[Tensor, ...]:
    """Return tokens, mask and positions, of one row, of the prompt followed by codes (T, K)."""
    books, text = model.config.codebooks, len(prompt)
    tokens = torch.zeros(1, text + len(codes), books + 1, dtype=torch.long, device=codes.device)
    tokens[0, :text, -1] = torch.tensor(prompt, dtype=torch.long, device=codes.device)
    tokens[0, text:, :-1] = codes
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[:, :text, -1] = True
    mask[:, text:, :-1] = True
    return tokens, mask, torch.arange(tokens.shape[1], device=codes.device)[None]


def check_paths() -> None:
    """Run the paths of the request in sys.argv; print each one's check as a line of JSON.

    The main program of a child process. It ends after a path that raised what
    may have spoiled the device for the others.
    """
    request = parse_record(sys.argv[1], PathRequest)
    assert request is not None, "the parent wrote it"
    place = torch.device(request.device)
    with _computing(place):
        model = Model.from_local(Path(request.path), place, getattr(torch, request.dtype))
        for name in request.names:
            is_sound = True
            try:
                check = _check_path(model, name, request.frames, CACHE_LIMITS[request.dtype])
            except CsmWeightsError as error:
                check = PathCheck(name, False, str(error))
            except Exception as error:
                lines = str(error).splitlines() or ["no message"]
                check = PathCheck(name, False, f"{type(error).__name__}: {lines[0][:200]}")
                is_sound = False
            sys.stdout.write(dump_record(check) + "\n")
            sys.stdout.flush()
            if not is_sound:
                return


def _check_path(model: Model, name: str, frames: int, tolerance: float) -> PathCheck:
    """Compare greedy and drawn frames of a path with the reference, and time it."""
    decoder, prompt = open_decoder(model, name), make_prompt(model.config)
    topk, found = min(50, model.config.audio_vocab), []
    for temperature, best_of in ((0.0, 1), (0.9, topk)):
        codes, logits, rate = _generate(model, decoder, prompt, frames, temperature, best_of)
        if not 0 <= int(codes.min()) <= int(codes.max()) < model.config.audio_vocab:
            return PathCheck(name, False, f"codes from {int(codes.min())} to {int(codes.max())}")
        found.append(_against_parallel(model, prompt, codes, logits, tolerance))
        # a drawn code is one of the best of its logits, a greedy one the best
        best = logits.topk(best_of).values[..., -1]
        if bool((logits.gather(-1, codes[..., None])[..., 0] < best).any()):
            return PathCheck(name, False, "codes that are not among the best of their logits")
    check = next((one for one in found if not one.ok), found[0])
    return PathCheck(name, check.ok, check.value, check.limit, 1000 / rate if check.ok else 0.0)


def _generate(
    model: Model,
    decoder: FrameDecoder,
    prompt: list[int],
    frames: int,
    temperature: float = 0.0,
    topk: int = 1,
) -> tuple[Tensor, Tensor, float]:
    """Generate frames, greedy by default, as for a listener: with caches, one after the other.

    Returns codes (T, K), logits (T, K, V), and the frames a second after the first.
    """
    place = model.projection.weight.device
    none = torch.zeros(0, model.config.codebooks, dtype=torch.long, device=place)
    tokens, mask, _ = _frames(model, prompt, none)
    steps = [(decoder.start(tokens, mask, temperature, topk), decoder.logits)]
    # the first frame also reads the prompt and sets the device up
    synchronize(place)
    start = time.perf_counter()
    steps += [(decoder.step(), decoder.logits) for _ in range(frames - 1)]
    synchronize(place)
    seconds = time.perf_counter() - start
    codes, logits = (torch.cat(part) for part in zip(*steps, strict=True))
    return codes, logits, (frames - 1) / seconds


def _checks(
    model: Model, prompt: list[int], codes: Tensor, logits: Tensor, tolerance: float
) -> list[Check]:
    """Check names, weights, caches and codes; `tolerance` is a share of the largest logit."""
    state, c = model.state_dict(), model.config
    # exactly the tensors of the network
    expected = c.tensor_shapes()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wrong = sorted({name for name, _ in expected.items() ^ shapes.items()})
    value = f"{len(shapes)}" + (f", wrong: {', '.join(wrong[:3])}" if wrong else "")
    names = Check("tensors of the right name and shape", value, f"{len(expected)}", not wrong)
    # no NaN and no infinity
    bad: Counter[str] = Counter()
    for name, tensor in state.items():
        for part in tensor.flatten().split(_CHUNK):
            bad[name] += int((~part.isfinite()).sum())
    bad = +bad  # without those that have none
    value = f"{bad.total()}" + (f", in {', '.join([*bad][:3])}" if bad else "")
    finite = Check("weights that are not finite", value, "0", not bad)
    cached = _against_parallel(model, prompt, codes, logits, tolerance)
    # codes are in the audio vocabulary
    low, high, last = int(codes.min()), int(codes.max()), c.audio_vocab - 1
    name, is_ok = f"codes of {len(codes)} frames", 0 <= low <= high <= last
    return [names, finite, cached, Check(name, f"{low} to {high}", f"0 to {last}", is_ok)]


def _against_parallel(
    model: Model, prompt: list[int], codes: Tensor, logits: Tensor, tolerance: float
) -> Check:
    """Check that logits of one frame after the other are those of one pass without caches."""
    parallel = _parallel(model, prompt, codes)
    difference = float((logits - parallel).abs().max())
    limit = tolerance * float(parallel.abs().max())
    name = "cached against parallel logits, largest difference"
    words = f"{limit:.1e}, {tolerance:.0e} of the largest logit"
    return Check(name, f"{difference:.1e}", words, difference <= limit)


def _check_golden(
    golden: Golden, model: Model, prompt: list[int], codes: Tensor, dtype: str
) -> Check:
    """Compare the codes of a float32 model with golden frames, which are its own at best.

    Another torch rounds in another way, and a code that was the best by a hair may be the
    second: after it all codes are others. Then the golden codes must be the best that the
    model knows after one another, but for such a hair.
    """
    name, count = "golden frames", len(golden.frames)
    limit = f"all {count} the same" + ("" if dtype == "float32" else ", in float32")
    if golden.prompt != prompt:
        return Check(name, "recorded after another prompt, so of another model", limit, False)
    said = codes[:count].tolist()
    same = sum(one == other for one, other in zip(golden.frames, said, strict=True))
    value = f"{same} of {count} the same"
    if same == count:
        return Check(name, value, limit, count > 0)
    first = next(i for i in range(count) if golden.frames[i] != said[i])
    value += f", frame {first} is the first that differs"
    config = model.config
    is_possible = all(
        len(row) == config.codebooks and min(row) >= 0 and max(row) < config.audio_vocab
        for row in golden.frames
    )
    if golden.torch in ("", RELEASE) or not is_possible:
        return Check(name, value, limit, False)
    forced = torch.tensor(golden.frames, device=codes.device)
    logits = _parallel(model, prompt, forced)
    short = float((logits.amax(-1) - logits.gather(-1, forced[..., None])[..., 0]).max())
    most = CACHE_LIMITS["float32"] * float(logits.abs().max())
    value += f"; made with torch {golden.torch}, their logits are {short:.1e} below the largest"
    return Check(name, value, f"{limit}, or at most {most:.1e} below", short <= most)


def _parallel(model: Model, prompt: list[int], codes: Tensor) -> Tensor:
    """Return the logits (T, K, V) of codes (T, K) in one pass without caches."""
    with torch.no_grad():
        inputs = _frames(model, prompt, codes[:-1])
        hidden = model.backbone_hidden(*inputs)[0, len(prompt) - 1 :]
        return model.codebook_logits(hidden, codes)


# ---- measures of the device

#: Bytes copied to measure a bus: enough to hide the start of a copy.
BUS_SAMPLE = 64 << 20

#: Most bytes read to measure a memory's rate; far more than caches hold.
MEMORY_SAMPLE = 512 << 20

#: How often a measurement is made; the fastest counts, since others can only be disturbed.
TRIES = 4

#: Runs of one measurement on a GPU, over which the time to start and to wait is spread.
GPU_RUNS = 20


def bus_rate(device: torch.device) -> float:
    """Measure bytes a second from pinned memory to a GPU; 0 for the CPU, which has no bus."""
    if device.type != "cuda":
        return 0.0
    host = torch.empty(BUS_SAMPLE, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(host, device=device)
    return BUS_SAMPLE / _fastest(lambda: there.copy_(host, non_blocking=True), device)


def memory_rate(tensor: Tensor) -> float:
    """Measure bytes a second at which a device reads a tensor; a small one is in its caches."""
    flat = tensor.flatten()[: MEMORY_SAMPLE // tensor.element_size()]
    return flat.nbytes / _fastest(lambda: flat.sum(), tensor.device)


def _fastest(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of a run in the fastest of a few tries, the first only warming up."""
    times, runs = [], GPU_RUNS if device.type == "cuda" else 1
    for _ in range(TRIES + 1):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(runs):
            run()
        synchronize(device)
        times.append((time.perf_counter() - start) / runs)
    return min(times[1:])


def synchronize(device: torch.device) -> None:
    """Wait until a device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
