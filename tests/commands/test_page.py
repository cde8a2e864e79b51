"""The page of --report: the verdict first, all pieces and gates, nothing that a browser runs."""

from __future__ import annotations

import errno
import os
import platform
import re
import shutil
import sys
from dataclasses import replace
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path

import pytest
from invoke.program import Program

from csm_weights import progress
from csm_weights.commands import verify
from csm_weights.commands.cli import collection
from csm_weights.commands.render import html
from csm_weights.errors import Finding, Kind, WrongContent
from csm_weights.fleet.cluster import FleetOutcome
from csm_weights.fleet.job import NodeReport, Status
from csm_weights.pipeline import apply
from csm_weights.pipeline.plan import Target
from csm_weights.progress import Event
from tests.commands.test_render import SMOKE
from tests.support.privileges import unprivileged
from tests.support.toy import Toy, flip

#: Text that a browser would run, if it took it for more than text.
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&\x1b[2J"

RUN = html.Run("weights", "2025-01-01T00:00:00+00:00", 2.5, "csm-weights 1")


class Page(HTMLParser):
    """A page as a browser takes it: its tags with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._bars: list[list[str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if "bar" in str(dict(attrs).get("class")):
            self._bars.append([])

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self._bars and self.tags[-1][0] == "span" and data.strip():
            self._bars[-1].append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def bars(self) -> list[str]:
        """The marks of the boxes of each file."""
        return [" ".join(bar) for bar in self._bars]


def run(toy: Toy, task: str, *options: str) -> tuple[int, Page | None]:
    """Run a task on the toy model; return its exit code, and its page, if one was written."""
    path, code = toy.root / "page.html", 0
    words = ["inv", task, "--model", "toy", *options]
    path.unlink(missing_ok=True)
    if not any(option.startswith(("--report", "--html")) for option in options):
        words += [f"--{'html' if task == 'report' else 'report'}", str(path)]
    try:
        Program(namespace=collection(toy.root)).run(words)
    except SystemExit as ended:
        code = int(ended.code or 0)
    assert progress.listeners == []
    return code, Page(path.read_text(encoding="utf-8")) if path.exists() else None


def test_a_page_tells_all_of_a_good_run(toy: Toy) -> None:
    """The verdict comes first; then the files by their pieces, gates, rates and provenance."""
    code, page = run(toy, "weights", "--no-smoke", "--host")
    assert (code, page and page.bars) == (0, ["C✓ C✓ C✓ C✓ C✓", "C✓ C✓ C✓", "✓"])
    assert page is not None
    told = page.text.partition("/* ")[2] or page.text
    words = told[told.index("OK: installed") :]
    assert words.startswith("OK: installed and verified model toy verified 3 of 3 files")
    size = f"{toy.artifact('a.bin').size:,} bytes"
    assert f"size a.bin {size} {size}" in words
    assert f"digest a.bin sha256 {toy.artifact('a.bin').sha256} sha256" in words
    assert "chunks/toy/a.bin/a.bin.part-aa to chunks/toy/a.bin/a.bin.part-ae" in words
    assert re.search(r"assembling 2 files [\d.]+ KiB in [\d.]+ m?s", words)
    assert f"host {platform.node()}" in words
    manifest = (toy.root / "manifests" / "toy.toml").read_bytes()
    assert f"manifest sha256 {sha256(manifest).hexdigest()}" in words
    assert run(toy, "report")[0] == 0


def test_a_path_after_an_equals_sign_may_begin_with_a_tilde(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shell leaves it there: it is the home of the user, for one path as for several."""
    monkeypatch.setenv("HOME", str(toy.root))
    monkeypatch.chdir(toy.root)
    code, page = run(toy, "report", "--html=~/page.html")
    assert (code, page is not None) == (3, True)
    assert not Path("~").exists()
    with pytest.raises(SystemExit):
        Program(namespace=collection(toy.root)).run(["inv", "compare", "--file=~/x", "--file=~/y"])
    assert f"{toy.root}/x" in capsys.readouterr().err


def test_a_report_is_of_what_is_installed(toy: Toy) -> None:
    """`inv report` hashes nothing that has a receipt; what is missing and wrong is told."""
    code, page = run(toy, "report")
    assert (code, page and page.bars[2]) == (3, "T…")
    assert page is not None and platform.node() not in page.text
    run(toy, "weights", "--no-smoke")
    toy.installed("b.bin").unlink()
    code, page = run(toy, "report")
    assert page is not None
    assert (code, page.bars) == (3, ["C✓ C✓ C✓ C✓ C✓", "C… C… C…", "✓"])
    assert "NOT OK: verification failed (exit code 3) missing" in page.text
    assert "✗ NOT OK present b.bin" in page.text and "- not run digest b.bin" in page.text


def test_a_wrong_piece_is_marked(toy: Toy) -> None:
    """The one piece that hashing finds wrong, of an installed file or a chunk file, has a cross."""
    flip(toy.chunk_file("a.bin", 3))
    part = toy.chunk_file("a.bin", 1).rename(toy.root / "part")
    code, page = run(toy, "weights", "--no-smoke")
    assert page is not None
    assert (code, page.bars) == (4, ["C… - C… C✗ C…", "C… C… C…", "T…"])
    assert "wrong digest : chunks/toy/a.bin/a.bin.part-ad expected sha256" in page.text
    flip(toy.chunk_file("a.bin", 3))
    part.rename(toy.chunk_file("a.bin", 1))
    run(toy, "weights", "--no-smoke", "--only=a.bin")
    flip(toy.installed("a.bin"))
    code, page = run(toy, "verify", "--only=a.bin")
    assert (code, page and page.bars) == (4, ["P✗ C✓ C✓ C✓ C✓"])


def test_pieces_of_an_unfinished_file_are_marked(toy: Toy) -> None:
    """What a run that failed has verified is shown as kept."""
    flip(toy.chunk_file("a.bin", 3))
    run(toy, "fetch", "--report", str(toy.root / "other.html"), "--only=a.bin")
    with pytest.raises(WrongContent):
        apply.apply(toy.request("a.bin"), Target.BOTH)
    _, page = run(toy, "weights", "--no-smoke", "--dry")
    assert page is not None
    assert page.bars[0] == "C◐ C◐ C◐ C… C◐"
    assert "DRY RUN: nothing was done" in page.text


def test_what_a_mirror_would_give_is_marked(toy: Toy) -> None:
    """A plan without chunk files has the mirror's address at each run of pieces."""
    shutil.rmtree(toy.root / "chunks")
    where = ("--source=mirror", "--url=https://mirror.example/toy")
    code, page = run(toy, "weights", "--no-smoke", "--dry", *where)
    assert page is not None
    assert (code, page.bars) == (0, ["M… M… M… M… M…", "M… M… M…", "T…"])
    assert "still to come, a mirror" in page.text and "https://mirror.example/toy" in page.text


def test_nothing_on_a_page_is_run_or_loaded(toy: Toy) -> None:
    """Hostile names stay text; there is no script, no form, and no address that is asked."""
    finding = Finding(Kind.WRONG_DIGEST, HOSTILE, HOSTILE, HOSTILE, HOSTILE)
    error = WrongContent(HOSTILE, [finding], HOSTILE)
    status = apply.status(toy.request(dest=f"models/{HOSTILE.replace('/', '')[:-4]}"))
    run = replace(RUN, host=HOSTILE, events=events(HOSTILE, 1, 2, 3))
    text = html.render(error, status, run)
    page = Page(text)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "img", "iframe", "form", "object"})
    links = [v for _, attrs in page.tags for k, v in attrs.items() if k in ("href", "src")]
    assert links == ["data:,"]
    assert not [k for _, attrs in page.tags for k in attrs if k.startswith("on")]
    assert page.text.count("<script>alert(1)</script>") >= 7
    assert "\x1b" not in text and "url(" not in text
    policies = [a["content"] for tag, a in page.tags if a.get("http-equiv")]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def events(label: str, *done: int) -> tuple[Event, ...]:
    """Return the events of a work that tells every second what is done, in MiB."""
    total = done[-1] << 20
    times = enumerate((0, *done))
    return tuple(Event(label, 100.0, 100.0 + now, count << 20, total) for now, count in times)


def test_rates_are_drawn_over_time() -> None:
    """A curve has the rate between two events; bytes that come again are no negative rate."""
    words = Page(html.render(WrongContent("no"), None, replace(RUN, events=events("a", 4, 2, 6))))
    [polygon] = [attrs["points"] for tag, attrs in words.tags if tag == "polygon"]
    third = f"{html.WIDTH / 3:.1f}"
    assert polygon is not None
    corners = polygon.split()
    assert corners[:4] == ["0.0,120.0", "0.0,0.0", f"{third},0.0", f"{third},120.0"]
    assert corners[-1] == "600.0,120.0"
    assert "a 6.0 MiB in 3.0 s, 2.0 MiB/s up to 4.0 MiB/s" in words.text
    many = Page(
        html.render(WrongContent("no"), None, replace(RUN, events=events("a", *range(5000))))
    )
    [polygon] = [attrs["points"] for tag, attrs in many.tags if tag == "polygon"]
    assert len(str(polygon).split()) <= 300


def test_a_smoke_test_has_its_limits(toy: Toy) -> None:
    """Each check is shown with what was measured and the limit, and that it is an earlier run's."""
    outcome = replace(apply.weights(toy.request(), smoke=False), smoke=SMOKE, smoke_is_known=True)
    text = Page(html.render(outcome, None, RUN)).text
    assert "not passed on cpu, 2025-01-01T00:00:00+00:00, in an earlier run" in text
    assert "✗ NOT OK cache 0.5 at most 0.1" in text
    assert "machine a GPU, driver 1.2" in text


def test_very_many_pieces_share_boxes(toy: Toy) -> None:
    """A file of hundreds of pieces has a box for each run of pieces alike."""
    a = toy.artifact("a.bin")
    pieces = tuple(
        replace(a.pieces[0], part=f"chunks/toy/x.part-{n:04}", offset=n, size=1) for n in range(300)
    )
    toy.write_manifest(replace(toy.manifest, artifacts=(replace(a, size=300, pieces=pieces),)))
    for piece in pieces[:10]:
        (toy.root / piece.part).write_bytes(b"x")
    page = Page(html.render(WrongContent("no"), apply.status(toy.request()), RUN))
    assert page.bars == ["C… -"]
    assert "piece 11 to 300 of 300, 290 B: missing, no source" in page.text


def test_each_node_of_a_fleet_has_a_row(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes of each node by their source, gates that failed, and what happened on the way."""
    gates = verify.verify(toy.request()).results
    good = NodeReport("node 0", "a", Status.VERIFIED, 1.5, "/d", 0, 3 << 20, 1 << 20, 2)
    lost = NodeReport("node 1", HOSTILE, Status.LOST, 9.0, gates=gates)
    error = WrongContent("1 of 2 nodes is not verified")
    outcome = FleetOutcome("toy", (good, lost), 9.5, ("node 1 was lost",), error)
    text = Page(html.render(outcome, None, RUN)).text
    assert "(exit code 4) model toy took" in text
    assert "node 0 a verified 1.5 s 0 B 3.0 MiB 1.0 MiB 2 - - node 1 <script>alert(1)" in text
    assert "✗ NOT OK present node 1: a.bin" in text and "node 1 was lost" in text
    text = Page(html.render(replace(outcome, error=None), None, RUN)).text
    assert "OK: verified on 2 nodes in 9.5 s" in text
    monkeypatch.setitem(sys.modules, "ray", None)
    code, page = run(toy, "fleet")
    assert page is not None
    assert (code, page.bars) == (3, []) and "'.[fleet]'" in page.text


# ---- files that cannot be written


def test_a_page_goes_only_to_a_file_that_can_be_one(
    toy: Toy, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another ending, and a folder that takes no file, are refused before the work."""
    weights = toy.root / "model.safetensors"
    weights.write_text("precious")
    assert run(toy, "weights", "--no-smoke", f"--report={weights}")[0] == 2
    assert weights.read_text() == "precious"
    closed = toy.root / "closed"
    closed.mkdir(0o555)
    with unprivileged():
        assert run(toy, "weights", "--no-smoke", f"--report={closed}/a.html")[0] == 7
    assert "no permission to write" in capsys.readouterr().err
    assert not toy.installed("a.bin").exists()
    assert run(toy, "report", "--html", "")[0] == 2


def test_a_page_that_cannot_be_written_is_an_error(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A disk that is full in the end ends with 7, and the result is shown all the same."""
    run(toy, "weights", "--no-smoke")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    code, page = run(toy, "verify")
    out, err = capsys.readouterr()
    assert (code, page) == (7, None)
    assert "digest   3 of 3 files" in out and "no space" in err


def test_a_misuse_is_told_on_a_page(toy: Toy) -> None:
    """A page is written of an error that comes before there is a model."""
    code, page = run(toy, "weights", "--only=nothing")
    assert page is not None
    assert (code, page.bars) == (2, [])
    assert "NOT OK: nothing called 'nothing' in toy" in page.text


def test_a_page_needs_nothing_beside_it(toy: Toy) -> None:
    """A page is one file."""
    run(toy, "weights", "--no-smoke", "--report", str(toy.root / "new" / "page.html"))
    assert [path.name for path in (toy.root / "new").iterdir()] == ["page.html"]
    assert Path(html.__file__).with_name("page.html").is_file()
