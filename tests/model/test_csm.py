"""CSM in plain PyTorch, compared with transformers and torchtune, and cached with parallel."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from csm_weights.errors import MissingInput, UsageError, WrongContent
from csm_weights.formats.architecture import FLAVORS, CsmConfig, TransformerConfig, parse_config
from csm_weights.model.csm import KVCache, Model, make_sampler
from tests.support.networks import TINY, TINY_CONFIG, random_model
from tests.support.oracles import torchtune_stack, transformers_config, transformers_model

pytestmark = pytest.mark.usefixtures("no_gradients")

CSM_1B = CsmConfig(FLAVORS["llama-1B"], FLAVORS["llama-100M"], 128256, 2051, 32)
NAMES_SHA256 = "4599e6510bc0198383c220f3da32348946868ab47e8cd6e24ef81cee1a4a17f5"

#: Twenty times the largest difference that float32 rounding made here (1.9e-6);
#: without RoPE scaling the smallest difference is 6e-2.
TOLERANCE = 4e-5

#: A function from tokens, mask and positions to the next frame.
NextFrame = Callable[[Tensor, Tensor, Tensor], Any]

ALL_POSITIONS = torch.arange(2048)[None]


@pytest.fixture(scope="module")
def theirs(model: Model) -> Any:
    return transformers_model(TINY, model.state_dict())


@pytest.fixture(scope="module")
def sequence() -> tuple[Tensor, Tensor]:
    """Tokens and mask of 2,048 positions: 1,000 of text, then audio."""
    return frames(torch.randint(512, (1, 1000)), torch.randint(35, (1, 1048, 32)))


@pytest.fixture
def directory(tmp_path: Path, model: Model) -> Path:
    """A directory as from_local wants it, with both formats; the checkpoint has views.

    As in CSM-1B's, the storage of audio_head has a slot more than the tensor.
    """
    state = model.state_dict()
    (tmp_path / "config.json").write_text(json.dumps(TINY_CONFIG))
    save_file(state, tmp_path / "model.safetensors")
    slots = torch.cat((state["audio_head"], torch.randn(1, 32, 35)))
    views = {
        "audio_head": slots[:31],
        "projection.weight": state["projection.weight"].t().contiguous().t(),
        "decoder.norm.scale": torch.cat((torch.ones(5), state["decoder.norm.scale"]))[5:],
    }
    torch.save(state | views, tmp_path / "ckpt.pt")
    return tmp_path


def frames(text: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and mask of text (B, S) followed by audio codes (B, T, 32)."""
    length = text.shape[1] + codes.shape[1]
    tokens = torch.zeros(len(text), length, 33, dtype=torch.long)
    mask = torch.zeros(len(text), length, 33, dtype=torch.bool)
    tokens[:, : text.shape[1], 32] = text
    mask[:, : text.shape[1], 32] = True
    tokens[:, text.shape[1] :, :32] = codes
    mask[:, text.shape[1] :, :32] = True
    return tokens, mask


def generate(model: Model, text: Tensor, count: int, next_frame: NextFrame) -> list[Any]:
    """Return the results of `next_frame` for `count` frames after a text prompt (B, S)."""
    model.setup_caches(len(text))
    tokens, mask = frames(text, torch.zeros(len(text), 0, 32, dtype=torch.long))
    results, end = [], 0
    for _ in range(count):
        start, end = end, end + tokens.shape[1]
        positions = torch.arange(start, end).expand(len(text), -1)
        results.append(next_frame(tokens, mask, positions))
        codes = results[-1][0] if isinstance(results[-1], tuple) else results[-1]
        tokens, mask = frames(text[:, :0], codes[:, None])
    return results


def speaking(model: Model, **options: Any) -> NextFrame:
    return lambda tokens, mask, positions: model.generate_frame(tokens, mask, positions, **options)


def greedy(model: Model) -> NextFrame:
    return speaking(model, temperature=0)


def greedy_with_logits(model: Model) -> NextFrame:
    return lambda tokens, mask, positions: model.generate_logits(
        tokens, mask, positions, make_sampler(temperature=0, topk=1)
    )


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=TOLERANCE)


def transformers_hidden(theirs: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    text = theirs.embed_text_tokens(tokens[..., 32])
    audio = theirs.backbone_model.embed_tokens(tokens[..., :32])
    embedded = torch.where(mask[..., 32:], text, audio)
    hidden: Tensor = theirs.backbone_model(inputs_embeds=embedded).last_hidden_state
    return hidden


def transformers_depth_logits(theirs: Any, last_hidden: Tensor, codes: Tensor) -> Tensor:
    before = torch.cat((torch.zeros_like(codes[:, :1]), codes[:, :-1]), dim=1)
    logits: Tensor = theirs.depth_decoder(
        input_ids=before, backbone_last_hidden_state=last_hidden
    ).logits
    return logits


def largest_difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def test_state_dict_is_the_architectures_table(model: Model) -> None:
    """The state dict has exactly the names and shapes that the architecture gives."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}

    assert TINY.tensor_shapes() == shapes


def test_csm_1b_has_the_published_names_and_shapes() -> None:
    """The state dict of CSM-1B hashes to the digest of the published file's table."""
    with torch.device("meta"):
        state = Model(CSM_1B).state_dict()
    lines = sorted(f"{name}|F32|{'x'.join(map(str, t.shape))}" for name, t in state.items())

    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == NAMES_SHA256


def test_transformers_config_of_the_real_size_is_csm_1b() -> None:
    """A config.json as transformers writes it for CSM-1B describes the network of the flavors."""
    text = transformers_config(CSM_1B).to_json_string()

    assert parse_config(text.encode(), "config.json") == CSM_1B


def test_transformers_default_config_is_csm_1b() -> None:
    """transformers' own default sizes are those of CSM-1B."""
    from transformers import CsmConfig

    assert parse_config(CsmConfig().to_json_string().encode(), "config.json") == CSM_1B


def test_backbone_matches_transformers(
    model: Model, theirs: Any, sequence: tuple[Tensor, Tensor]
) -> None:
    """Hidden states and codebook 0 logits are transformers' at all 2,048 positions."""
    hidden = model.backbone_hidden(*sequence, ALL_POSITIONS)
    expected = transformers_hidden(theirs, *sequence)

    assert_close(hidden, expected)
    assert_close(model.codebook0_head(hidden), theirs.lm_head(expected))


def test_depth_decoder_matches_transformers(model: Model, theirs: Any) -> None:
    """The logits of all codebooks are transformers' for the same hidden state and codes."""
    last_hidden, codes = torch.randn(64, 64), torch.randint(35, (64, 32))
    logits = model.codebook_logits(last_hidden, codes)

    assert_close(logits[:, 0], theirs.lm_head(last_hidden))
    expected = transformers_depth_logits(theirs, last_hidden, codes)
    assert_close(logits[:, 1:], expected)


def test_rope_scaling_matters_to_the_oracle(
    model: Model, theirs: Any, sequence: tuple[Tensor, Tensor]
) -> None:
    """Without RoPE scaling neither the backbone nor the depth decoder matches transformers."""
    unscaled = Model(replace(TINY, rope_factor=1.0))
    unscaled.load_state_dict(model.state_dict())
    hidden = unscaled.backbone_hidden(*sequence, ALL_POSITIONS)
    codes = torch.randint(35, (64, 32))
    logits = unscaled.codebook_logits(hidden[0, -64:], codes)[:, 1:]
    expected = transformers_depth_logits(theirs, hidden[0, -64:], codes)

    assert largest_difference(hidden, transformers_hidden(theirs, *sequence)) > 1e-2
    assert largest_difference(logits, expected) > 1e-2


def test_greedy_frames_match_transformers_generate(model: Model, theirs: Any) -> None:
    """Greedy frames after a text are the very codes that transformers' generate gives."""
    text = torch.randint(1, 512, (1, 11))
    expected = theirs.generate(
        input_ids=text, max_new_tokens=12, do_sample=False, depth_decoder_do_sample=False
    )

    assert expected.tolist() == torch.stack(generate(model, text, 12, greedy(model)), 1).tolist()


@pytest.mark.parametrize("name", ["backbone", "decoder"])
def test_stack_matches_torchtune(model: Model, name: str) -> None:
    """Both stacks have torchtune's names, and its hidden states at all 2,048 positions."""
    ours, stack = getattr(model, name), getattr(TINY, name)
    tuned = tuned_copy(ours, stack)
    x = torch.randn(1, 2048, stack.dim)

    assert sorted(tuned.state_dict()) == sorted(ours.state_dict())
    assert_close(ours(x, ALL_POSITIONS), tuned(x))


@pytest.mark.parametrize("name", ["backbone", "decoder"])
def test_cached_stack_matches_torchtunes_cache(model: Model, name: str) -> None:
    """A long prompt, then one position at a time, gives what torchtune's KV cache gives."""
    ours, stack = getattr(model, name), getattr(TINY, name)
    tuned = tuned_copy(ours, stack)
    tuned.setup_caches(1, torch.float32, decoder_max_seq_len=2048)
    x = torch.randn(1, 2048, stack.dim)
    causal = torch.ones(1, 2048, 2048, dtype=torch.bool).tril()
    caches = [KVCache(stack, 1, 2048, x) for _ in range(stack.layers)]

    for start, end in [(0, 1990), (1990, 2000), *((p, p + 1) for p in range(2000, 2048))]:
        positions = torch.arange(start, end)[None]
        expected = tuned(x[:, start:end], input_pos=positions, mask=causal[:, start:end])
        assert_close(ours(x[:, start:end], positions, caches), expected)


def tuned_copy(ours: torch.nn.Module, stack: TransformerConfig) -> Any:
    tuned = torchtune_stack(stack, 2048)
    tuned.load_state_dict(ours.state_dict())
    return tuned


def test_cached_decoding_equals_one_parallel_pass(model: Model) -> None:
    """The logits of 40 cached frames, two rows a batch, are those of one pass without cache."""
    text = torch.randint(512, (2, 7))
    steps = generate(model, text, 40, greedy_with_logits(model))
    codes, logits = (torch.stack(part, dim=1) for part in zip(*steps, strict=True))

    tokens, mask = frames(text, codes[:, :-1])
    hidden = model.backbone_hidden(tokens, mask, torch.arange(46).expand(2, -1))[:, 6:]
    expected = model.codebook_logits(hidden.flatten(0, 1), codes.flatten(0, 1))
    assert_close(logits.flatten(0, 1), expected)


def test_rows_of_a_batch_do_not_meet(model: Model) -> None:
    """A row of a batch gets the frames that it gets alone."""
    text = torch.randint(512, (3, 7))
    together = torch.stack(generate(model, text, 4, greedy(model)), 1)
    alone = torch.stack(generate(model, text[1:2], 4, greedy(model)), 1)

    assert alone[0].tolist() == together[1].tolist()


def test_masked_columns_have_no_influence(model: Model, sequence: tuple[Tensor, Tensor]) -> None:
    """The value in a masked column of a frame changes nothing."""
    tokens, mask = (part[:, 990:1010] for part in sequence)
    other = torch.where(mask, tokens, 7)
    positions = torch.arange(20)[None]

    expected = model.backbone_hidden(tokens, mask, positions)
    assert_close(model.backbone_hidden(other, mask, positions), expected)


def test_bfloat16_keeps_float32_angles(model: Model, sequence: tuple[Tensor, Tensor]) -> None:
    """In bfloat16 the hidden states stay near float32's far from position 0 (angles would not)."""
    rough = random_model(TINY).to(torch.bfloat16)
    hidden = model.backbone_hidden(*sequence, ALL_POSITIONS)[0, -500:]
    error = rough.backbone_hidden(*sequence, ALL_POSITIONS)[0, -500:].float() - hidden

    assert float((error.norm(dim=-1) / hidden.norm(dim=-1)).mean()) < 0.01


def test_sampling_follows_its_generator(model: Model) -> None:
    """The same seed gives the same frames, another seed others."""
    text = torch.randint(512, (1, 7))

    def sampled(seed: int) -> list[Any]:
        source = torch.Generator().manual_seed(seed)
        step = speaking(model, generator=source)
        return torch.stack(generate(model, text, 3, step)).tolist()

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


def test_topk_bounds_what_is_drawn(model: Model) -> None:
    """Drawn codes are all, and only, among the topk best, however hot the sampling."""
    text = torch.randint(512, (1, 7)).expand(400, -1)
    first = generate(model, text, 1, speaking(model, temperature=1e3, topk=3))
    _, logits = generate(model, text[:1], 1, greedy_with_logits(model))[0]

    assert set(logits[0, 0].topk(3).indices.tolist()) == set(first[0][:, 0].tolist())


def test_topk_of_one_is_greedy(model: Model) -> None:
    """Topk 1 gives the frames of temperature 0."""
    text = torch.randint(512, (1, 7))
    single = generate(model, text, 3, speaking(model, topk=1))

    assert torch.stack(generate(model, text, 3, greedy(model))).tolist() == (
        torch.stack(single).tolist()
    )


@pytest.mark.parametrize(("temperature", "topk"), [(-0.1, 50), (0.9, 0)])
def test_impossible_sampling_is_refused(model: Model, temperature: float, topk: int) -> None:
    """A negative temperature and a topk below 1 are usage errors."""
    with pytest.raises(UsageError, match="temperature"):
        step = speaking(model, temperature=temperature, topk=topk)
        generate(model, torch.zeros(1, 3, dtype=torch.long), 1, step)


def test_too_many_positions_are_refused() -> None:
    """The last position is max_positions - 1; one more is "Inputs too long", cached or not."""
    model = random_model(replace(TINY, max_positions=8))
    tokens, mask = frames(torch.zeros(1, 9, dtype=torch.long), torch.zeros(1, 0, 32).long())

    assert len(generate(model, torch.zeros(1, 3, dtype=torch.long), 6, greedy(model))) == 6
    with pytest.raises(UsageError, match="Inputs too long: position 8"):
        generate(model, torch.zeros(1, 3, dtype=torch.long), 7, greedy(model))
    with pytest.raises(UsageError, match="Inputs too long: position 8"):
        model.backbone_hidden(tokens, mask, torch.arange(9)[None])


def test_frames_need_caches_and_positions_without_gap() -> None:
    """Generating without caches, or at positions that do not follow, is a usage error."""
    tokens, mask = frames(torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 0, 32).long())
    fresh = random_model(TINY)
    with pytest.raises(UsageError, match="setup_caches"):
        fresh.generate_frame(tokens, mask, torch.arange(2)[None])

    fresh.setup_caches(1)
    with pytest.raises(UsageError, match="continue at 0"):
        fresh.generate_frame(tokens, mask, torch.arange(1, 3)[None])


def test_misshapen_inputs_are_refused(model: Model) -> None:
    """Frames with a column too few, and an empty sequence, are usage errors."""
    tokens = torch.zeros(1, 2, 32, dtype=torch.long)
    with pytest.raises(UsageError, match=r"\(B, S, 33\)"):
        model.backbone_hidden(tokens, tokens > 0, torch.arange(2)[None])
    empty = torch.zeros(1, 0, 33, dtype=torch.long)
    with pytest.raises(UsageError, match=r"\(B, S, 33\)"):
        model.backbone_hidden(empty, empty > 0, torch.zeros(1, 0, dtype=torch.long))


@pytest.mark.parametrize("weights", ["", "model.safetensors", "ckpt.pt"])
def test_from_local_reads_either_format(directory: Path, model: Model, weights: str) -> None:
    """A directory, a safetensors file and a checkpoint give the very tensors that were saved."""
    loaded = Model.from_local(directory / weights).state_dict()

    assert sorted(model.state_dict()) == sorted(loaded)
    assert [n for n, t in model.state_dict().items() if not torch.equal(t, loaded[n])] == []


def test_from_local_takes_the_checkpoint_where_it_is_alone(directory: Path, model: Model) -> None:
    """A directory that holds only ckpt.pt is loaded from it."""
    (directory / "model.safetensors").unlink()

    assert torch.equal(model.audio_head, Model.from_local(directory).audio_head)


@pytest.mark.parametrize(
    ("asked", "given"), [(None, torch.float32), (torch.bfloat16, torch.bfloat16)]
)
def test_from_local_converts_to_the_dtype(
    directory: Path, asked: torch.dtype | None, given: torch.dtype
) -> None:
    """Every tensor has the asked dtype, or with None the file's."""
    loaded = Model.from_local(directory, dtype=asked)

    assert {given} == {tensor.dtype for tensor in loaded.state_dict().values()}


def test_loaded_model_generates(directory: Path, model: Model) -> None:
    """A model read from a file generates the frames of the one that was saved."""
    text = torch.randint(512, (1, 7))
    loaded = Model.from_local(directory)

    expected = torch.stack(generate(model, text, 3, greedy(model)))
    assert expected.tolist() == torch.stack(generate(loaded, text, 3, greedy(loaded))).tolist()


def without(state: dict[str, Tensor]) -> None:
    del state["backbone.layers.1.mlp.w3.weight"]


def with_another(state: dict[str, Tensor]) -> None:
    state["backbone.layers.1.mlp.w4.weight"] = torch.zeros(1)


def with_a_wrong_shape(state: dict[str, Tensor]) -> None:
    state["decoder.norm.scale"] = torch.zeros(33)


def with_a_wrong_dtype(state: dict[str, Tensor]) -> None:
    state["projection.weight"] = state["projection.weight"].bfloat16()


@pytest.mark.parametrize("name", ["model.safetensors", "ckpt.pt"])
@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (without, "backbone.layers.1.mlp.w3.weight"),
        (with_another, "backbone.layers.1.mlp.w4.weight"),
        (with_a_wrong_shape, "decoder.norm.scale"),
        (with_a_wrong_dtype, "projection.weight"),
    ],
)
def test_from_local_is_strict(
    directory: Path,
    model: Model,
    spoil: Callable[[dict[str, Tensor]], None],
    named: str,
    name: str,
) -> None:
    """A missing, extra or misshapen tensor, or one of another dtype, is refused by its name."""
    state = dict(model.state_dict())
    spoil(state)
    if name == "ckpt.pt":
        torch.save(state, directory / name)
    else:
        save_file(state, directory / name)

    with pytest.raises(WrongContent) as refusal:
        Model.from_local(directory / name)
    assert len(refusal.value.findings) == 1
    assert named in refusal.value.findings[0].line()


def test_from_local_without_weights_says_what_it_looks_for(tmp_path: Path) -> None:
    """An empty directory is a missing input, and the message names both weight files."""
    with pytest.raises(MissingInput, match=r"model\.safetensors or ckpt\.pt"):
        Model.from_local(tmp_path)


@pytest.mark.parametrize("missing", ["config.json", "ckpt.pt"])
def test_from_local_names_the_missing_file(directory: Path, missing: str) -> None:
    """A file that is not there is a missing input under its own name."""
    (directory / missing).unlink()
    with pytest.raises(MissingInput, match=missing):
        Model.from_local(directory / "ckpt.pt")


def test_draws_are_as_frequent_as_they_are_likely() -> None:
    """Of 40,000 draws each of the topk best has its share, at two temperatures."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -9.0]).repeat(40_000, 1)
    torch.manual_seed(1)
    for temperature in (1.0, 2.0):
        codes = make_sampler(temperature, topk=3)(logits)
        shares = torch.bincount(codes, minlength=5) / len(codes)
        expected = torch.cat(((logits[0, :3] / temperature).softmax(0), torch.zeros(2)))

        assert float((shares - expected).abs().max()) < 0.01
