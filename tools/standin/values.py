"""Made-up numbers: each depends on the seed, the tensor's name and the position alone.

They are the same on every machine and in every version, and have the scale of
freshly initialized weights, so that a model runs on them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from hashlib import shake_128

#: In the published ckpt.pt, `audio_head` is a view of a storage with one more
#: codebook. Here the spare codebook comes first, so that a reader that ignores
#: the offset of the view gets wrong numbers.
HEAD, SPARE = "audio_head", "audio_head (spare)"

#: Bytes of an F32.
ITEM = 4
#: Bytes made at a time.
BLOCK = 1 << 18
#: Blocks of a tensor that share one half of their values.
GROUP = 16


class Values:
    """Maker of the blocks of tensors.

    A hash of its own for every block would take most of the time. So a block is
    the XOR of one of 16 blocks that all tensors share, and of one that belongs
    to 16 consecutive blocks of its tensor: no two blocks are the same.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.shared = [self._hash("shared", index) for index in range(GROUP)]

    def _hash(self, name: str, index: int) -> int:
        key = f"csm-weights stand-in, seed {self.seed}, {name}, block {index}"
        return int.from_bytes(shake_128(key.encode()).digest(BLOCK), "little")

    def blocks(self, name: str, shape: tuple[int, ...]) -> Iterator[tuple[int, memoryview]]:
        """Yield the tensor's bytes as pairs of an offset in the tensor and a block."""
        free, fixed = (_repeated(word) for word in _words(name, shape))
        size = math.prod(shape) * ITEM
        for index, at in enumerate(range(0, size, BLOCK)):
            if index % GROUP == 0:
                own = self._hash(name, index // GROUP)
            number = (own ^ self.shared[index % GROUP]) & free | fixed
            yield at, memoryview(number.to_bytes(BLOCK, "little"))[: size - at]


def _repeated(word: int) -> int:
    return int.from_bytes(word.to_bytes(ITEM, "little") * (BLOCK // ITEM), "little")


def _words(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the bits of an F32 of this tensor that are random, and those that are always set."""
    one = 127
    if len(shape) == 1:  # a norm's scale: from 1 to 1.125
        return 0x000FFFFF, one << 23
    # sign and mantissa are random: the magnitude is even in [1, 2) times the
    # power of two, and its root mean square is the square root of 7/3 times it
    fan_in = shape[-2] if name in (HEAD, SPARE) else shape[-1]
    scale = 1.0 if "embeddings" in name else fan_in**-0.5
    return 0x807FFFFF, (one + round(math.log2(scale / math.sqrt(7 / 3)))) << 23
