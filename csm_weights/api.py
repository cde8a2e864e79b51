"""What a program imports: models whose bytes are verified, and the generator of their speech."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch

from csm_weights.byte_ranges import ByteRange
from csm_weights.errors import Kind, UsageError, WrongContent
from csm_weights.formats import weights_file
from csm_weights.formats.architecture import CsmConfig, read_config
from csm_weights.model import csm as plain
from csm_weights.model.generator import Generator, InputsTooLong, Segment
from csm_weights.pipeline import locate
from csm_weights.pipeline.locate import CONFIG, LocalWeights, Pinned
from csm_weights.pipeline.request import Request
from csm_weights.progress import Progress

__all__ = ["Generator", "InputsTooLong", "Model", "Segment", "load_csm_1b"]


_FINE_TUNE = (
    "If this is a fine-tune, which has the size of the release: pass verify=False, give the file\n"
    "another name, or write a manifest for it: inv convert --manifest NAME."
)


class Model(plain.Model):
    """A CSM network with the weights of a file; every tensor is there, and no other.

    `folder` is where its other files are, such as the tokenizer. `verified`
    says whether its bytes have the digests that a manifest pins.
    """

    verified: bool = False

    @classmethod
    def from_local(
        cls,
        path: str | Path | Sequence[Path],
        device: str | torch.device = "cpu",
        dtype: plain.DType = "fast",
        *,
        config: CsmConfig | None = None,
        digests: Sequence[ByteRange] = (),
        verify: bool | None = None,
    ) -> Self:
        """Load a folder, a file of weights, shards, a folder of chunk files, or a chunk repository.

        Either format, by its content, float32, bfloat16 or float16, with the
        names of the original or of transformers. `dtype` "fast" is bfloat16 on a GPU and
        float32 on the CPU; None keeps the file's. The network is `config`, else
        that of config.json; where there is none, that of the manifest that pins
        weights of this size.

        A file with a valid receipt was verified before. Any other is hashed
        while it is loaded, where a manifest pins a file of its name and size:
        one of the checkout that it is in, or of the package's. Where none does,
        a warning says that the weights are not verified. `verify=True` hashes
        in any case, and insists on something pinned for this size; it holds the
        bytes against the digests of blocks, on all cores, where a valid receipt
        has them, else against the manifest's. `verify=False` checks nothing.
        `digests` are the ranges to hold the bytes against instead.

        Raises MissingInput for what is not there, WrongContent, which names
        it, for a tensor that is missing, one too many or of another shape, and
        for a wrong digest; UsageError where nothing is pinned to `verify` by.
        """
        _require_options(device, dtype)
        if not isinstance(verify, bool | None):
            raise UsageError(f"verify is True, False or None, and not {verify!r}")
        files, folder = weights_file.locate(path)
        paths = [part for file in files for part in file]
        size = sum(file.stat().st_size for file in paths)
        config = config or _read_config(folder, locate.pinned(folder, size))
        is_verified = False
        if verify is not False and not digests:
            name = "" if verify else paths[0].name.rpartition(".part-")[0] or paths[0].name
            known = locate.pinned(folder, size, name)
            if verify and not known:
                raise UsageError(
                    f"nothing is pinned for {paths[0]}: no manifest here has weights of {size:,}"
                    " bytes; inv lock makes one, or leave verify out"
                )
            receipts = [locate.valid_receipt(part, known) for part in paths]
            is_verified = all(receipts) and not verify
            if not is_verified:
                blocks = receipts[0].blocks if len(paths) == 1 and receipts[0] else ()
                digests = blocks or (known.digests if known else ())
            if not known and not is_verified:
                text = "no manifest pins a file of its name and size, so it is loaded unverified"
                warnings.warn(f"{paths[0]}: {text}", stacklevel=2)
        found = LocalWeights(tuple(paths), folder, config, tuple(digests))
        try:
            model = cls._open(found, device, dtype)
        except WrongContent as error:
            if found.digests and all(one.kind is Kind.WRONG_DIGEST for one in error.findings):
                error.advice = _FINE_TUNE
            raise
        model.verified = is_verified or bool(digests)
        return model

    @classmethod
    def from_pretrained(
        cls,
        repo: str,
        revision: str | None = None,
        device: str | torch.device = "cpu",
        dtype: plain.DType = "fast",
    ) -> Self:
        """Load the model of a repository of the Hub, "org/name".

        `revision` is a commit, branch or tag. What is on this machine and
        right is taken first; else it is fetched, verified, and kept. Of a
        repository that a manifest of the checkout names, that manifest's
        digests decide. Of any other the Hub's own do, written down beside the
        Hub's cache at its first use: a branch then stays at that commit.

        Raises as `from_local`, and AccessRefused, NetworkFailed or NoSpace.
        """
        _require_options(device, dtype)
        return cls._obtain(locate.of_repo(locate.checkout(), repo, revision), device, dtype)

    @classmethod
    def _obtain(cls, request: Request, device: str | torch.device, dtype: plain.DType) -> Self:
        """Load what is here of a model and right, else what is fetched."""
        weights = locate.Weights(request)
        for found in weights.candidates():
            try:
                return cls._open(found, device, dtype)
            except WrongContent as error:
                if not found.digests:
                    raise
                Progress("loading").log(f"{found.paths[0]} is not loaded: {error}")
        return cls._open(weights.fetch(), device, dtype)

    @classmethod
    def _open(cls, found: LocalWeights, device: str | torch.device, dtype: plain.DType) -> Self:
        model = super().from_local(
            found.paths, device, dtype, config=found.config, digests=found.digests
        )
        model.folder, model.verified = found.folder, True
        return model


def load_csm_1b(device: str | torch.device = "cuda", dtype: plain.DType = "fast") -> Generator:
    """Load CSM-1B, ready to generate: from this machine where it is right, else from the Hub.

    Raises as `Model.from_pretrained`, and UsageError without the GPU asked for.
    """
    _require_options(device, dtype)
    request = Request(locate.checkout())
    return Generator(Model._obtain(request, device, dtype))


def _read_config(folder: Path, known: Pinned | None) -> CsmConfig | None:
    """Return the network of config.json in a folder, or else the one that is pinned."""
    config = folder / CONFIG
    fallback = known.config if known else None
    if not config.is_file():
        return fallback
    try:
        return read_config(config)
    except WrongContent as error:
        # The public chunk repository has the Hub's refusal in its place.
        if fallback is None:
            raise
        warnings.warn(f"{error}\nthe network is known by the weights' size", stacklevel=3)
        return fallback


def _require_options(device: str | torch.device, dtype: plain.DType) -> None:
    """Raise UsageError for a dtype or device that is not here, before gigabytes are fetched."""
    is_float = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    if not is_float and dtype not in (None, "fast"):
        raise UsageError(f"dtype is 'fast', None or torch's, such as torch.float32, not {dtype!r}")
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise UsageError(f"{device!r} is no device that torch knows") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError("torch finds no CUDA device here; device='cpu' does without one")
