"""Frames of one voice, fast and eager, in one process: the measured side of benchmarks.load.

python -m benchmarks.frames FOLDER [DEVICE]      # default cuda
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from csm_weights.model.csm import Model
from csm_weights.model.fast_decoder import Decoder, weights_per_frame
from csm_weights.model.smoke import make_prompt, memory_rate, synchronize

#: Frames that are timed, fast and eager, and frames before them that are not.
FAST, EAGER, WARM = 100, 20, 3


def seconds_a_frame(step: Callable[[], object], count: int, device: torch.device) -> float:
    """Seconds of one of `count` frames, each waited for as a listener would."""
    for _ in range(WARM):
        step()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        step()
        synchronize(device)
    return (time.perf_counter() - start) / count


def prompt_of(model: Model, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and mask (1, S, K + 1) of the smoke test's prompt."""
    words = torch.tensor(make_prompt(model.config), device=device)
    tokens = torch.zeros(1, len(words), model.config.codebooks + 1, dtype=torch.long)
    tokens = tokens.to(device)
    tokens[0, :, -1] = words
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[..., -1] = True
    return tokens, mask


def eager(model: Model, device: torch.device) -> Callable[[], object]:
    """The reference: one frame after the other with `generate_frame`."""
    tokens, mask = prompt_of(model, device)
    length = tokens.shape[1]
    model.setup_caches(1)
    frame = [model.generate_frame(tokens, mask, torch.arange(length, device=device)[None])]
    positions = [length]

    def step() -> None:
        column = torch.zeros(1, 1, dtype=torch.long, device=device)
        following = torch.cat((frame[0], column), dim=1)[:, None]
        seen = torch.ones_like(following, dtype=torch.bool)
        seen[..., -1] = False
        place = torch.full((1, 1), positions[0], device=device)
        frame[0] = model.generate_frame(following, seen, place)
        positions[0] += 1

    return step


def attention_kernels(step: Callable[[], object]) -> str:
    """The operators and kernels that attention runs as, by how often, of one frame."""
    with torch.profiler.profile() as profile:
        step()
    found = {
        event.key: event.count
        for event in profile.key_averages()
        if any(word in event.key for word in ("attention", "flash", "fmha"))
        and event.key != "aten::scaled_dot_product_attention"
    }
    return ", ".join(f"{name.removeprefix('aten::')} {count}" for name, count in found.items())


def main() -> None:
    """Measures and prints one line of JSON."""
    device = torch.device(sys.argv[2] if len(sys.argv) > 2 else "cuda")
    model = Model.from_local(Path(sys.argv[1]), device, torch.bfloat16)
    reference = eager(model, device)
    kernels = f"eager: {attention_kernels(reference)}"
    slow = seconds_a_frame(reference, EAGER, device)
    decoder = Decoder(model)
    decoder.start(*prompt_of(model, device))
    kernels += f"; graphs: {attention_kernels(decoder.step)}"
    fast = seconds_a_frame(decoder.step, FAST, device)
    weight = model.text_embeddings.weight
    size = weights_per_frame(model.config) * weight.element_size()
    roofline = size / memory_rate(weight) / fast
    print(json.dumps({"fast": fast, "eager": slow, "roofline": roofline, "kernels": kernels}))


if __name__ == "__main__":
    main()
