"""torch.cuda on the CPU, whose copies are made as late as a GPU may make them.

A copy that is asked for on a stream is made only when somebody waits for it: for its stream, or
for an event recorded after it. What depends on a copy without waiting then goes wrong every time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

#: The device that is current, as after torch.cuda.set_device(1).
CURRENT = 1


class Stream:
    """Copies in the order in which they were asked for, and how many were made."""

    def __init__(self, device: torch.device | None = None, priority: int = 0) -> None:
        self.device, self.priority = device, priority
        self.waiting: deque[Callable[[], object]] = deque()
        self.made = 0

    @property
    def asked(self) -> int:
        return self.made + len(self.waiting)

    def make(self, count: int) -> None:
        while self.made < count:
            self.waiting.popleft()()
            self.made += 1

    def synchronize(self) -> None:
        self.make(self.asked)

    def wait_stream(self, other: Stream) -> None:
        other.synchronize()


class Event:
    """A moment of a stream; nothing where it was not recorded."""

    def __init__(self) -> None:
        self.moment: tuple[Stream, int] | None = None

    def record(self, stream: Stream) -> None:
        self.moment = stream, stream.asked

    def synchronize(self) -> None:
        if self.moment:
            stream, count = self.moment
            stream.make(count)

    def query(self) -> bool:
        return self.moment is None or self.moment[0].made >= self.moment[1]


class _Late(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Puts off copies, and clones, to a stream."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._stream = stream

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.clone.default:
            target = torch.empty_like(args[0])
            self._stream.waiting.append(lambda: target.copy_(args[0]))
            return target
        if func is torch.ops.aten.copy_.default:
            self._stream.waiting.append(lambda: func(*args))
            return args[0]
        return func(*args, **(kwargs or {}))


class Simulation:
    """The streams that were made, and the devices that memory was asked for on."""

    def __init__(self) -> None:
        self.streams: list[Stream] = []
        self.devices: list[torch.device] = []
        self.pinned, self.most_pinned = 0, 1 << 40

    def stream(self, device: torch.device | None = None) -> Stream:
        self.streams.append(Stream(device))
        return self.streams[-1]

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        with _Late(stream):
            yield
