"""Measure a fleet in network namespaces: `python -m benchmarks.fleet [case ...]`, as root.

Each node is a Ray node in a namespace of its own on one bridge, with its link shaped both ways.
T1 is one plain TCP copy of the same bytes over the same link. Only processes that are started
here are ended, by their numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT

#: Names and addresses of the namespaces; the addresses are those for benchmarks (RFC 2544).
SWITCH, NODE, NETWORK = "csm-fleet", "csm-fleet-", "198.18.77."

#: The mirror's address, where there is one; its link has no limit.
MIRROR = f"{NETWORK}250"


@dataclass(frozen=True)
class Case:
    """One measurement: receivers, MiB, Mbit/s, and what goes wrong."""

    name: str
    nodes: int
    goal: float
    size: int = 64
    rate: int = 50
    slow: float = 1.0
    fault: str = ""
    is_complete: bool = False


CASES = (
    Case("4 nodes", 4, 1.25),
    Case("8 nodes", 8, 1.25, size=128),
    Case("one link at a quarter", 4, 1.4, slow=0.25),
    Case("one node killed", 4, 1.3, fault="killed"),
    Case("one node serves garbage", 4, 1.4, fault="garbage"),
    Case("the first holder killed half-way", 4, 0.0, fault="holder"),
    Case("all complete", 4, 0.0, is_complete=True),
)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextmanager
def namespaces(case: Case) -> Iterator[None]:
    """Make a bridge and a namespace for the first holder and each receiver; remove them."""
    names = [f"{NODE}{number}" for number in range(case.nodes + 1)]
    try:
        ip("netns", "add", SWITCH)
        ip("-n", SWITCH, "link", "add", "br0", "type", "bridge")
        ip("-n", SWITCH, "addr", "add", f"{MIRROR}/24", "dev", "br0")
        ip("-n", SWITCH, "link", "set", "br0", "up")
        for number, name in enumerate(names):
            rate = case.rate * (case.slow if number == case.nodes else 1.0)
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
            port = f"p{number}"
            peer = ("type", "veth", "peer", "name", "eth0", "netns", name)
            ip("-n", SWITCH, "link", "add", port, *peer)
            ip("-n", SWITCH, "link", "set", port, "master", "br0", "up")
            ip("-n", name, "addr", "add", f"{NETWORK}{number + 1}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            for where, device in ((name, "eth0"), (SWITCH, port)):
                shape = f"root tbf rate {rate}mbit burst 512kb latency 50ms".split()
                command = ["ip", "netns", "exec", where, "tc", "qdisc", "add", "dev", device]
                subprocess.run([*command, *shape], check=True)
        yield
    finally:
        for name in [*names, SWITCH]:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def inside(number: int, *command: str, **options: Any) -> subprocess.Popen[str]:
    """Start a command in a node's namespace, with its own /dev/shm."""
    mounts = 'mount --make-rprivate / && mount -t tmpfs -o size=1g tmpfs /dev/shm && exec "$@"'
    words = ["ip", "netns", "exec", f"{NODE}{number}", "bash", "-c", mounts, "bash", *command]
    return subprocess.Popen(words, text=True, start_new_session=True, cwd=ROOT, **options)


def one_copy(case: Case) -> float:
    """Return the seconds of one plain TCP copy from the first holder to the first receiver."""
    program = f"{sys.executable} -m benchmarks.fleet"
    receiver = inside(1, *program.split(), "--receive", stdout=subprocess.PIPE)
    assert receiver.stdout
    receiver.stdout.readline()
    sender = inside(0, *program.split(), "--send", str(case.size << 20), stdout=subprocess.PIPE)
    out, _ = sender.communicate(timeout=300)
    receiver.wait(30)
    return float(out)


def receive() -> None:
    with socket.create_server((f"{NETWORK}2", 7777)) as listener:
        print("ready", flush=True)
        connection, _ = listener.accept()
        with connection:
            while connection.recv(1 << 20):
                pass
            connection.sendall(b".")


def send(size: int) -> None:
    started = time.perf_counter()
    with socket.create_connection((f"{NETWORK}2", 7777)) as connection:
        block = bytes(1 << 20)
        for _ in range(size >> 20):
            connection.sendall(block)
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)
    print(time.perf_counter() - started)


def sent(number: int) -> int:
    """Return the bytes that a node's interface has sent, headers and control messages too."""
    path = "/sys/class/net/eth0/statistics/tx_bytes"
    command = ["ip", "netns", "exec", f"{NODE}{number}", "cat", path]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@contextmanager
def cluster(case: Case, base: Path) -> Iterator[str]:
    """Start a Ray node in each namespace; end them by their process groups."""
    ray, started = str(Path(sys.executable).parent / "ray"), list[subprocess.Popen[str]]()
    common = ["--num-cpus=1", "--object-store-memory=80000000", "--disable-usage-stats", "--block"]
    address = f"{NETWORK}1:6379"
    try:
        for number in range(case.nodes + 1):
            where = ["--head", "--port=6379", "--include-dashboard=false"]
            where = where if number == 0 else [f"--address={address}"]
            here = [f"--node-ip-address={NETWORK}{number + 1}", f"--temp-dir={base}/r{number}"]
            environment = {**os.environ, "FLEET_DIR": str(base / f"node{number}")}
            environment |= {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
            Path(f"{base}/r{number}").mkdir()
            log = (base / f"ray{number}.log").open("w")
            command = (ray, "start", *where, *here, *common)
            started.append(inside(number, *command, env=environment, stdout=log, stderr=log))
            if number == 0:
                await_port()
        yield address
    finally:
        for process in started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, 15)
        for process in started:
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, 9)


def await_port() -> None:
    """Wait until the head of the cluster answers."""
    probe = f"</dev/tcp/{NETWORK}1/6379"
    for _ in range(60):
        command = ["ip", "netns", "exec", f"{NODE}0", "bash", "-c", probe]
        if subprocess.run(command, capture_output=True).returncode == 0:
            return
        time.sleep(1)
    raise SystemExit("the head of the cluster does not answer")


@contextmanager
def mirror(folder: Path) -> Iterator[str]:
    """Serve the files of a folder from the bridge; yield their URL."""
    conf = f"""user root; pid {folder}/pid; error_log {folder}/error.log; daemon off;
        events {{}} http {{ access_log off; server {{ listen {MIRROR}:8080; root {folder}; }} }}"""
    (folder / "nginx.conf").write_text(conf)
    command = ("ip", "netns", "exec", SWITCH, "nginx", "-c", f"{folder}/nginx.conf", "-e", "stderr")
    server = subprocess.Popen(command)
    try:
        yield f"http://{MIRROR}:8080/"
    finally:
        server.terminate()
        server.wait()


def make_payload(base: Path, size: int) -> Path:
    """Write a file of random bytes, its chunk files and a manifest; return the checkout."""
    from csm_weights.commands.split import split_file
    from csm_weights.manifest.render import render
    from csm_weights.manifest.types import Manifest

    root = base / "checkout"
    (root / "manifests").mkdir(parents=True)
    file = root / "payload.bin"
    file.write_bytes(random.Random(1).randbytes(size))
    artifact = split_file(file, root, "chunks/payload", 16 << 20, lambda _: None)
    manifest = Manifest("payload", "output/payload", "models/payload", (artifact,))
    (root / "manifests" / "payload.toml").write_text(render(manifest))
    return root


def measure(case: Case) -> dict[str, Any]:
    """Return what became of one case."""
    with tempfile.TemporaryDirectory(prefix="csm-fleet") as folder, ExitStack() as closing:
        base = Path(folder)
        root = make_payload(base, case.size << 20)
        closing.enter_context(namespaces(case))
        t1 = one_copy(replace(case))
        holders = range(case.nodes + 1 if case.is_complete else 1)
        for number in holders:
            install(root, base / f"node{number}" / "m")
        manifest = base / "payload.toml"
        (root / "manifests" / "payload.toml").rename(manifest)
        url = closing.enter_context(mirror(root)) if case.fault == "holder" else ""
        if not url:
            shutil.rmtree(root)
        address = closing.enter_context(cluster(case, base))
        before = sent(0)
        words = [sys.executable, "-m", "benchmarks.fleet", "--drive", str(manifest)]
        words += ["--address", address, "--nodes", str(case.nodes + 1), "--fault", case.fault]
        words += ["--url", url, "--size", str(case.size << 20)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
        driver = inside(0, *words, stdout=subprocess.PIPE, env=environment)
        out, _ = driver.communicate(timeout=400)
        result: dict[str, Any] = json.loads(out.splitlines()[-1])
        result |= {"t1": t1, "sent": (sent(0) - before) / (case.size << 20)}
        return result


def install(root: Path, folder: Path) -> None:
    from csm_weights.pipeline import apply
    from csm_weights.pipeline.request import Request

    request = Request(root, "payload", ("all",), dest=str(folder))
    outcome = apply.weights(request, smoke=False)
    assert outcome.error is None, outcome.error


def die_at(sent_bytes: int) -> None:
    """End this process once its node has sent so many bytes."""
    counter = Path("/sys/class/net/eth0/statistics/tx_bytes")
    begun = int(counter.read_text())
    while int(counter.read_text()) - begun < sent_bytes:
        time.sleep(0.05)
    os.kill(os.getpid(), 9)


def drive(manifest: str, address: str, nodes: int, fault: str, url: str, size: int) -> None:
    """Run the job, inside the first holder's namespace; print what became of it."""
    from csm_weights.fleet import cluster as fleet
    from csm_weights.fleet import node, server
    from csm_weights.pipeline.request import Request

    class Garbage(server.Handler):
        def send_body(self, fd: int, start: int, end: int) -> None:
            data = bytearray(os.pread(fd, end - start, start))
            data[0] ^= 0xFF
            self.wfile.write(data)

    class Faulty(node.Node):
        count = 0

        def run(self, call: node.Call) -> Any:
            if fault == "garbage" and self.host == f"{NETWORK}2":
                self.handler = Garbage
            if fault == "holder" and self.host == f"{NETWORK}1":
                threading.Thread(target=die_at, args=(size // 2,), daemon=True).start()
            return super().run(call)

        def _do(self, task: Any) -> Any:
            self.count += 1
            if fault == "killed" and self.host == f"{NETWORK}2" and self.count > 60:
                os.kill(os.getpid(), 9)
            return super()._do(task)

    none, source = Path(manifest).parent / "none", "mirror" if url else "chunks"
    urls = (url,) if url else ()
    request = Request(none, manifest, ("all",), source=source, urls=urls)
    started = time.perf_counter()
    outcome = fleet.run(request, address, "$FLEET_DIR/m", nodes, kind=Faulty)
    reports = [
        {
            "host": r.host,
            "status": r.status,
            "seconds": r.seconds,
            "refused": r.refused,
            "fetched": r.from_origin / size,
        }
        for r in outcome.nodes
    ]
    wall = time.perf_counter() - started
    print(json.dumps({"nodes": reports, "events": outcome.events, "wall": wall}))


def describe(case: Case, result: dict[str, Any]) -> str:
    """Return a line of the table."""
    nodes, t1 = result["nodes"], result["t1"]
    good = [n for n in nodes if n["status"] == "verified"]
    slow = f"{NETWORK}{case.nodes + 1}"
    own = [n["seconds"] for n in good if n["host"].endswith(f" {slow}")]
    others = [n["seconds"] for n in good if case.slow == 1 or not n["host"].endswith(f" {slow}")]
    times = f"{max(others) / t1:.2f}" + (f", it {own[0] / t1:.2f}" if case.slow < 1 and own else "")
    goal = case.goal or ("2 s" if case.is_complete else "all finish")
    if case.is_complete:
        times = f"{max(others):.1f} s"
    bad = ", ".join(f"{n['host'].split()[-1]} {n['status']}" for n in nodes if n not in good)
    refused, fetched = (sum(n[key] for n in nodes) for key in ("refused", "fetched"))
    return (
        f"| {case.name} | {t1:.1f} s | {times} | {goal} | {result['sent']:.2f} |"
        f" {len(good)} of {len(nodes)} verified{f', {bad}' if bad else ''}"
        f"{f', {refused} blocks refused' if refused else ''}"
        f"{f', {fetched:.2f} copies from the mirror' if fetched else ''} |"
    )


def main(words: Sequence[str] | None = None) -> None:
    """Measure the named cases, or all; print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*")
    parser.add_argument("--receive", action="store_true")
    parser.add_argument("--send", type=int)
    for name in ("--drive", "--address", "--fault", "--url"):
        parser.add_argument(name, default="")
    for name in ("--nodes", "--size"):
        parser.add_argument(name, type=int, default=0)
    given = parser.parse_args(words)
    if given.receive:
        receive()
    elif given.send:
        send(given.send)
    elif given.drive:
        drive(given.drive, given.address, given.nodes, given.fault, given.url, given.size)
    else:
        print("| case | T1 | last node, in T1 | goal | first holder sent | end |")
        print("|---|---|---|---|---|---|")
        for case in CASES:
            if not given.cases or case.name in given.cases:
                print(describe(case, measure(case)), flush=True)


if __name__ == "__main__":
    main()
