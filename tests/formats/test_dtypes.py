"""Elements in another dtype, against torch's conversions."""

from __future__ import annotations

import pytest
import torch

from csm_weights.formats.dtypes import FLOATS, converted

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

#: Infinities, NaNs at either end, zeros of both signs, the largest numbers, ties, and what is
#: just below and above the least number that is infinite in F16.
EDGES = [0x7F800000, 0xFF800000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0, 0x80000000, 0x7F7FFFFF]
EDGES += [0x3F808000, 0x3F818000, 0x3F808001, 0x477FEFFF, 0x477FF000, 0x33000000, 0x00000001]


def samples(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(-(2**31), 2**31, (30_001,), dtype=torch.int64, generator=generator)
    edges = torch.tensor(EDGES, dtype=torch.int64)
    small = torch.randn(9_999, generator=generator) * 0.02
    wide = [t.to(torch.int32).view(torch.float32) for t in (bits, edges, edges.repeat(3_000))]
    if dtype is torch.float32:
        return [*wide, small, torch.empty(0)]
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    return [every, small.to(dtype)]


@pytest.mark.parametrize("source", FLOATS.values())
@pytest.mark.parametrize("target", FLOATS.values())
def test_conversions_are_torchs(source: str, target: str) -> None:
    """Every bit is torch's, but for the payload of a NaN, which only stays one."""
    for numbers in samples(DTYPES[source]):
        raw = bytearray(numbers.view(torch.uint8).tolist())
        found = converted(raw, source, target)
        expected = numbers.to(DTYPES[target])
        assert len(found) == expected.nbytes
        if not found:
            continue
        actual = torch.frombuffer(found, dtype=DTYPES[target])
        bits = torch.int32 if target == "F32" else torch.int16
        same = actual.view(bits) == expected.view(bits)
        assert bool((same | (actual.isnan() & expected.isnan())).all())
