"""What a program imports: models that are proven, and the generator that lets them speak."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch

from csm_weights.byte_ranges import ByteRange
from csm_weights.errors import UsageError, WrongContent
from csm_weights.formats import weights_file
from csm_weights.formats.architecture import CsmConfig, parse_config
from csm_weights.model import csm as plain
from csm_weights.model.generator import Generator, InputsTooLong, Segment
from csm_weights.pipeline import locate
from csm_weights.pipeline.locate import CONFIG, LocalWeights
from csm_weights.pipeline.request import Request

__all__ = ["Generator", "InputsTooLong", "Model", "Segment", "load_csm_1b"]


class Model(plain.Model):
    """A CSM network with the weights of a file; every tensor is there, and no other.

    `folder` is where its other files are, such as the tokenizer.
    """

    folder: Path | None = None

    @classmethod
    def from_local(
        cls,
        path: str | Path | Sequence[Path],
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = torch.bfloat16,
        *,
        config: CsmConfig | None = None,
        digests: Sequence[ByteRange] = (),
        verify: bool = False,
    ) -> Self:
        """Loads a folder, a file of weights, a folder of parts, or a chunk repository.

        Either format, told by its content. `dtype` None keeps the file's. The
        network is `config`, else that of config.json; where that is not
        to be had, that of the manifest that pins weights of this size. With
        `verify` every byte is held against what a manifest of the checkout
        pins; `digests` gives the spans to be held against instead.

        Raises MissingInput for what is not there, WrongContent, which names
        it, for a tensor that is missing, one too many or of another shape, and
        for a wrong digest; UsageError where nothing is pinned to `verify` by.
        """
        _require_device(device)
        (paths, folder), root = weights_file.locate(path), locate.checkout()
        size = sum(part.stat().st_size for part in paths)
        if verify and not digests:
            digests = locate.require_pinned(root, paths[0], size).digests
        config = config or _read_config(folder, root, size)
        model = super().from_local(paths, device, dtype, config=config, digests=digests)
        model.folder = folder
        return model

    @classmethod
    def from_pretrained(
        cls,
        repo: str,
        revision: str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = torch.bfloat16,
    ) -> Self:
        """Loads the model of a repository of the Hub, "org/name".

        `revision` is a commit, branch or tag. What is on this machine and
        right is taken first; else it is fetched, proven, and kept. Of a
        repository that a manifest of the checkout names, that manifest's
        digests decide. Of any other the Hub's own do, written down beside the
        Hub's cache at its first use: a branch then stays at that commit.

        Raises as `from_local`, and AccessRefused, NetworkFailed or NoSpace.
        """
        _require_device(device)
        return cls._obtain(locate.of_repo(locate.checkout(), repo, revision), device, dtype)

    @classmethod
    def _obtain(
        cls, request: Request, device: str | torch.device, dtype: torch.dtype | None
    ) -> Self:
        """The model of a request: what is here and right, else what the line brings."""
        for found in locate.here(request):
            try:
                return cls._open(found, device, dtype)
            except WrongContent as error:
                if found.is_proven:
                    raise
                locate.pass_over(found, error)
        return cls._open(locate.fetch(request), device, dtype)

    @classmethod
    def _open(
        cls, found: LocalWeights, device: str | torch.device, dtype: torch.dtype | None
    ) -> Self:
        model = super().from_local(
            found.paths, device, dtype, config=found.config, digests=found.digests
        )
        model.folder = found.folder
        return model


def load_csm_1b(
    device: str | torch.device = "cuda", dtype: torch.dtype | None = torch.bfloat16
) -> Generator:
    """CSM-1B, ready to speak: from proven files or parts on this machine, else from the Hub.

    Raises as `Model.from_pretrained`, and UsageError without the GPU asked for.
    """
    _require_device(device)
    request = locate.published(locate.checkout())
    return Generator(Model._obtain(request, device, dtype))


def _read_config(folder: Path, root: Path, size: int) -> CsmConfig | None:
    """What config.json in a folder says; None where it is not there and nothing is pinned."""
    config = folder / CONFIG
    known = locate.pinned(root, size)
    fallback = known.config if known else None
    if not config.is_file():
        return fallback
    try:
        return parse_config(config.read_bytes(), str(config))
    except WrongContent as error:
        # The public chunk repository has the Hub's refusal in its place.
        if fallback is None:
            raise
        warnings.warn(f"{error}\nthe weights' size tells which network it is", stacklevel=3)
        return fallback


def _require_device(device: str | torch.device) -> None:
    """Says before gigabytes are fetched that they cannot be loaded where they should."""
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise UsageError(f"{device!r} is no device that torch knows") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError("torch finds no CUDA device here; device='cpu' does without one")
