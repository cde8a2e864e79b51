"""What a model needs to speak besides its weights: its tokenizer, and its codec's manifest."""

from dataclasses import replace
from pathlib import Path

from csm_weights.errors import UsageError
from csm_weights.model.offline_assets import TOKENIZER_FILE
from csm_weights.pipeline.request import Request, find_manifest
from csm_weights.pipeline.session import begin
from csm_weights.store.inspect import FileState


def needs(request: Request) -> list[Request]:
    """Return the requests for what a model needs to speak, besides the request for it itself.

    Its tokenizer, where its own manifest has one, and its codec. Folders and mirrors that a
    request names have the codec in a folder of the codec's name. Raises UsageError for a
    model whose manifest names no codec.
    """
    manifest = find_manifest(request.root, request.model)
    if not manifest.codec:
        raise UsageError(f"--with speak: {manifest.where} names no codec: it has no [speech]")
    groups = {a.group for a in manifest.artifacts if a.path == TOKENIZER_FILE}
    own = [replace(request, only=tuple(groups))] if groups else []
    return [*own, codec_of(request, manifest.codec)]


def codec_of(request: Request, codec: str) -> Request:
    """Return the request for the codec of a model; a revision is of the model alone."""
    dest, staging = (f"{f}/{codec}" if f else None for f in (request.dest, request.staging))
    urls = tuple(f"{url.rstrip('/')}/{codec}" for url in request.urls)
    made = replace(request, model=codec, dest=dest, staging=staging, urls=urls)
    return replace(made, only=(), revision=None, consume=False)


def codec_folder(request: Request) -> Path | None:
    """Return the folder in which the codec of a model is installed and verified, if it is."""
    codec = find_manifest(request.root, request.model).codec
    if not codec:
        return None
    state = begin(codec_of(request, codec)).inspect()
    states = {item.installed.state for item in state.artifacts}
    return state.paths.destination if states == {FileState.VERIFIED} else None
