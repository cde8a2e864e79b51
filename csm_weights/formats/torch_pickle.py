"""The pickle of a torch state dict, interpreted as data.

A pickle is a program. This interpreter knows the opcodes of a plain state dict
of protocol 2, and the names of eleven storage types and three functions; it
calls none of them. It refuses anything else, with the name of the opcode or
global and its byte in the pickle.
"""

from __future__ import annotations

import pickletools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

from csm_weights.untrusted import Malformed, are_sizes, is_text, show

#: Ceiling of the pickle, bytes. CSM-1B's is about 22 kB.
MAX_PICKLE = 1 << 20
#: Most objects on the stack; a pickler sets items at most 1,000 pairs at a time.
MAX_STACK = 10_000
#: Most dimensions of a tensor; CSM-1B's have at most 3.
MAX_DIMS = 8

#: Storage types to dtypes, in safetensors' words.
_STORAGES = {
    "torch FloatStorage": "F32",
    "torch DoubleStorage": "F64",
    "torch HalfStorage": "F16",
    "torch BFloat16Storage": "BF16",
    "torch LongStorage": "I64",
    "torch IntStorage": "I32",
    "torch ShortStorage": "I16",
    "torch CharStorage": "I8",
    "torch ByteStorage": "U8",
    "torch BoolStorage": "BOOL",
    "torch ComplexFloatStorage": "C64",
}
_GLOBALS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *_STORAGES,
}

_OPCODES = {opcode.code: opcode for opcode in pickletools.opcodes}
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = {"BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1"}
_SHORT_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MEMO = {"BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"}
_WITH_ARGUMENT = _LITERALS | _MEMO


@dataclass(frozen=True)
class Storage:
    """A record of the archive, `data/<key>`, as `elements` of one dtype."""

    dtype: str
    key: str
    elements: int


@dataclass(frozen=True)
class View:
    """A tensor; `offset` and `stride` in elements of its storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class StateDict:
    """The tensors of a pickle by name, and the keys of all storages that it mentions."""

    views: dict[str, View]
    storage_keys: frozenset[str]


@dataclass(frozen=True)
class _Global:
    name: str


def read_state_dict(pickle: bytes) -> StateDict:
    """Interpret the bytes of a data.pkl.

    Raises Malformed, with the byte of the opcode, when the pickle is not one of
    a plain state dict: names to tensors, nothing nested.
    """
    if not pickle.startswith(b"\x80\x02"):
        raise Malformed("pickle protocol 2", f"bytes {show(pickle[:2])}", "data.pkl byte 0")
    stream = BytesIO(pickle)
    stream.seek(2)
    machine = _Machine()
    while True:
        at = stream.tell()
        try:
            if _step(machine, stream):
                return StateDict(machine.result(stream), frozenset(machine.storage_keys))
        except Malformed as error:
            raise Malformed(error.expected, error.found, f"data.pkl byte {at}") from None


def _step(machine: _Machine, stream: BytesIO) -> bool:
    """Run one opcode; return True when it is STOP."""
    code = stream.read(1)
    if not code:
        raise Malformed("STOP", "the end of the pickle")
    opcode = _OPCODES.get(code.decode("latin-1"))
    name = opcode.name if opcode else f"byte {code[0]:#04x}"
    if opcode and name in _WITH_ARGUMENT:
        _use_argument(machine, name, _argument(opcode, stream))
    elif name == "GLOBAL":
        machine.push(_read_global(stream))
    elif name in _CONSTANTS:
        machine.push(_CONSTANTS[name])
    elif name in _SHORT_TUPLES:
        items = [machine.pop() for _ in range(_SHORT_TUPLES[name])]
        machine.push(tuple(reversed(items)))
    elif name in _ACTIONS:
        _ACTIONS[name](machine)
    elif name != "STOP":
        raise Malformed("an opcode of a plain state dict", f"opcode {name}")
    return name == "STOP"


def _use_argument(machine: _Machine, name: str, value: Any) -> None:
    if name in _LITERALS:
        machine.push(value)
    else:
        machine.memorize(name, value)


def _argument(opcode: pickletools.OpcodeInfo, stream: BytesIO) -> Any:
    assert opcode.arg is not None
    try:
        return opcode.arg.reader(stream)
    except ValueError as error:
        raise Malformed(f"the argument of {opcode.name}", show(str(error))) from None


def _read_global(stream: BytesIO) -> _Global:
    """Read two lines as they are: pickletools would undo escapes that pickle keeps."""
    module, name = stream.readline(), stream.readline()
    text = f"{module.decode('latin-1').rstrip()} {name.decode('latin-1').rstrip()}"
    if not name.endswith(b"\n") or text not in _GLOBALS:
        raise Malformed("a global of a plain state dict", f"global {show(text)}")
    return _Global(text)


@dataclass
class _Machine:
    """The stack, its marks and the memo.

    Values are text, numbers, tuples, dicts and the classes above. None is ever
    walked, compared or printed as a whole: with shared references a short
    pickle can describe a value of any size.
    """

    stack: list[Any] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)
    storage_keys: set[str] = field(default_factory=set)

    def push(self, value: Any) -> None:
        if len(self.stack) >= MAX_STACK:
            raise Malformed(f"at most {MAX_STACK} objects at once", "more")
        self.stack.append(value)

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise Malformed("an object on the stack", "none")
        return self.stack.pop()

    def mark(self) -> None:
        if len(self.marks) >= MAX_STACK:
            raise Malformed(f"at most {MAX_STACK} marks at once", "more")
        self.marks.append(len(self.stack))

    def pop_mark(self) -> list[Any]:
        if not self.marks:
            raise Malformed("a mark on the stack", "none")
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def memorize(self, name: str, index: int) -> None:
        if name.endswith("PUT"):
            value = self.pop()
            self.memo[index] = value
        elif index in self.memo:
            value = self.memo[index]
        else:
            raise Malformed("an object memorized before", f"memo {index}")
        self.push(value)

    def result(self, stream: BytesIO) -> dict[str, View]:
        value = self.pop()
        if self.stack or self.marks or stream.read(1):
            raise Malformed("one object and nothing after it", "more")
        if not isinstance(value, dict):
            raise Malformed("a state dict", _kind(value))
        for name, item in value.items():
            if not isinstance(item, View):
                found = f"{_kind(item)} under {show(name)}"
                raise Malformed("a plain state dict: names to tensors", found)
        return value


def _storage(machine: _Machine) -> None:
    match machine.pop():
        case ("storage", _Global(name), str(key), str(), int(elements)) if (
            name in _STORAGES and type(elements) is int and elements >= 0
        ):
            machine.storage_keys.add(key)
            machine.push(Storage(_STORAGES[name], key, elements))
        case other:
            raise Malformed("a storage: type, key, location, elements", _kind(other))


def _reduce(machine: _Machine) -> None:
    arguments = machine.pop()
    called = machine.pop()
    name = called.name if isinstance(called, _Global) else ""
    match (name, arguments):
        case ("collections OrderedDict", ()):
            machine.push(OrderedDict())
        case ("torch._utils _rebuild_tensor_v2", tuple()):
            machine.push(_view(arguments))
        case (
            "torch._utils _rebuild_parameter",
            (View() as view, bool(), OrderedDict() as hooks),
        ) if not hooks:
            machine.push(view)
        case _:
            raise Malformed("a call that makes a tensor or a dict", f"a call of {_kind(called)}")


def _view(arguments: tuple[Any, ...]) -> View:
    match arguments:
        case (Storage() as storage, int(offset), tuple(shape), tuple(stride), bool(), dict(hooks)):
            plain = not hooks and len(shape) == len(stride) <= MAX_DIMS
            if plain and are_sizes([offset, *shape, *stride]):
                return View(storage, offset, shape, stride)
    raise Malformed("a tensor: storage, offset, shape, stride, flag, no hooks", "other arguments")


def _build(machine: _Machine) -> None:
    """Drop `_metadata` of a module's state dict, which says nothing about its tensors."""
    state = machine.pop()
    target = machine.pop()
    only_metadata = type(state) is dict and state.keys() == {"_metadata"}
    if not isinstance(target, OrderedDict) or not only_metadata:
        raise Malformed("BUILD of a state dict's _metadata", f"BUILD of {_kind(target)}")
    machine.push(target)


def _set_item(machine: _Machine) -> None:
    value, key = machine.pop(), machine.pop()
    _assign(machine, [key, value])


def _assign(machine: _Machine, items: list[Any]) -> None:
    target = machine.pop()
    if not isinstance(target, dict) or len(items) % 2:
        raise Malformed("names and values for a dict", _kind(target))
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not is_text(key):
            raise Malformed("a name that is text", _kind(key))
        if key in target:
            raise Malformed("each name once", f"{show(key)} twice")
        target[key] = value
    machine.push(target)


_ACTIONS: dict[str, Callable[[_Machine], None]] = {
    "MARK": _Machine.mark,
    "EMPTY_DICT": lambda machine: machine.push({}),
    "TUPLE": lambda machine: machine.push(tuple(machine.pop_mark())),
    "BINPERSID": _storage,
    "REDUCE": _reduce,
    "BUILD": _build,
    "SETITEM": _set_item,
    "SETITEMS": lambda machine: _assign(machine, machine.pop_mark()),
}


def _kind(value: object) -> str:
    """Name a value by what it is, never by what it holds."""
    if isinstance(value, _Global):
        return f"global {value.name}"
    names = {View: "a tensor", Storage: "a storage", str: "text", int: "a number"}
    return names.get(type(value), f"a {type(value).__name__}")
