"""The report of a smoke test, and where the last one is kept; without torch."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from csm_weights.files import read_bounded
from csm_weights.manifest.paths import RECEIPTS
from csm_weights.model.path_checks import PathCheck
from csm_weights.untrusted import parse_record

#: Most bytes read of a report: it has about two thousand.
MAX_REPORT = 1 << 20


@dataclass(frozen=True)
class Check:
    """One thing that must be true of a loaded model: what was found, and what is allowed."""

    name: str
    value: str
    limit: str
    ok: bool


@dataclass(frozen=True)
class Figures:
    """The measurements of a smoke test beside its checks, and its machine.

    Sizes are in bytes, rates in bytes a second; 0 is "not measured": a mapped
    file is not read when it is loaded, and the CPU has no bus. `frame_bytes` are
    the weights that a frame has to read. `driver` is "-" for the CPU.
    """

    machine: str
    driver: str
    torch: str
    dtype: str
    loaded_bytes: int
    bus_rate: float
    frame_bytes: int
    memory_rate: float
    peak_host: int
    peak_device: int


@dataclass(frozen=True)
class SmokeReport:
    """All checks of one loaded model, and the files it was loaded from.

    `real_time_factor` is seconds of computing for a second of audio: below 1
    is faster than real time. `load_seconds` is from opening the file to all
    tensors on the device. `bound_to` says what it holds for: pairs of name
    and digest or version, of the files, the golden frames, torch, this
    package. `made_at` is ISO 8601 in UTC. `paths` are the fast paths of a GPU,
    the fastest first, checked against the reference: the speed is that of the
    first that is right, else the reference's.
    """

    device: str
    checks: tuple[Check, ...]
    frames_per_second: float
    real_time_factor: float
    load_seconds: float
    figures: Figures
    bound_to: tuple[tuple[str, str], ...] = ()
    made_at: str = ""
    paths: tuple[PathCheck, ...] = ()

    @property
    def ok(self) -> bool:
        """True where there were checks, and every one is OK."""
        return bool(self.checks) and all(check.ok for check in self.checks)


def report_path(directory: Path) -> Path:
    """Return where the last report of the model in `directory` is kept."""
    return directory / RECEIPTS / "smoke-report"  # receipts end in .json, so none has this name


def path_report_path(directory: Path, machine: str, driver: str, torch: str, dtype: str) -> Path:
    """Return where the last report is kept that has checked fast paths on such a machine.

    One for each card, driver, torch, dtype, version of this package and of Triton.
    """
    words = [machine, driver, torch, dtype]
    for package in ("csm-weights", "triton"):
        with contextlib.suppress(PackageNotFoundError):
            words.append(version(package))
    key = hashlib.sha256("\0".join(words).encode()).hexdigest()[:16]
    return report_path(directory).with_name(f"smoke-report.{key}")


def read_report(path: Path) -> SmokeReport | None:
    """Return the report at `path`, or None where none can be read."""
    try:
        text = read_bounded(path, MAX_REPORT)
    except OSError:
        return None
    return parse_record(text.decode(errors="replace"), SmokeReport)
