"""The pickles of a torch file, interpreted as data.

A pickle is a program. This interpreter knows the opcodes of protocols 2 to 5 that checkpoints
have, and the names that torch.load(weights_only=True) allows; it calls none of them. It refuses
anything else, with the name of the opcode or global and its byte in the pickle.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from itertools import chain
from typing import Any

from csm_weights.formats.tensor_index import ITEM_BITS, MAX_DIMS, MAX_INDEX, index_cost
from csm_weights.formats.torch_names import DTYPES, INERT, READ, STORAGES, TYPES, verdict
from csm_weights.untrusted import Malformed, Unsupported, are_sizes, is_text, show

#: Ceiling of a pickle, bytes, and of the objects it makes. CSM-1B's has 22 kB.
MAX_PICKLE = 4 << 20
MAX_OBJECTS = 300_000
#: Most objects on the stack; a pickler sets items at most 1,000 pairs at a time.
MAX_STACK = 10_000
#: Most values searched for tensors, and their deepest nesting.
MAX_VALUES = 1_000_000
MAX_DEPTH = 100

#: How a pickle begins.
_HEAD = re.compile(rb"\x80[\x02-\x05]")

_NAMES = {opcode.code: opcode.name for opcode in pickletools.opcodes}
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
#: Opcodes that push their argument, and readers of the arguments of these and others.
_LITERALS = {
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
}
_WITH_ARGUMENT = {*_LITERALS, "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "FRAME"}
_READERS = {
    opcode.name: opcode.arg.reader
    for opcode in pickletools.opcodes
    if opcode.arg and opcode.name in _WITH_ARGUMENT
}


@dataclass(frozen=True, slots=True)
class Storage:
    """Bytes of the file under a key, as `elements` of one dtype."""

    dtype: str
    key: str
    elements: int

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.elements * ITEM_BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True)
class View:
    """A tensor; `offset` and `stride` in elements of its dtype."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Pickle:
    """The value of a pickle, and the storages that it mentions by their keys.

    `unread` is the first object in it that is not read as data, if any; it is
    to be raised when all pickles of the file are known to hold nothing worse.
    """

    value: Any
    storages: dict[str, Storage]
    unread: Unsupported | None


@dataclass(frozen=True, slots=True)
class _Global:
    name: str


@dataclass(frozen=True, slots=True)
class _Unread:
    """A global that is not read as data, or an object that it makes."""

    name: str


#: An object that holds no tensor.
_INERT_OBJECT = object()


class _OrderedDict(dict[Any, Any]):
    """A dict that BUILD may give attributes."""

    __slots__ = ()


def read_pickle(stream: BytesIO, where: str) -> Pickle:
    """Interpret one pickle from the position of a stream, and leave the position behind it.

    Raises Malformed, with the byte of the opcode, for what
    torch.load(weights_only=True) refuses, and Unsupported for what only this
    reader does. Objects of well-known classes that are no tensors leave the
    rest to be read, and are the `unread` of the result.
    """
    start = stream.tell()
    head = stream.read(2)
    if not _HEAD.fullmatch(head):
        raise Malformed("pickle protocol 2 to 5", f"bytes {show(head)}", f"{where} byte {start}")
    machine = _Machine(stream)
    while True:
        at = stream.tell()
        try:
            if machine.step():
                value = machine.pop()
                if machine.stack or machine.marks:
                    raise Malformed("one object and nothing after it", "more")
                return Pickle(value, machine.storages, machine.unread)
            if machine.unread and not machine.unread.at:
                machine.unread.at = f"{where} byte {at}"
        except Malformed as error:
            raise type(error)(error.expected, error.found, f"{where} byte {at}") from None


def tensors_of(value: Any) -> dict[str, View]:
    """Return the tensors of a value by name; a nested one's has the keys on its way, with dots.

    Raises Unsupported where two tensors get one name, or the value is too large.
    """
    found: dict[str, View] = {}
    room = MAX_INDEX
    for name, view in _walk(value, "", 0, iter(range(MAX_VALUES))):
        room -= index_cost(name, len(view.shape))
        if name in found or room < 0:
            raise Unsupported("a name for each tensor", f"{show(name)} twice, or too many")
        found[name] = view
    return found


def _walk(value: Any, name: str, depth: int, budget: Iterator[int]) -> Iterator[tuple[str, View]]:
    if isinstance(value, View):
        yield name or "tensor", value
        return
    if not isinstance(value, dict | list | tuple):
        raise Unsupported("tensors in dicts, lists and tuples", f"{_kind(value)}")
    if depth > MAX_DEPTH:
        raise Unsupported(f"at most {MAX_DEPTH} containers in one another", "more")
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        if next(budget, None) is None:
            raise Unsupported(f"at most {MAX_VALUES:,} values", "more")
        if isinstance(item, View | Storage | dict | list | tuple):
            word = key if isinstance(key, str) else show(key)
            yield from _walk(item, f"{name}.{word}" if depth else word, depth + 1, budget)


@dataclass
class _Machine:
    """A stream of opcodes, the stack, its marks and the memo.

    Values are text, numbers, tuples, lists, dicts and the classes above. None
    is ever compared, hashed or printed as a whole: with shared references a
    short pickle can describe a value of any size.
    """

    stream: BytesIO
    stack: list[Any] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: list[Any] = field(default_factory=list)
    storages: dict[str, Storage] = field(default_factory=dict)
    unread: Unsupported | None = None
    objects: int = 0

    def step(self) -> bool:
        """Run one opcode; return True when it is STOP."""
        code = self.stream.read(1)
        if not code:
            raise Malformed("STOP", "the end of the pickle")
        name = _NAMES.get(code.decode("latin-1")) or f"byte 0x{code.hex()}"
        argument: Any = None
        if name in _READERS:
            try:
                argument = _READERS[name](self.stream)
                if name.endswith("BINSTRING"):  # of Python 2
                    argument = argument.encode("latin-1").decode()
            except ValueError as error:
                raise Malformed(f"the argument of {name}", show(str(error))) from None
        match name:
            case "STOP" | "FRAME":
                pass
            case _ if name in _LITERALS:
                self.push(argument)
            case _ if name in _CONSTANTS:
                self.push(_CONSTANTS[name])
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                self.put(argument)
            case "BINGET" | "LONG_BINGET":
                if argument >= len(self.memo):
                    raise Malformed("an object memorized before", f"memo {argument}")
                self.push(self.memo[argument])
            case "MARK":
                if len(self.marks) >= MAX_STACK:
                    raise Malformed(f"at most {MAX_STACK} marks at once", "more")
                self.marks.append(len(self.stack))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [self.pop() for _ in range(int(name[-1]))]
                self.make(tuple(reversed(items)))
            case "TUPLE":
                self.make(tuple(self.pop_mark()))
            case "EMPTY_DICT":
                self.make({})
            case "EMPTY_LIST":
                self.make([])
            case "APPEND":
                self.extend([self.pop()])
            case "APPENDS":
                self.extend(self.pop_mark())
            case "SETITEM":
                value, key = self.pop(), self.pop()
                self.assign([key, value])
            case "SETITEMS":
                self.assign(self.pop_mark())
            case "GLOBAL":
                # two lines as they are: pickletools would undo escapes that pickle keeps
                lines = [self.stream.readline().decode("latin-1") for _ in range(2)]
                self.push(self.find(*(line.removesuffix("\n") for line in lines)))
            case "STACK_GLOBAL":
                word, module = self.pop(), self.pop()
                if not isinstance(word, str) or not isinstance(module, str):
                    raise Malformed("the names of a global", _kind(module))
                self.push(self.find(module, word))
            case "REDUCE":
                arguments = self.pop()
                self.make(_call(self.pop(), arguments))
            case "NEWOBJ" | "NEWOBJ_EX":
                self.pop()
                if name == "NEWOBJ_EX":
                    self.pop()
                made = self.pop()
                if not isinstance(made, _Unread):
                    raise Malformed("an opcode of a checkpoint", f"opcode {name}")
                self.make(made)
            case "EMPTY_SET":
                self.make(_INERT_OBJECT)
            case "ADDITEMS":
                items, target = self.pop_mark(), self.pop()
                if target is not _INERT_OBJECT:
                    raise Malformed("items for a set", _kind(target))
                self.push(_set_of(items))
            case "FROZENSET":
                self.make(_set_of(self.pop_mark()))
            case "BUILD":  # drops the attributes of an OrderedDict, such as a module's _metadata
                state, target = self.pop(), self.pop()
                match target, state:
                    case (_OrderedDict(), dict()) if not any(
                        isinstance(key, str) and key.startswith("__") for key in state
                    ):
                        pass
                    case (_Unread(), _):
                        pass
                    case _:
                        found = f"BUILD of {_kind(target)}"
                        raise Malformed("BUILD of a state dict's _metadata", found)
                self.push(target)
            case "BINPERSID":
                self.make(self.storage(self.pop()))
            case _:
                raise Malformed("an opcode of a checkpoint", f"opcode {name}")
        return name == "STOP"

    def push(self, value: Any) -> None:
        if len(self.stack) >= MAX_STACK:
            raise Malformed(f"at most {MAX_STACK} objects at once", "more")
        self.stack.append(value)

    def make(self, value: Any) -> None:
        self.objects += 1
        if self.objects > MAX_OBJECTS:
            raise Unsupported(f"at most {MAX_OBJECTS:,} objects", "more")
        self.push(value)

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise Malformed("an object on the stack", "none")
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        if not self.marks:
            raise Malformed("a mark on the stack", "none")
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def put(self, index: int | None) -> None:
        value = self.pop()
        self.push(value)
        count = len(self.memo)
        index = count if index is None else index
        if index > (count or 1):  # picklers count from 0, that of Python 2 from 1
            raise Malformed(f"memo {count}, the next one", f"memo {index}")
        self.memo += [None] * (index + 1 - count)
        self.memo[index] = value

    def extend(self, items: list[Any]) -> None:
        target = self.pop()
        if not isinstance(target, list | _Unread):
            raise Malformed("items for a list", _kind(target))
        if isinstance(target, list):
            target += items
        self.push(target)

    def assign(self, items: list[Any]) -> None:
        target = self.pop()
        if not isinstance(target, dict | _Unread) or len(items) % 2:
            raise Malformed("names and values for a dict", _kind(target))
        if isinstance(target, dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                _set(target, key, value)
        self.push(target)

    def find(self, module: str, name: str) -> _Global | _Unread:
        """Return a global that is read as data, or one that is noted and left unread."""
        text = f"{module} {name}".replace("__builtin__ ", "builtins ")
        if text in READ:
            return _Global(text)
        why = verdict(text)
        if why is None:
            raise Malformed("a global of a checkpoint", f"global {show(text)}")
        self.unread = self.unread or Unsupported("plain tensors", f"global {show(text)}{why}")
        return _Unread(text)

    def storage(self, value: Any) -> Storage | _Unread:
        match value:
            case ("storage" | "module", _Unread() as kind, *_):
                return kind
            case ("storage", _Global(name), str(key), str(), elements, *rest) if (
                name in STORAGES and are_sizes([elements]) and rest in ([], [None])
            ):
                found = Storage(STORAGES[name], key, elements)
                if self.storages.setdefault(key, found).nbytes != found.nbytes:
                    raise Malformed("one size for each storage", f"two for {show(key)}")
                return found
        raise Malformed("a storage: type, key, location, elements", _kind(value))


def _call(called: Any, arguments: Any) -> Any:
    """Return the result of a call that torch.load(weights_only=True) would make, as data."""
    if isinstance(called, _Unread):
        return called
    name = called.name if isinstance(called, _Global) else ""
    match (name, arguments):
        case (_, tuple()) if name and any(isinstance(one, _Unread) for one in arguments):
            return next(one for one in arguments if isinstance(one, _Unread))
        case ("collections OrderedDict", () | (list(),)):
            made = _OrderedDict()
            for pair in chain(*arguments):
                if not isinstance(pair, list | tuple) or len(pair) != 2:
                    raise Malformed("pairs of name and value", _kind(pair))
                _set(made, *pair)
            return made
        case ("collections Counter", () | (dict(),)):
            return _INERT_OBJECT
        case ("builtins set", () | (list(),)):
            return _set_of(chain(*arguments))
        case ("torch Size", (tuple(size),)):
            return size
        case (_, tuple()) if name.startswith("torch._utils _rebuild_tensor"):
            return _view(name, arguments)
        case (
            "torch._utils _rebuild_parameter" | "torch._utils _rebuild_parameter_with_state",
            (View() as view, bool(), dict() as hooks, *rest),
        ) if not hooks and len(rest) == name.endswith("state"):
            return view
        case ("torch._tensor _rebuild_from_type_v2", (inner, _Global(type_), tuple(inside), _)) if (
            type_ in TYPES
        ):
            return _call(inner, inside)
        case _ if name in INERT and isinstance(arguments, tuple):
            return _INERT_OBJECT
    raise Malformed("a call that makes a tensor or a dict", f"a call of {_kind(called)}")


def _set_of(items: Iterable[Any]) -> object:
    if any(isinstance(item, View) for item in items):
        raise Unsupported("tensors with names", "tensors in a set")
    return _INERT_OBJECT


def _view(name: str, arguments: tuple[Any, ...]) -> View:
    refused = Malformed(
        "a tensor: storage, offset, shape, stride, flag, no hooks", "other arguments"
    )
    match arguments:
        case (Storage() as storage, offset, tuple(shape), tuple(stride), *rest) if len(
            shape
        ) == len(stride) and are_sizes([offset, *shape, *stride]):
            dtype = storage.dtype
        case _:
            raise refused
    metadata: list[Any] = []
    match (name.rpartition("_")[2], *rest):
        case ("tensor",):
            pass
        case ("v2", bool(), dict() | None as hooks, *metadata) if not hooks:
            pass
        case ("v3", bool(), dict() | None as hooks, _Global(kind), *metadata) if (
            not hooks and kind in DTYPES
        ):
            dtype = DTYPES[kind]
        case _:
            raise refused
    match metadata:
        case [dict(items)] if items:
            found = f"a view of {dtype} with metadata"
            raise Unsupported("a view that is stored as it is", found)
        case [] | [dict()] if len(shape) > MAX_DIMS:
            raise Unsupported(f"at most {MAX_DIMS} dimensions", f"{len(shape)}")
        case [] | [dict()]:
            return View(storage, dtype, offset, shape, stride)
    raise refused


def _set(target: dict[Any, Any], key: Any, value: Any) -> None:
    if isinstance(key, _Unread):
        return
    if isinstance(key, str) and not is_text(key):
        raise Malformed("a name that is text", _kind(key))
    if not isinstance(key, str | int | float | bytes | None):
        raise Unsupported("a name that is text or a number", _kind(key))
    if key in target:
        raise Malformed("each name once", f"{show(key)} twice")
    target[key] = value


def _kind(value: object) -> str:
    """Name a value by what it is, never by what it holds."""
    if isinstance(value, _Global | _Unread):
        return f"global {value.name}"
    names = {View: "a tensor", Storage: "a storage", str: "text", int: "a number"}
    names |= {_OrderedDict: "a OrderedDict", float: "a number"}
    return names.get(type(value), f"a {type(value).__name__}")
