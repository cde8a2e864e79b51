"""Prompts as Sesame's generator makes them; the sources of tokenizer, codec and watermark."""

from __future__ import annotations

import inspect
import io
import socket
import sys
import types
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

from csm_weights.errors import CsmWeightsError, MissingInput, UsageError, WrongContent
from csm_weights.model import generator as generators
from csm_weights.model import tokenizer as tokenizers_
from csm_weights.model import watermark
from csm_weights.model.codec import Mimi, find_codec
from csm_weights.model.csm import Model
from csm_weights.model.generator import Generator, Segment
from csm_weights.model.tokenizer import TextTokenizer, find_tokenizer
from csm_weights.model.watermark import resample
from tests.support.networks import TINY
from tools.standin.speech import CONFIG as TINY_CODEC

SMALL = replace(TINY, max_positions=20)

#: The ids of BOS and EOS in the tokenizer of these tests: they follow 256 bytes.
BOS, EOS = 256, 257

#: The arguments of Sesame's generator, and their defaults.
SIGNATURE = {
    "text": inspect.Parameter.empty,
    "speaker": inspect.Parameter.empty,
    "context": inspect.Parameter.empty,
    "max_audio_length_ms": 90_000,
    "temperature": 0.9,
    "topk": 50,
}


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(1)
    return Model(TINY).eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hub; whoever opens a connection fails."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))

    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return tmp_path / "hf" / "hub"


@pytest.fixture(autouse=True)
def no_silentcipher(monkeypatch: pytest.MonkeyPatch) -> None:
    """silentcipher is not installed, whatever this machine has."""
    monkeypatch.setitem(sys.modules, "silentcipher", None)


class Script:
    """A decoder that gives scripted frames, and keeps the calls."""

    def __init__(self, *frames: int) -> None:
        self.frames = list(frames)
        self.asked: list[tuple[Tensor, Tensor, float, int]] = []

    def start(
        self, tokens: Tensor, mask: Tensor, temperature: float = 0.9, topk: int = 50
    ) -> Tensor:
        self.asked.append((tokens, mask, temperature, topk))
        return self.step()

    def step(self) -> Tensor:
        return torch.full((1, 32), self.frames.pop(0))


class FakeCodec:
    """A codec with given codes, whose audio is the codes of the first codebook."""

    sample_rate = 24_000
    codebooks = 32

    def __init__(self, codes: Tensor | None = None) -> None:
        self.codes = codes
        self.decoded: list[Tensor] = []

    def encode(self, audio: Tensor) -> Tensor:
        assert audio.ndim == 1 and self.codes is not None
        return self.codes

    def decode(self, codes: Tensor) -> Tensor:
        self.decoded.append(codes)
        return codes[0].float().repeat_interleave(1920) / 35


def byte_tokenizer() -> Tokenizer:
    """A token a byte; its own post-processor would put BOS before a text twice and no EOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.add_special_tokens([tokenizers_.BOS, tokenizers_.EOS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{tokenizers_.BOS} {tokenizers_.BOS} $A",
        special_tokens=[(tokenizers_.BOS, BOS)],
    )
    return tokenizer


def ids(text: str) -> list[int]:
    """The tokens of a text, by another way than the generator's."""
    vocabulary = byte_tokenizer().get_vocab()
    return [vocabulary[" ".replace(" ", "Ġ") if c == " " else c] for c in text]


def scripted(model: Model, script: Script, **given: Any) -> Generator:
    generator = Generator(model, **given)
    vars(generator)["_decoder"] = script
    return generator


def snapshot(cache: Path, repo: str, commit: str = "c" * 40, main: bool = True) -> Path:
    """The folder of a snapshot in the cache, which main stands for."""
    home = cache / f"models--{repo.replace('/', '--')}"
    folder = home / "snapshots" / commit
    folder.mkdir(parents=True)
    if main:
        (home / "refs").mkdir()
        (home / "refs" / "main").write_text(commit)
    return folder


def columns(text: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The frames of text tokens, and their mask."""
    tokens = torch.zeros(len(text), 33, dtype=torch.long)
    tokens[:, 32] = torch.tensor(text)
    mask = torch.zeros(len(text), 33, dtype=torch.bool)
    mask[:, 32] = True
    return tokens, mask


# ---- the prompt


@pytest.mark.parametrize(
    ("name", "longest"),
    [("generate", 90_000), ("generate_frames", 10_000), ("iter_frames", 10_000)],
)
def test_signature_is_that_of_sesames_generator(name: str, longest: int) -> None:
    """Callers of Sesame's generator need not change a word; frames alone end after ten seconds."""
    parameters = dict(inspect.signature(getattr(Generator, name)).parameters)
    del parameters["self"]
    expected = SIGNATURE | {"max_audio_length_ms": longest}

    assert {key: value.default for key, value in parameters.items()} == expected
    assert list(expected) == list(parameters)


def test_text_is_speaker_and_text_between_bos_and_eos(model: Model) -> None:
    """The prompt of a text alone is BOS, `[speaker]text`, EOS, in the text column only."""
    script = Script(0)
    scripted(model, script, tokenizer=byte_tokenizer()).generate_frames("Hi you", 3, [])
    tokens, mask, _, _ = script.asked[0]
    expected, expected_mask = columns([BOS, *ids("[3]Hi you"), EOS])

    assert torch.equal(expected[None], tokens)
    assert torch.equal(expected_mask[None], mask)


def test_context_is_text_then_audio_then_a_frame_of_zeros(model: Model) -> None:
    """Each segment of the context comes before the text, its audio ended by a zero frame."""
    codes = torch.arange(96).view(32, 3) % 35
    script = Script(0)
    generator = scripted(model, script, tokenizer=byte_tokenizer(), codec=FakeCodec(codes))
    generator.generate_frames("b", 1, [Segment(0, "a", torch.zeros(5760))])
    tokens, mask, _, _ = script.asked[0]
    said, said_mask = columns([BOS, *ids("[0]a"), EOS])
    asked, asked_mask = columns([BOS, *ids("[1]b"), EOS])
    heard = torch.zeros(4, 33, dtype=torch.long)
    heard[:3, :32] = codes.T
    heard_mask = torch.ones(4, 33, dtype=torch.bool)
    heard_mask[:, 32] = False

    assert torch.equal(torch.cat((said, heard, asked))[None], tokens)
    assert torch.equal(torch.cat((said_mask, heard_mask, asked_mask))[None], mask)


def test_context_as_codes_is_context_as_audio(model: Model) -> None:
    """Codes in place of the audio they came from give the same prompt, without a codec."""
    codes = torch.arange(64).view(32, 2) % 35
    prompts = []
    for segment, codec in (
        (Segment(0, "a", torch.zeros(3840)), FakeCodec(codes)),
        (Segment(0, "a", codes=codes), None),
    ):
        script = Script(0)
        generator = scripted(model, script, tokenizer=byte_tokenizer(), codec=codec)
        generator.generate_frames("b", 0, [segment])
        prompts.append(script.asked[0][0])

    assert torch.equal(*prompts)


def test_token_ids_need_no_tokenizer(model: Model) -> None:
    """Text given as token ids is taken as it is."""
    script = Script(0)
    scripted(model, script).generate_frames([5, 6, 511], 0, [])

    assert torch.equal(columns([5, 6, 511])[0][None], script.asked[0][0])


@pytest.mark.parametrize(
    ("text", "segment", "said"),
    [
        ([512], None, "0 to 511"),
        ([-1], None, "-1 to -1"),
        ([1], Segment(0, [1]), "either audio or codes"),
        ([1], Segment(0, [1], torch.zeros(1), torch.zeros(32, 1).long()), "either"),
        ([1], Segment(0, [1], codes=torch.zeros(31, 1).long()), r"\(31, 1\)"),
        ([1], Segment(0, [1], codes=torch.zeros(32).long()), r"\(32,\)"),
        ([1], Segment(0, [1], codes=torch.zeros(32, 1)), "float32"),
        ([1], Segment(0, [1], codes=torch.full((32, 1), 35)), "0 to 34"),
    ],
)
def test_what_the_model_does_not_have_is_refused(
    model: Model, text: list[int], segment: Segment | None, said: str
) -> None:
    """Tokens and codes out of range, and segments without or with two sounds, are errors."""
    with pytest.raises(UsageError, match=said):
        scripted(model, Script(0)).generate_frames(text, 0, [segment] if segment else [])


# ---- the frames


def test_a_frame_of_zeros_ends_the_audio_and_is_not_in_it(model: Model) -> None:
    """The frames before the first that is all zeros are the result, as (T, K)."""
    script = Script(7, 8, 0, 9)
    frames = scripted(model, script).generate_frames([1], 0, [])

    assert frames.tolist() == [[7] * 32, [8] * 32]
    assert script.frames == [9]


def test_a_frame_with_one_code_goes_on(model: Model) -> None:
    """Only a frame in which every code is zero is the end."""
    script = Script()
    codes = torch.zeros(1, 32, dtype=torch.long).index_fill(1, torch.tensor([5]), 1)
    script.step = lambda: codes  # type: ignore[method-assign]
    frames = scripted(model, script).generate_frames([1], 0, [], max_audio_length_ms=80)

    assert len(frames) == 1


@pytest.mark.parametrize(
    ("milliseconds", "count"), [(0, 0), (79, 0), (80, 1), (239.9, 2), (240, 3)]
)
def test_length_is_whole_frames_of_80_ms(model: Model, milliseconds: float, count: int) -> None:
    """At most int(ms / 80) frames are made, and no step more than that."""
    script = Script(*range(1, 9))
    frames = scripted(model, script).generate_frames([1], 0, [], milliseconds)

    assert (count, 32) == frames.shape
    assert 8 - count == len(script.frames)


def test_frames_come_one_by_one_and_may_be_stopped(model: Model) -> None:
    """A caller that has heard enough takes no further frame, and none is made."""
    script = Script(1, 2, 3, 4)
    frames = scripted(model, script).iter_frames([1], 0, [])
    assert next(frames).tolist() == [1] * 32
    assert next(frames).tolist() == [2] * 32
    frames.close()  # type: ignore[attr-defined]
    assert script.frames == [3, 4]


def test_progress_is_shown_on_a_terminal_alone(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bar counts the frames on a terminal's stderr; elsewhere nothing is written."""

    class Terminal(io.StringIO):
        is_terminal = True

        def isatty(self) -> bool:
            return self.is_terminal

    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    scripted(model, Script(7, 8, 0)).generate_frames([1], 0, [], 800)
    assert "generating" in shown.getvalue() and "/10" in shown.getvalue()
    monkeypatch.setattr(sys, "stderr", quiet := Terminal())
    quiet.is_terminal = False
    scripted(model, Script(7, 8, 0)).generate_frames([1], 0, [], 800)
    assert quiet.getvalue() == ""


def test_prompt_and_audio_must_stay_below_the_positions() -> None:
    """A prompt of 9 frames leaves room for 10 in 20 positions, as Sesame counts, not for 11."""
    generator = scripted(Model(SMALL), Script(*range(1, 31)))

    assert len(generator.generate_frames([1] * 9, 0, [], 800)) == 10
    for error in (ValueError, UsageError):
        with pytest.raises(error, match="Inputs too long"):
            generator.generate_frames([1] * 9, 0, [], 880)


def test_temperature_and_topk_reach_the_decoder(model: Model) -> None:
    """The caller's sampling is the decoder's, by name or by position; Sesame's by default."""
    script = Script(0, 0, 0)
    generator = scripted(model, script)
    generator.generate_frames([1], 0, [])
    generator.generate_frames([1], 0, [], 800, 0.5, 7)
    generator.generate_frames([1], 0, [], topk=3, temperature=0.25)

    assert [asked[2:] for asked in script.asked] == [(0.9, 50), (0.5, 7), (0.25, 3)]


def test_the_same_seed_says_the_same(model: Model) -> None:
    """With the model itself, torch's seed decides what is drawn, call after call."""
    generator = Generator(model)
    runs = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        runs.append(generator.generate_frames([1, 2, 3], 0, [], 400))

    assert torch.equal(runs[0], runs[2])
    assert not torch.equal(runs[0], runs[1])


def test_frames_are_those_of_the_model_step_by_step(model: Model) -> None:
    """Greedy frames are the codes that generate_frame gives, one position after the other."""
    frames = Generator(model).generate_frames([1, 2, 3], 0, [], 240, temperature=0)
    model.setup_caches(1)
    tokens, mask = (part[None] for part in columns([1, 2, 3]))
    positions = torch.arange(3)[None]
    expected = []
    for _ in range(3):
        codes = model.generate_frame(tokens, mask, positions, temperature=0)
        expected.append(codes[0].tolist())
        tokens = torch.cat((codes, torch.zeros(1, 1).long()), dim=1)[:, None]
        mask = torch.ones(1, 1, 33, dtype=torch.bool)
        mask[..., -1] = False
        positions = positions[:, -1:] + 1

    assert expected == frames.tolist()


# ---- the tokenizer


def test_tokenizer_beside_the_model_comes_before_the_cache(cache: Path, tmp_path: Path) -> None:
    """tokenizer.json beside the weights, then of sesame/csm-1b, then of Llama 3.2."""
    places = [
        snapshot(cache, "meta-llama/Llama-3.2-1B"),
        snapshot(cache, "sesame/csm-1b"),
        tmp_path / "model",
    ]
    places[2].mkdir()
    found = []
    for number, place in enumerate(places):
        tokenizer = byte_tokenizer()
        tokenizer.add_tokens([f"<{number}>"])
        tokenizer.save(str(place / "tokenizer.json"))
        found.append([find_tokenizer(places[2]).encode(f"<{n}>")[1:-1] == [258] for n in range(3)])

    assert [[n == m for n in range(3)] for m in range(3)] == found


def test_a_snapshot_that_main_does_not_name_is_found(cache: Path) -> None:
    """A snapshot that `hf download --revision` left in the cache is enough."""
    folder = snapshot(cache, "sesame/csm-1b", main=False)
    byte_tokenizer().save(str(folder / "tokenizer.json"))

    assert [BOS, *ids("x"), EOS] == find_tokenizer(None).encode("x")


def test_the_models_folder_is_looked_in(model: Model, tmp_path: Path) -> None:
    """A generator looks for the tokenizer where its model was loaded from."""
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    other = Model(TINY)
    other.folder = tmp_path
    script = Script(0)
    scripted(other, script).generate_frames("x", 0, [])

    assert script.asked[0][0].shape[1] == 6
    assert model.folder is None


def test_without_a_tokenizer_the_error_has_the_command(model: Model) -> None:
    """Text without a tokenizer is a missing input, with the command for it and the way without."""
    with pytest.raises(MissingInput) as caught:
        Generator(model).generate_frames("x", 0, [])

    assert "hf download sesame/csm-1b tokenizer.json" in str(caught.value)
    assert "token ids" in str(caught.value)


@pytest.mark.parametrize("text", ["not JSON", "{}"])
def test_a_tokenizer_that_cannot_be_read_is_refused(tmp_path: Path, text: str) -> None:
    """A file that is no tokenizer is wrong content, and named."""
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(WrongContent, match=r"tokenizer\.json: malformed"):
        find_tokenizer(tmp_path)


def test_a_tokenizer_of_another_model_is_refused() -> None:
    """Without Llama 3's BOS and EOS it is not CSM's tokenizer."""
    with pytest.raises(WrongContent, match="begin_of_text"):
        TextTokenizer(Tokenizer(models.BPE()))


# ---- the codec


@pytest.fixture(scope="module")
def mimi() -> Any:
    """A real MimiModel with random weights."""
    from transformers import MimiConfig, MimiModel

    torch.manual_seed(1)
    return MimiModel(MimiConfig(**TINY_CODEC)).eval()


@pytest.fixture
def cached(cache: Path, mimi: Any) -> Path:
    """The snapshot of kyutai/mimi in the cache."""
    folder = snapshot(cache, "kyutai/mimi")
    mimi.save_pretrained(folder)
    return folder


@pytest.mark.usefixtures("cached")
def test_audio_from_text_and_audio(model: Model, mimi: Any) -> None:
    """With tokenizer and codec there is audio: 1,920 samples a frame, of those very codes."""
    generator = Generator(model, tokenizer=byte_tokenizer())
    context = [Segment(0, "a", torch.randn(5000).clamp(-1, 1))]
    with pytest.warns(UserWarning, match="no watermark"):
        audio = generator.generate("b", 1, context, 320, temperature=0)
    frames = generator.generate_frames("b", 1, context, 320, temperature=0)
    with torch.no_grad():
        expected = mimi.decode(frames.T[None]).audio_values[0, 0]

    assert audio.shape == (4 * 1920,)
    assert torch.equal(expected, audio)
    assert generator.sample_rate == 24_000
    assert torch.device("cpu") == generator.device


@pytest.mark.usefixtures("cached")
def test_codec_gives_a_code_a_codebook_and_frame() -> None:
    """Audio of two and a half frames gets codes (K, 3)."""
    codes = find_codec(32, torch.device("cpu")).encode(torch.zeros(4800))

    assert codes.shape == (32, 3)


@pytest.mark.filterwarnings("ignore:the audio carries no watermark")
def test_a_mimi_model_itself_will_do(model: Model, mimi: Any) -> None:
    """transformers' model can be given as it is."""
    generator = scripted(model, Script(3, 0), codec=mimi)

    assert generator.generate([1], 0, []).shape == (1920,)
    assert generator.sample_rate == mimi.config.sampling_rate


def test_without_codec_the_error_has_the_command(model: Model) -> None:
    """Audio without Mimi is a missing input, before anything is generated; frames go on."""
    script = Script(1, 0)
    generator = scripted(model, script)
    with pytest.raises(MissingInput) as caught:
        generator.generate([1], 0, [])

    assert "hf download kyutai/mimi" in str(caught.value)
    assert "generate_frames" in str(caught.value)
    assert script.asked == []
    assert len(generator.generate_frames([1], 0, [])) == 1
    assert generator.sample_rate == 24_000


@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize("package", ["transformers", "tokenizers"])
def test_without_the_package_the_error_has_the_command(
    cache: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    """Files without the library that reads them: the error has the command that installs it."""
    byte_tokenizer().save(str(snapshot(cache, "sesame/csm-1b") / "tokenizer.json"))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingInput, match=rf"{package}: not installed.*\[speak\]"):
        find_codec(32, torch.device("cpu"))
        find_tokenizer(None)


def test_a_codec_with_a_tensor_too_few_is_refused(cached: Path) -> None:
    """transformers would fill the gap with random numbers; the tensor is named instead."""
    from safetensors.torch import load_file, save_file

    weights = load_file(cached / "model.safetensors")
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    del weights[name]
    save_file(weights, cached / "model.safetensors", {"format": "pt"})
    with pytest.raises(WrongContent, match=name):
        find_codec(32, torch.device("cpu"))


def test_a_codec_that_is_cut_off_is_refused(cached: Path) -> None:
    """A file that ends early is wrong content."""
    path = cached / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(WrongContent, match="the codec cannot be used"):
        find_codec(32, torch.device("cpu"))


def test_a_codec_without_enough_codebooks_is_refused(cached: Path) -> None:
    """Mimi must have as many codebooks as the model."""
    with pytest.raises(WrongContent, match="33 codebooks"):
        Mimi.from_local(cached, 33)


def test_a_codec_without_config_is_not_there(cached: Path) -> None:
    """A snapshot without one of its files does not count."""
    (cached / "config.json").unlink()
    with pytest.raises(MissingInput, match="hf download kyutai/mimi"):
        find_codec(32, torch.device("cpu"))


def test_codes_the_codec_does_not_have_are_refused(mimi: Any) -> None:
    """A code beyond the codebooks is an error, not a fault of the device."""
    with pytest.raises(UsageError, match="0 to 63"):
        Mimi(mimi).decode(torch.full((32, 1), 64))


@pytest.mark.parametrize("shape", [(1, 4800), (0,)])
def test_audio_that_is_not_mono_is_refused(mimi: Any, shape: tuple[int, ...]) -> None:
    """Audio has one dimension and something in it."""
    with pytest.raises(UsageError, match="mono"):
        Mimi(mimi).encode(torch.zeros(shape))


# ---- the watermark


class FakeCipher(types.ModuleType):
    """silentcipher, as far as it is used: adds a hundredth, and keeps the calls."""

    def __init__(self) -> None:
        super().__init__("silentcipher")
        self.models: list[dict[str, Any]] = []
        self.encoded: list[tuple[int, int, list[int], dict[str, Any]]] = []

    def get_model(self, **options: Any) -> FakeCipher:
        self.models.append(options)
        return self

    def encode_wav(
        self, audio: Tensor, rate: int, key: list[int], **options: Any
    ) -> tuple[Tensor, float]:
        self.encoded.append((len(audio), rate, key, options))
        return audio + 0.01, 0.0


@pytest.fixture
def cipher(monkeypatch: pytest.MonkeyPatch) -> FakeCipher:
    fake = FakeCipher()
    monkeypatch.setitem(sys.modules, "silentcipher", fake)
    return fake


def test_audio_carries_sesames_watermark(model: Model, cipher: FakeCipher) -> None:
    """With silentcipher audio is marked at 44.1 kHz with CSM's key, and comes back at 24 kHz."""
    generator = scripted(model, Script(9, 9, 0), codec=FakeCodec())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        audio: Any = generator.generate([1], 0, [])
    options = {"calc_sdr": False, "message_sdr": 36}

    assert cipher.models == [{"model_type": "44.1k", "device": "cpu"}]
    assert [(2 * 3528, 44_100, [212, 211, 146, 56, 201], options)] == cipher.encoded
    assert generator.watermarked and audio.watermarked
    assert audio.shape == (2 * 1920,)
    middle = slice(1000, 2840)
    torch.testing.assert_close(audio[middle], torch.full((1840,), 9 / 35 + 0.01), atol=2e-3, rtol=0)


def test_silentciphers_weights_come_from_the_cache(
    model: Model, cipher: FakeCipher, cache: Path
) -> None:
    """silentcipher gets the paths of weights in the Hub's cache, and asks no server."""
    home = snapshot(cache, watermark.REPO) / watermark.FOLDER
    home.mkdir(parents=True)
    (home / "hparams.yaml").write_text("")
    scripted(model, Script(1, 0), codec=FakeCodec()).generate([1], 0, [])

    assert str(home) == cipher.models[0]["ckpt_path"]
    assert str(home / "hparams.yaml") == cipher.models[0]["config_path"]


def test_without_silentcipher_the_result_says_so(model: Model) -> None:
    """A missing watermark is in one warning, and on every result."""
    generator = scripted(model, Script(1, 0, 1, 0), codec=FakeCodec())
    with pytest.warns(UserWarning, match=r"no watermark.*pip install git\+https") as caught:
        results: list[Any] = [generator.generate([1], 0, []) for _ in range(2)]

    assert len(caught) == 1
    assert [audio.watermarked for audio in results] == [False, False]
    assert not generator.watermarked


def test_silence_carries_no_watermark(model: Model, cipher: FakeCipher) -> None:
    """Audio without a frame is empty, is not sent to silentcipher, and has watermarked False."""
    generator = scripted(model, Script(9, 0, 0), codec=FakeCodec())
    generator.generate([1], 0, [])
    audio: Any = generator.generate([1], 0, [])

    assert audio.shape == (0,)
    assert not audio.watermarked and not generator.watermarked
    assert len(cipher.encoded) == 1


@pytest.mark.parametrize(("rate", "wanted"), [(24_000, 44_100), (44_100, 24_000)])
@pytest.mark.parametrize("samples", [9600, 9601])
def test_resampling_keeps_a_tone(rate: int, wanted: int, samples: int) -> None:
    """A tone that fades in and out is the same tone at the other rate."""

    def tone(at: int, count: int) -> Tensor:
        seconds = torch.arange(count, dtype=torch.float64) / at
        fade = torch.sin(seconds * torch.pi * rate / samples).clamp(min=0) ** 2
        return (fade * torch.sin(seconds * 2 * torch.pi * 1000)).float()

    result = resample(tone(rate, samples), rate, wanted)

    assert -(-samples * wanted // rate) == len(result)
    torch.testing.assert_close(result, tone(wanted, len(result)), atol=1e-3, rtol=0)


def test_errors_of_the_generator_are_this_packages() -> None:
    """A prompt that does not fit is a usage error, with its exit code, and a ValueError."""
    error = generators.InputsTooLong("Inputs too long")

    assert isinstance(error, CsmWeightsError) and isinstance(error, ValueError)
    assert error.exit_code == 2
