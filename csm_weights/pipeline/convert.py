"""Convert weights from one layout, format or dtype to another, streaming and without torch."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from csm_weights.errors import (
    GET_AGAIN,
    Finding,
    Kind,
    NoSpace,
    UsageError,
    WrongContent,
    did_you_mean,
)
from csm_weights.files import read_bounded, read_file
from csm_weights.formats import FORMATS
from csm_weights.formats.architecture import MAX_CONFIG, CsmConfig
from csm_weights.formats.compare import tied_findings
from csm_weights.formats.dtypes import FLOATS
from csm_weights.formats.identify import check_network, network_of
from csm_weights.formats.model_files import (
    generation_config,
    original_config,
    shard_index,
    transformers_config,
)
from csm_weights.formats.multipart import MultipartFile
from csm_weights.formats.transformers_layout import (
    AUDIO,
    CODEC,
    Layout,
    NamedTensor,
    NamedTensors,
    in_transformers_layout,
    name_tensors,
    read_configs,
)
from csm_weights.formats.weights_file import find, open_weights
from csm_weights.formats.write import NewFile, nbytes_as, safetensors_file, torch_file
from csm_weights.hashing import blob_id
from csm_weights.manifest import pin
from csm_weights.manifest.parse import load
from csm_weights.manifest.paths import RECEIPTS, data_findings
from csm_weights.manifest.types import Artifact, Manifest
from csm_weights.pipeline.request import manifests
from csm_weights.pipeline.session import Summary, receipt_of
from csm_weights.progress import Progress
from csm_weights.store.atomic import write_whole
from csm_weights.store.install import install
from csm_weights.store.journal import partial_path
from csm_weights.store.lock import NAME, lock
from csm_weights.store.manifest_file import write_manifest
from csm_weights.store.receipts import Receipt, read_receipt
from csm_weights.store.stream_file import write_stream

#: What the description of a converted model's manifest begins with.
_DESCRIPTION = "CSM weights in"

#: The file of each layout and format, as the layout's own loader looks for it.
NAMES = {
    ("original", "safetensors"): "model.safetensors",
    ("original", "ckpt"): "ckpt.pt",
    ("transformers", "safetensors"): "model.safetensors",
    ("transformers", "ckpt"): "pytorch_model.bin",
}


@dataclass(frozen=True)
class Conversion:
    """What is asked for: the weights at `path`, in the layout `to`, in the folder `out`.

    `format` is a word of --only; `dtype` one of `FLOATS`, or empty to keep
    each tensor's. `shard_size` is in bytes, 0 for one file. `codec` has Mimi's
    tensors. `manifest` names the manifest to write, or is empty.
    """

    path: Path
    to: str
    out: Path
    format: str = "safetensors"
    dtype: str = ""
    shard_size: int = 0
    codec: Path | None = None
    manifest: str = ""

    def __post_init__(self) -> None:
        formats = [one.choice for one in FORMATS]
        for option, word, known in (
            ("--to", self.to, ("original", "transformers")),
            ("--format", self.format, formats),
            ("--dtype", self.dtype or "float32", FLOATS),
        ):
            if word not in known:
                hint = did_you_mean(word, known)
                raise UsageError(f"no {option} {word!r}; there are {', '.join(known)}{hint}")
        if self.shard_size and self.format != "safetensors":
            raise UsageError("--shard-size cuts safetensors into shards; leave it or --format out")
        if self.codec and self.to != "transformers":
            raise UsageError(
                "--codec goes with --to transformers: the original layout has no codec"
            )
        if self.manifest and (problem := pin.name_problem(self.manifest)):
            raise UsageError(f"--manifest {self.manifest!r}: {problem}")


def convert(root: Path, wanted: Conversion) -> Summary:
    """Write weights in another layout, format or dtype; return what was written.

    Every file is written under an unfinished name and hashed on the way, and
    gets its name and a receipt when it is whole. A second run continues a first
    one, and writes nothing where all is done. Raises WrongContent, naming the
    tensor, for weights that are no whole CSM, and where another file has the
    name; MissingInput, NoSpace and UsageError.
    """
    if problem := data_findings(root, wanted.out, ["model.safetensors"], "--out"):
        raise WrongContent("weights cannot be written there", problem)
    if wanted.manifest:
        _refuse_to_replace(root, wanted)
    with ExitStack() as stack:
        opened = [stack.enter_context(open_weights(paths)) for paths in find(wanted.path)]
        folder = opened[0].source.paths[0].parent
        named = name_tensors(opened, [folder])
        network = _checked(named, folder)
        tensors, notes = dict(named.tensors), []
        config, mimi = {}, named.codec
        if wanted.codec:
            codec = [stack.enter_context(open_weights(paths)) for paths in find(wanted.codec)]
            mimi = name_tensors(codec, []).tensors
            config = _read_json(codec[0].source.paths[0].with_name("config.json"))
            opened += codec
        if wanted.to == "transformers":
            tensors = in_transformers_layout(tensors, network)
            tensors |= {CODEC + name: tensor for name, tensor in mimi.items()}
            if not mimi:
                notes.append("without Mimi's tensors, which transformers then draws: see --codec")
        elif mimi:
            notes.append(f"left out: Mimi's {len(mimi):,} tensors, for this layout has none")
        files, texts = _new_files(tensors, wanted)
        is_theirs = named.summary.layout is Layout.TRANSFORMERS
        dtype = FLOATS.get(wanted.dtype, named.tensors[AUDIO].dtype)
        texts["config.json"] = original_config(network)
        if wanted.to == "transformers":
            known = _read_json(folder / "config.json") if is_theirs else {}
            texts["config.json"] = transformers_config(network, dtype, config, known)
            texts["generation_config.json"] = generation_config(network)
        receipts = _write(wanted, files, texts, [one.source for one in opened])
    if wanted.manifest:
        notes.append(_write_manifest(root, wanted, receipts, texts))
    shown = [f"{r.path}: {r.size:,} bytes, sha256 {r.sha256}" for r in receipts]
    ok = f"OK: converted to the {wanted.to} layout in {wanted.out}"
    files_made = [{"path": r.path, "size": r.size, "sha256": r.sha256} for r in receipts]
    values = {"folder": wanted.out, "files": files_made, "remarks": notes}
    return Summary(wanted.manifest or None, [*shown, *notes, ok], values)


def _checked(named: NamedTensors, folder: Path) -> CsmConfig:
    """Return the network that some weights are; raise WrongContent unless they are a whole one."""
    where = named.summary.where
    network = network_of(named, read_configs([folder]))
    if network is None:
        finding = Finding(Kind.MALFORMED, where, "the tensors of a CSM", "others", "inv identify")
        raise WrongContent("these are not the weights of a CSM that is known", [finding])
    if wrong := check_network(named, network, mixed=True).listed():
        raise WrongContent("the weights are not whole, or not floats", wrong)
    if odd := tied_findings(named):
        raise WrongContent("two tensors that are tied differ: which one counts?", odd)
    return network


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a small file; empty where there is none."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(read_file(path, MAX_CONFIG, "a config.json"))
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        finding = Finding(Kind.MALFORMED, str(path), "a JSON object", "something else", GET_AGAIN)
        raise WrongContent("config.json cannot be used", [finding])
    return data


def _new_files(
    tensors: Mapping[str, NamedTensor], wanted: Conversion
) -> tuple[dict[str, NewFile], dict[str, str]]:
    """Return the files for some tensors by name, and the index where there are several."""
    dtype, name = FLOATS.get(wanted.dtype), NAMES[wanted.to, wanted.format]
    if wanted.format == "ckpt":
        return {name: torch_file(tensors, dtype)}, {}
    groups: list[dict[str, NamedTensor]] = [{}]
    size = total = 0
    for one in sorted(tensors):
        nbytes = nbytes_as(tensors[one], dtype)
        if wanted.shard_size and groups[-1] and size + nbytes > wanted.shard_size:
            groups.append({})
            size = 0
        groups[-1][one] = tensors[one]
        size, total = size + nbytes, total + nbytes
    metadata = {"format": "pt"} if wanted.to == "transformers" else {}
    count = len(groups)
    names = [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
    names = names if count > 1 else [name]
    pairs = list(zip(names, groups, strict=True))
    files = {shard: safetensors_file(group, dtype, metadata) for shard, group in pairs}
    places = {one: shard for shard, group in pairs for one in group}
    return files, {f"{name}.index.json": shard_index(places, total)} if count > 1 else {}


def _write(
    wanted: Conversion,
    files: Mapping[str, NewFile],
    texts: Mapping[str, str],
    sources: Sequence[MultipartFile],
) -> list[Receipt]:
    """Write what is not there yet; return the receipts of the files of weights."""
    out, model = wanted.out, wanted.manifest or wanted.out.resolve().name
    stats = [asdict(stat) for source in sources for stat in source.fingerprints]
    asked = [stats, wanted.to, wanted.format, wanted.dtype, wanted.shard_size]
    key = f"converted {hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]}"
    with lock(out, f"{RECEIPTS}/{NAME}"):
        done = {name: receipt for name in files if (receipt := _finished(out, name, key))}
        for name in (*files, *texts):
            path = out / name
            is_ours = name in done or (name in texts and _is_text(path, texts[name]))
            if os.path.lexists(path) and not is_ours:
                words = ("no file yet", "another one", "move it away, or choose another --out")
                finding = Finding(Kind.IN_THE_WAY, str(path), *words)
                raise WrongContent("a file that is not of this conversion is in the way", [finding])
        missing = {name: new for name, new in files.items() if name not in done}
        left = [partial_path(out / name) for name in missing]
        there = sum(path.stat().st_size for path in left if path.is_file())
        size = sum(new.size for new in missing.values())
        if (free := shutil.disk_usage(out).free) < (needed := size - there):
            words = (f"{needed:,} bytes free", f"{free:,}", "free some, or choose another --out")
            raise NoSpace("too little disk", [Finding(Kind.NO_SPACE, str(out), *words)])
        with Progress("converting", size) as progress:
            for name, new in missing.items():
                file = write_stream(out / name, new.blocks, key, progress.advance)
                if changes := [finding for source in sources for finding in source.changes()]:
                    raise WrongContent("the weights changed while they were converted", changes)
                done[name] = install(file.path, out, receipt_of(file, name, model))
        for name, text in texts.items():
            write_whole(out / name, text)
    return [done[name] for name in files]


def _finished(out: Path, name: str, key: str) -> Receipt | None:
    """Return the receipt of a file that this very conversion has written and nobody touched."""
    receipt, path = read_receipt(out, name), out / name
    if receipt is None or not path.is_file() or [p.source for p in receipt.pieces] != [key]:
        return None
    return receipt if receipt.is_current(path.stat()) else None


def _is_text(path: Path, text: str) -> bool:
    return path.is_file() and read_bounded(path, len(text.encode()) + 1) == text.encode()


def _refuse_to_replace(root: Path, wanted: Conversion) -> None:
    """Raise UsageError unless the manifest's name is free, or that of an earlier conversion."""
    path = root / "manifests" / f"{wanted.manifest}.toml"
    if not os.path.lexists(path) and wanted.manifest not in {m.stem for m in manifests(root)}:
        return
    known = load(path) if path.is_file() else None
    is_converted = known is not None and known.description.startswith(_DESCRIPTION)
    if known and is_converted and (known.repo, known.destination) == (None, _folder(root, wanted)):
        return
    raise UsageError(f"--manifest {wanted.manifest}: there is one already; choose another name")


def _folder(root: Path, wanted: Conversion) -> str:
    """Return the destination in the manifest: the folder of the new files, or models/NAME."""
    out, home = wanted.out.resolve(), root.resolve()
    if out.is_relative_to(home):
        return out.relative_to(home).as_posix()
    return f"models/{wanted.manifest}"


def _write_manifest(
    root: Path, wanted: Conversion, receipts: Sequence[Receipt], texts: Mapping[str, str]
) -> str:
    artifacts = [
        Artifact(
            path=receipt.path,
            group=pin.group_of(receipt.path),
            format=next(one.name for one in FORMATS if one.choice == wanted.format),
            size=receipt.size,
            sha256=receipt.sha256,
            blob_id=blob_id(receipt.sha256, receipt.size),
            evidence=dict.fromkeys(("size", "sha256", "blob_id"), "A"),
        )
        for receipt in receipts
    ]
    for name, text in sorted(texts.items()):
        content = text.encode()
        digest = hashlib.sha256(content).hexdigest()
        kind, marks = "config" if name == "config.json" else "opaque", {"size": "A", "sha256": "A"}
        artifacts.append(
            Artifact(name, "config", kind, len(content), digest, text=text, evidence=marks)
        )
    name, folder = wanted.manifest, _folder(root, wanted)
    path = root / "manifests" / f"{name}.toml"
    words = f"{_DESCRIPTION} {wanted.to} layout, converted from {wanted.path.name}."
    write_manifest(path, Manifest(name, f"output/{name}", folder, tuple(artifacts), words))
    dest = "" if wanted.out.resolve() == (root / folder).resolve() else f" --dest {wanted.out}"
    return f"manifest: {path}; next: inv verify --model {name}{dest}"
