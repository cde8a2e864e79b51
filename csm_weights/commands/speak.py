"""Speak a text to a WAV file, with the weights, tokenizer and codec that are on this machine."""

import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from csm_weights.errors import Finding, Kind, MissingInput, UsageError
from csm_weights.model.offline_assets import BRING, not_installed
from csm_weights.pipeline import speech
from csm_weights.pipeline.locate import Weights
from csm_weights.pipeline.request import Request
from csm_weights.pipeline.session import Summary
from csm_weights.progress import Progress
from csm_weights.store.atomic import require_writable, write_whole


def speak(
    request: Request,
    text: str,
    out: Path,
    speaker: int = 0,
    context: Sequence[str] = (),
    context_text: Sequence[str] = (),
    max_seconds: float = 10.0,
    seed: int = 0,
    tokenizer: str = "",
    codec: str = "",
) -> Summary:
    """Write a text as speech to the WAV file `out`, whole or not at all; return what was written.

    `context` are recordings of the speaker, and `context_text` the words in each.
    `tokenizer` is a tokenizer.json and `codec` a folder with Mimi; where empty
    they are found. Weights that are not verified are verified while they are
    loaded. Raises MissingInput, WrongContent, NoSpace and UsageError.
    """
    # refuse before gigabytes are loaded
    if not text.strip():
        raise UsageError("there is no text to speak")
    if len(context) != len(context_text):
        raise UsageError("each --context FILE.wav needs a --context-text with the words in it")
    if not 0.08 <= max_seconds < math.inf:
        raise UsageError(f"--max-seconds {max_seconds:g} is not at least 0.08, a frame of audio")
    if not 0 <= seed < 2**63:
        raise UsageError(f"--seed {seed} is not from 0 to {2**63 - 1}")
    require_writable(out, "--out")
    found = next(Weights(request).candidates(), None)
    if found is None:
        words = ("its weights", "none", " ".join(["inv weights", *request.options]))
        finding = Finding(Kind.NOT_THERE, request.model, *words)
        raise MissingInput("the model is not on this machine", [finding])
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' own, for Mimi
    try:
        import torch

        from csm_weights.model.codec import Mimi, find_codec
        from csm_weights.model.csm import Model
        from csm_weights.model.generator import Generator, Segment
        from csm_weights.model.tokenizer import TextTokenizer, find_tokenizer
        from csm_weights.model.wav import read_wav, wav_bytes
    except ImportError:
        raise not_installed("torch", "runs the model") from None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    home = speech.codec_folder(request)
    command = " ".join([BRING, *request.options])
    if tokenizer:
        texts = TextTokenizer.from_file(Path(tokenizer))
    else:
        texts = find_tokenizer(found.folder, home, command)
    options = (32, device)
    mimi = Mimi.from_local(codec, *options) if codec else find_codec(*options, home, command)
    rate = mimi.sample_rate
    segments = [
        Segment(speaker, words, read_wav(Path(file), rate))
        for file, words in zip(context, context_text, strict=True)
    ]
    with Progress("loading the model"):
        model = Model.from_local(found.paths, device, config=found.config, digests=found.digests)
        model.folder = found.folder
    generator, longest = Generator(model, texts, mimi), round(max_seconds * 1000)
    Progress("speaking").log(f"at most {longest // 80:,} frames of 80 ms")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.manual_seed(seed)
        audio = generator.generate(text, speaker, segments, longest)
    write_whole(out, wav_bytes(audio, rate))
    notes = [str(one.message) for one in caught if "no watermark" in str(one.message)]
    if generator.watermarked:
        notes = ["it carries Sesame's watermark"]
    if not len(audio):
        notes.append("the model ended before the first frame: try another --seed")
    elif len(audio) * 1000 >= longest // 80 * 80 * rate:
        notes.append("cut off by --max-seconds, perhaps before the end of the text")
    seconds = round(len(audio) / rate, 3)
    shown = f"{out}: {seconds:.2f} s, {rate:,} Hz, mono, 16 bits"
    ok = f"OK: spoken with {request.model}, speaker {speaker}, seed {seed}"
    values = {"file": out, "seconds": seconds, "rate": rate, "remarks": notes}
    return Summary(request.model, [shown, *notes, ok], values)
