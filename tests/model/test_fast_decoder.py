"""Fast decoding compared with the readable reference: same codes, same logits, same draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from csm_weights.errors import UsageError
from csm_weights.formats.architecture import FLAVORS, CsmConfig
from csm_weights.formats.weights_file import find_weights
from csm_weights.model import fast_decoder
from csm_weights.model.csm import Model, make_sampler
from csm_weights.model.fast_decoder import Decoder, weights_per_frame
from tests.model.test_csm import TINY, frames, random_model

CSM_1B = CsmConfig(FLAVORS["llama-1B"], FLAVORS["llama-100M"], 128256, 2051, 32)

CHUNKS = Path(__file__).resolve().parents[2] / "chunks" / "csm-tiny"

#: As a share of the largest logit: float32 rounding was 1e-6; of a wrong key 0.3.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(TINY)


def prompt(length: int = 9) -> tuple[Tensor, Tensor]:
    """Text tokens, then two frames of audio, and their mask."""
    torch.manual_seed(length)
    return frames(torch.randint(512, (1, length)), torch.randint(35, (1, 2, 32)))


def reference(model: Model, count: int, tokens: Tensor, mask: Tensor, **how: Any) -> list[Any]:
    """Codes and logits of `count` frames, as `generate_logits` gives them."""
    model.setup_caches(1)
    choose = make_sampler(how.get("temperature", 0.9), how.get("topk", 50))
    found, end = [], 0
    for _ in range(count):
        start, end = end, end + tokens.shape[1]
        found.append(model.generate_logits(tokens, mask, torch.arange(start, end)[None], choose))
        tokens, mask = frames(torch.zeros(1, 0, dtype=torch.long), found[-1][0][:, None])
    return found


def generated(decoder: Decoder, count: int, tokens: Tensor, mask: Tensor, **how: Any) -> list[Any]:
    """Codes and logits of `count` frames, as a decoder gives them."""
    found = [(decoder.start(tokens, mask, **how), decoder.logits)]
    found += [(decoder.step(), decoder.logits) for _ in range(count - 1)]
    return found


def assert_same_frames(found: list[Any], expected: list[Any]) -> None:
    for (codes, logits), (other_codes, other_logits) in zip(found, expected, strict=True):
        assert torch.equal(codes, other_codes)
        limit = TOLERANCE * float(other_logits.abs().max())
        torch.testing.assert_close(logits, other_logits, rtol=0.0, atol=limit)


@pytest.mark.parametrize("how", [{"temperature": 0}, {"topk": 1}, {}, {"temperature": 1.7}])
def test_frames_are_those_of_the_reference(model: Model, how: dict[str, Any]) -> None:
    """Greedy or drawn with the same seed, 40 frames and all their logits are the reference's."""
    torch.manual_seed(5)
    expected = reference(model, 40, *prompt(), **how)
    torch.manual_seed(5)

    assert_same_frames(generated(Decoder(model, keep_logits=True), 40, *prompt(), **how), expected)


def test_a_model_whose_weights_lie_side_by_side_is_used_without_copies(model: Model) -> None:
    """With q, k, v and w1, w3 adjacent each product is one, on the same memory, and equal."""
    shapes, groups = TINY.tensor_shapes(), TINY.fused_tensors()
    order = [n for group in groups for n in group]
    order += [name for name in shapes if name not in order]
    state = model.state_dict()
    flat = torch.cat([state[name].flatten() for name in order])
    views = dict(zip(order, torch.split(flat, [state[n].numel() for n in order]), strict=True))
    with torch.device("meta"):
        beside = Model(TINY)
    beside.load_state_dict({n: v.view(shapes[n]) for n, v in views.items()}, assign=True)
    beside.eval().requires_grad_(False)
    decoder = Decoder(beside, keep_logits=True)

    for layer in (*decoder._backbone._layers, *decoder._decoder._layers):
        assert [len(layer.qkv), len(layer.w13)] == [1, 1]
        assert layer.qkv[0].untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
    assert [len(layer.qkv) for layer in Decoder(model)._decoder._layers] == [3, 3]
    expected = reference(model, 5, *prompt(), temperature=0)
    assert_same_frames(generated(decoder, 5, *prompt(), temperature=0), expected)


def test_a_loaded_model_is_fused_and_a_mapped_one_is_right(tmp_path: Path) -> None:
    """Loaded into memory, products are fused; mapped, nothing is, and frames are the same."""
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"".join(p.read_bytes() for p in find_weights(CHUNKS / "safetensors")))
    copied = Model.from_local(weights, dtype=torch.bfloat16, config=TINY)
    mapped = Model.from_local(weights, config=TINY)
    layers = [Decoder(m)._backbone._layers[0] for m in (copied, mapped)]

    assert [len(layer.qkv) for layer in layers] == [1, 3]
    assert [len(layer.w13) for layer in layers] == [1, 2]
    expected = reference(mapped, 5, *prompt(), temperature=0)
    assert_same_frames(
        generated(Decoder(mapped, keep_logits=True), 5, *prompt(), temperature=0), expected
    )


def test_a_second_sequence_remembers_nothing_of_the_first(model: Model) -> None:
    """A decoder that was used gives for another prompt the frames of a fresh one."""
    decoder = Decoder(model, keep_logits=True)
    generated(decoder, 20, *prompt(40), temperature=0)

    expected = generated(Decoder(model, keep_logits=True), 10, *prompt(3), temperature=0)
    assert_same_frames(generated(decoder, 10, *prompt(3), temperature=0), expected)


def test_each_sequence_may_be_drawn_its_own_way(model: Model) -> None:
    """Temperature and topk of a later sequence are its own."""
    decoder = Decoder(model, keep_logits=True)
    hows: list[dict[str, Any]] = [{"temperature": 0.2, "topk": 5}, {"temperature": 1.5, "topk": 20}]
    for how in hows:
        torch.manual_seed(1)
        expected = reference(model, 4, *prompt(), **how)
        torch.manual_seed(1)
        assert_same_frames(generated(decoder, 4, *prompt(), **how), expected)


def test_the_last_position_can_be_used_and_no_more(model: Model) -> None:
    """A sequence fills all 2,048 positions; the next frame, or a longer prompt, is refused."""
    tokens, mask = frames(torch.randint(512, (1, 2046)), torch.zeros(1, 0, 32, dtype=torch.long))
    decoder = Decoder(model, keep_logits=True)
    expected = reference(model, 3, tokens, mask, temperature=0)

    assert_same_frames(generated(decoder, 3, tokens, mask, temperature=0), expected)
    with pytest.raises(UsageError, match="Inputs too long"):
        decoder.step()
    longer = frames(torch.zeros(1, 2049, dtype=torch.long), torch.zeros(1, 0, 32, dtype=torch.long))
    with pytest.raises(UsageError, match="Inputs too long"):
        decoder.start(*longer)


def test_what_makes_no_sense_is_refused(model: Model) -> None:
    """A step before a start, two voices, no topk, a negative temperature, logits not kept."""
    tokens, mask = prompt()
    with pytest.raises(UsageError, match="start"):
        Decoder(model).step()
    with pytest.raises(UsageError, match="are not"):
        Decoder(model).start(tokens.repeat(2, 1, 1), mask.repeat(2, 1, 1))
    with pytest.raises(UsageError, match="topk 0"):
        Decoder(model).start(tokens, mask, topk=0)
    with pytest.raises(UsageError, match="-1"):
        Decoder(model).start(tokens, mask, temperature=-1)
    with pytest.raises(UsageError, match="keep_logits"):
        _ = Decoder(model).logits


def test_bfloat16_stays_within_rounding() -> None:
    """In bfloat16 the logits of each step are those of a parallel pass over the same codes."""
    rounded = random_model(TINY).to(torch.bfloat16)
    tokens, mask = prompt()
    found = generated(Decoder(rounded, keep_logits=True), 12, tokens, mask, temperature=0)
    codes = torch.cat([codes for codes, _ in found])
    empty = torch.zeros(1, 0, dtype=torch.long)
    rest, rest_mask = frames(empty, codes[None, :-1])
    sequence = torch.cat((tokens, rest), dim=1), torch.cat((mask, rest_mask), dim=1)
    places = torch.arange(sequence[0].shape[1])[None]
    with torch.no_grad():
        hidden = rounded.backbone_hidden(*sequence, places)[0, tokens.shape[1] - 1 :]
        expected = rounded.codebook_logits(hidden, codes)
    difference = (torch.cat([logits for _, logits in found]) - expected).abs().max()

    assert float(difference) <= 0.04 * float(expected.abs().max())


def test_weights_of_a_frame_are_those_of_the_published_size() -> None:
    """The roofline counts each product of a CSM-1B frame: 4.55 thousand million weights."""
    layer = {2048: 4 * 2048 * 2048 * 5 // 8 + 3 * 2048 * 8192 + 2 * 2048}
    layer[1024] = 4 * 1024 * 1024 * 5 // 8 + 3 * 1024 * 8192 + 2 * 1024
    depth = 4 * layer[1024] + 1024 + 1024 * 2048
    expected = 16 * layer[2048] + 2048 + 2051 * 2048 + 31 * 1024 * 2051 + 31 * depth

    assert weights_per_frame(CSM_1B) == expected


def test_each_fault_of_a_step_is_seen_by_these_tests(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison is no matter of course: heads in another order give other logits."""
    product = fast_decoder._product

    def shuffled(x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        return product(x, weights).roll(16, -1)

    expected = reference(model, 2, *prompt(), temperature=0)
    monkeypatch.setattr(fast_decoder, "_product", shuffled)
    with pytest.raises(AssertionError):
        assert_same_frames(
            generated(Decoder(model, keep_logits=True), 2, *prompt(), temperature=0), expected
        )
