"""Fast decoding compared with the readable reference: same codes, same logits, same draws."""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from csm_weights.errors import UsageError
from csm_weights.formats.architecture import FLAVORS, CsmConfig
from csm_weights.formats.weights_file import find
from csm_weights.model import fast_decoder
from csm_weights.model.csm import Model, chosen_attention, make_sampler
from csm_weights.model.decoders import FrameDecoder
from csm_weights.model.fast_decoder import Decoder, weights_per_frame
from tests.model.test_csm import frames
from tests.support.networks import TINY, random_model

CSM_1B = CsmConfig(FLAVORS["llama-1B"], FLAVORS["llama-100M"], 128256, 2051, 32)

CHUNKS = Path(__file__).resolve().parents[2] / "chunks" / "csm-tiny"

#: As a share of the largest logit: float32 rounding was 1e-6; of a wrong key 0.3.
TOLERANCE = 2e-5


def prompt(length: int = 9) -> tuple[Tensor, Tensor]:
    """Text tokens, then two frames of audio, and their mask."""
    drawn = torch.Generator().manual_seed(length)
    text = torch.randint(512, (1, length), generator=drawn)
    return frames(text, torch.randint(35, (1, 2, 32), generator=drawn))


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


def generated(
    decoder: FrameDecoder, count: int, tokens: Tensor, mask: Tensor, **how: Any
) -> list[Any]:
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

    assert_same_frames(generated(Decoder(model), 40, *prompt(), **how), expected)


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
    decoder = Decoder(beside)

    for layer in (*decoder._backbone._layers, *decoder._decoder._layers):
        assert [len(layer.qkv), len(layer.w13)] == [1, 1]
        assert layer.qkv[0].untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
    assert [len(layer.qkv) for layer in Decoder(model)._decoder._layers] == [3, 3]
    expected = reference(model, 5, *prompt(), temperature=0)
    assert_same_frames(generated(decoder, 5, *prompt(), temperature=0), expected)


def test_a_loaded_model_is_fused_and_a_mapped_one_is_right(tmp_path: Path) -> None:
    """Loaded into memory, products are fused; mapped, nothing is, and frames are the same."""
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"".join(p.read_bytes() for p in find(CHUNKS / "safetensors")[0]))
    copied = Model.from_local(weights, dtype=torch.bfloat16, config=TINY)
    mapped = Model.from_local(weights, config=TINY)
    layers = [Decoder(m)._backbone._layers[0] for m in (copied, mapped)]

    assert [len(layer.qkv) for layer in layers] == [1, 3]
    assert [len(layer.w13) for layer in layers] == [1, 2]
    expected = reference(mapped, 5, *prompt(), temperature=0)
    assert_same_frames(generated(Decoder(mapped), 5, *prompt(), temperature=0), expected)


def test_a_second_sequence_remembers_nothing_of_the_first(model: Model) -> None:
    """A decoder that was used gives for another prompt the frames of a fresh one."""
    decoder = Decoder(model)
    generated(decoder, 20, *prompt(40), temperature=0)

    expected = generated(Decoder(model), 10, *prompt(3), temperature=0)
    assert_same_frames(generated(decoder, 10, *prompt(3), temperature=0), expected)


def test_each_sequence_may_be_drawn_its_own_way(model: Model) -> None:
    """Temperature and topk of a later sequence are its own."""
    decoder = Decoder(model)
    hows: list[dict[str, Any]] = [{"temperature": 0.2, "topk": 5}, {"temperature": 1.5, "topk": 20}]
    for how in hows:
        torch.manual_seed(1)
        expected = reference(model, 4, *prompt(), **how)
        torch.manual_seed(1)
        assert_same_frames(generated(decoder, 4, *prompt(), **how), expected)


def test_the_last_position_can_be_used_and_no_more(model: Model) -> None:
    """A sequence fills all 2,048 positions; the next frame, or a longer prompt, is refused."""
    tokens, mask = frames(torch.randint(512, (1, 2046)), torch.zeros(1, 0, 32, dtype=torch.long))
    decoder = Decoder(model)
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


def test_a_seed_gives_the_same_frames_again(model: Model) -> None:
    """Codes drawn follow the seed, in the first sequence of a decoder as in later ones."""
    decoder, drawn = Decoder(model), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append([codes.tolist() for codes, _ in generated(decoder, 5, *prompt())])

    assert drawn[0] == drawn[1] != drawn[2]


def test_eager_and_fast_divide_by_the_same_temperature(model: Model) -> None:
    """Both divide by a tensor: a GPU would multiply with the reciprocal of a number."""
    divisors: list[Any] = []

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.ops.aten.div.Tensor:
                divisors.append(args[1])
            return func(*args, **(kwargs or {}))

    with Watch():  # type: ignore[no-untyped-call]
        reference(model, 1, *prompt(), temperature=0.7)
    eager, divisors[:] = list(divisors), []
    with Watch():  # type: ignore[no-untyped-call]
        Decoder(model).start(*prompt(), temperature=0.7)

    assert len(eager) == len(divisors) == 64
    assert all(
        isinstance(d, Tensor) and torch.equal(d, e)
        for d, e in zip(divisors[::2], eager[::2], strict=True)
    )


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_attention_may_lie_in_memory_in_any_order(
    model: Model, monkeypatch: pytest.MonkeyPatch, order: tuple[int, ...]
) -> None:
    """A kernel's output (B, H, S, D) may have its dimensions in any order, as kernels differ."""
    attention = F.scaled_dot_product_attention
    back = [order.index(dim) for dim in range(4)]

    def elsewhere(*arguments: Any, **options: Any) -> Tensor:
        return attention(*arguments, **options).permute(order).contiguous().permute(back)

    expected = reference(model, 3, *prompt(), temperature=0)
    monkeypatch.setattr(F, "scaled_dot_product_attention", elsewhere)
    assert_same_frames(reference(model, 3, *prompt(), temperature=0), expected)
    decoder = Decoder(model)
    assert_same_frames(generated(decoder, 3, *prompt(), temperature=0), expected)


def test_the_default_device_does_not_matter(model: Model) -> None:
    """Made and used under another default device of torch, the frames are the same."""
    expected = reference(model, 3, *prompt(), temperature=0)
    tokens, mask = prompt()
    with torch.device("meta"):
        found = generated(Decoder(model), 3, tokens, mask, temperature=0)

    assert_same_frames(found, expected)


def test_cudnn_is_never_asked_for_attention(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts, steps and what is captured run without cuDNN, and torch's setting stays."""
    attention, asked = F.scaled_dot_product_attention, []

    def watched(*arguments: Any, **options: Any) -> Tensor:
        asked.append(torch._C._get_cudnn_sdp_enabled())
        return attention(*arguments, **options)

    def warm_up(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
        captured(step, device)
        step()
        return lambda: None

    captured = fast_decoder._captured
    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    monkeypatch.setattr(fast_decoder, "_captured", chosen_attention(warm_up))
    Decoder(model).start(*prompt())
    reference(model, 2, *prompt())
    model.backbone_hidden(*prompt(), torch.arange(11)[None])
    model.codebook_logits(torch.zeros(1, 64), torch.zeros(1, 32, dtype=torch.long))

    assert len(asked) > 100
    assert not any(asked)
    assert torch._C._get_cudnn_sdp_enabled()


# ---- a GPU that is not there


class Indexing(TorchFunctionMode):
    """Indexing by operators that fake tensors know: Python's own needs the real device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            return self.part(*args)
        if func is Tensor.__setitem__:
            return torch.ops.aten.copy_(self.part(*args[:2]), args[2])
        if func is Tensor.copy_:
            return torch.ops.aten.copy_(*args)
        return func(*args, **(kwargs or {}))

    def part(self, x: Tensor, index: Any) -> Tensor:
        index = index if isinstance(index, tuple) else (index,)
        if index[0] is Ellipsis:
            named = sum(one is not None for one in index[1:])
            index = (slice(None),) * (x.ndim - named) + index[1:]
        dim = 0
        for one in index:
            if isinstance(one, int):
                x = x.select(dim, one)
            elif isinstance(one, Tensor):
                x = x.index_select(dim, one)
            elif one is None:
                x, dim = x.unsqueeze(dim), dim + 1
            else:
                x, dim = torch.ops.aten.slice(x, dim, one.start, one.stop, one.step or 1), dim + 1
        return x


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_whole_frame_runs_on_fake_cuda_tensors(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Every operation finds its tensors on the GPU, in its dtype, and none waits for the host."""
    monkeypatch.setattr(fast_decoder, "_captured", lambda step, _: step)
    with FakeTensorMode(), Indexing(), torch.no_grad():
        gpu = Model(TINY)
        shapes = TINY.tensor_shapes().items()
        state = {n: torch.empty(shape, dtype=dtype, device="cuda") for n, shape in shapes}
        gpu.load_state_dict(state, assign=True)
        tokens = torch.zeros(1, 11, 33, dtype=torch.long, device="cuda")
        decoder = Decoder(gpu)
        sequence = tokens, tokens > 0
        greedy = decoder.start(*sequence, temperature=0)
        drawn, following, logits = decoder.start(*sequence), decoder.step(), decoder.logits

    for codes in (greedy, drawn, following):
        assert (codes.device.type, codes.dtype, codes.shape) == ("cuda", torch.int64, (1, 32))
    assert (logits.device.type, logits.dtype, logits.shape) == ("cuda", dtype, (1, 32, 35))


class FakeGraphs:
    """torch.cuda as far as a capture uses it; logs what is called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.on: list[Any] = []
        current = types.SimpleNamespace(wait_stream=lambda _: None)
        state = torch.tensor([7])
        put = monkeypatch.setattr
        put(torch.cuda, "device", self.entered)
        put(torch.cuda, "stream", self.entered)
        put(torch.cuda, "graph", self.graph)
        put(torch.cuda, "Stream", self.stream)
        put(torch.cuda, "current_stream", lambda: current)
        put(torch.cuda, "CUDAGraph", lambda: types.SimpleNamespace(replay=lambda: None))
        put(torch.cuda, "get_rng_state", lambda: state)
        put(torch.cuda, "set_rng_state", lambda found: self.log.append(f"seed {found.item()}"))
        clear = lambda: self.log.append("clear work space")  # noqa: E731
        put(torch._C, "_cuda_clearCublasWorkspaces", clear, raising=False)

    def stream(self) -> Any:
        return types.SimpleNamespace(device=self.on[-1], wait_stream=lambda _: None)

    @contextmanager
    def entered(self, what: Any) -> Iterator[None]:
        self.on.append(what)
        yield
        self.on.pop()

    @contextmanager
    def graph(self, _: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        self.log.append(f"capture on {stream.device}, {capture_error_mode}")
        yield
        self.log.append("captured")


def test_a_capture_is_of_its_own_device_stream_and_work_space(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Work space is not another graph's, the stream is the device's, other threads may allocate."""
    cuda = FakeGraphs(monkeypatch)
    runs: list[int] = []
    fast_decoder._captured(lambda: runs.append(1), torch.device("cuda:1"))

    assert len(runs) == fast_decoder.WARM_UPS + 1
    assert cuda.log == [
        "clear work space",
        "capture on cuda:1, thread_local",
        "captured",
        "clear work space",
        "seed 7",
    ]


@pytest.mark.parametrize("run", [1, fast_decoder.WARM_UPS + 1])
def test_a_capture_that_fails_leaves_the_seed(monkeypatch: pytest.MonkeyPatch, run: int) -> None:
    """An error while a step warms up, or is captured, leaves the state of the draws as it was."""
    cuda, runs = FakeGraphs(monkeypatch), []

    def step() -> None:
        runs.append(1)
        if len(runs) == run:
            raise RuntimeError("no kernel image is available")

    with pytest.raises(RuntimeError, match="no kernel"):
        fast_decoder._captured(step, torch.device("cuda:0"))
    assert cuda.log[-1] == "seed 7"


def test_bfloat16_stays_within_rounding() -> None:
    """In bfloat16 the logits of each step are those of a parallel pass over the same codes."""
    rounded = random_model(TINY).to(torch.bfloat16)
    tokens, mask = prompt()
    found = generated(Decoder(rounded), 12, tokens, mask, temperature=0)
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
        assert_same_frames(generated(Decoder(model), 2, *prompt(), temperature=0), expected)
