"""The names of globals that pickles of torch have: read as data, left unread, or refused.

What the names in `READ` make is read. `verdict` tells of any other whether an object
made by it may be left unread, or could be a call that runs a program.
"""

from __future__ import annotations

import re
import sys

#: torch's names of dtypes and of older files' storage types, by safetensors' word or one like it.
_WORDS = {
    "F64": ("float64", "Double"),
    "F32": ("float32", "Float"),
    "F16": ("float16", "Half"),
    "BF16": ("bfloat16", "BFloat16"),
    "I64": ("int64", "Long"),
    "I32": ("int32", "Int"),
    "I16": ("int16", "Short"),
    "I8": ("int8", "Char"),
    "U8": ("uint8", "Byte"),
    "BOOL": ("bool", "Bool"),
    "C64": ("complex64", "ComplexFloat"),
    "C128": ("complex128", "ComplexDouble"),
    "C32": ("complex32", ""),
    "U16": ("uint16", ""),
    "U32": ("uint32", ""),
    "U64": ("uint64", ""),
    "F8_E4M3": ("float8_e4m3fn", ""),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", ""),
    "F8_E5M2": ("float8_e5m2", ""),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", ""),
    "F8_E8M0": ("float8_e8m0fnu", ""),
    "F4_X2": ("float4_e2m1fn_x2", ""),
}
#: torch's class of a storage, by safetensors' word for the dtype.
STORAGE_NAMES = {word: f"{name}Storage" for word, (_, name) in _WORDS.items() if name}
DTYPES = {f"torch {name}": word for word, (name, _) in _WORDS.items()}
STORAGES = {
    f"{module} {name}": word
    for word, name in STORAGE_NAMES.items()
    for module in ("torch", "torch.cuda")
}
STORAGES["torch.storage UntypedStorage"] = "U8"
#: Calls whose result holds no tensor that lies in the file.
INERT = {
    *("_codecs encode", "builtins bytearray", "builtins complex", "torch device"),
    "torch.serialization _get_layout",
}
_CALLED = {
    *("collections OrderedDict", "collections Counter", "builtins set", "torch Size"),
    *(f"torch._utils _rebuild_{what}" for what in ("tensor", "tensor_v2", "tensor_v3")),
    *(f"torch._utils _rebuild_{what}" for what in ("parameter", "parameter_with_state")),
    "torch._tensor _rebuild_from_type_v2",
}
TYPES = {"torch Tensor", "torch._tensor Tensor", "torch.nn.parameter Parameter"}
READ = {*STORAGES, *DTYPES, *INERT, *_CALLED, *TYPES}
#: Names that torch.load(weights_only=True) allows too: tensors that this reader does not know.
_UNREAD = {
    *(f"torch {kind}Storage" for kind in ("QInt8", "QUInt8", "QInt32", "QUInt4x2", "QUInt2x4")),
    *(f"torch bits{n}" for n in ("1x8", "2x4", "4x2", "8", "16")),
    *(f"torch._utils _rebuild_{what}" for what in ("qtensor", "sparse_tensor", "nested_tensor")),
    *(f"torch per_{of}" for of in ("tensor_affine", "tensor_symmetric")),
    *(f"torch per_channel_{of}" for of in ("affine", "symmetric", "affine_float_qparams")),
    "torch._utils _rebuild_meta_tensor_no_storage",
    "torch._utils _rebuild_wrapper_subclass",
    "torch._utils _rebuild_device_tensor_from_cpu_tensor",
    "torch._utils _rebuild_device_tensor_from_numpy",
}

#: Names of packages that are on every machine where checkpoints are loaded, and that have calls
#: which run their arguments. They are refused, unless they are known to hold data.
_HAVE_GADGETS = {*sys.stdlib_module_names, "__builtin__", "numpy", "pip", "setuptools", "torch"}
_DATA = {
    *("argparse Namespace", "types SimpleNamespace", "copyreg _reconstructor"),
    *(f"collections {kind}" for kind in ("defaultdict", "deque", "ChainMap", "UserDict")),
    *(f"builtins {kind}" for kind in ("bool", "bytes", "dict", "float", "frozenset", "int")),
    *(f"builtins {kind}" for kind in ("list", "object", "range", "slice", "str", "tuple")),
    *("decimal Decimal", "fractions Fraction", "uuid UUID", "re _compile"),
    *(f"datetime {kind}" for kind in ("date", "datetime", "time", "timedelta", "timezone")),
    *(
        f"{module} {pure}{kind}"
        for module in ("pathlib", "pathlib._local")
        for pure in ("", "Pure")
        for kind in ("Path", "PosixPath", "WindowsPath")
    ),
    *(f"numpy.{core}.numeric _frombuffer" for core in ("core", "_core")),
    *(
        f"numpy.{core}.multiarray {made}"
        for core in ("core", "_core")
        for made in ("_reconstruct", "scalar")
    ),
    *("numpy dtype", "numpy ndarray", "numpy.random._pickle __randomstate_ctor"),
    *("numpy.random._pickle __bit_generator_ctor", "torch._C._nn gelu"),
}
#: Classes and activations of these packages; calls have small letters.
_CLASS = re.compile(r"(torch|numpy)(\.\w+)* [A-Z]\w*|torch\.nn\.functional [a-z]\w*", re.ASCII)
#: Classes and functions of other packages; not what is reached through one of their modules.
_FOREIGN = re.compile(r"([A-Za-z_]\w*)(\.\w+)* (\w+|[A-Z]\w*(\.[A-Z]\w*)*)")


def verdict(name: str) -> str | None:
    """Return why the object of a global, as "module name", is left unread; None to refuse it."""
    if name in _UNREAD:
        return ""
    found = _FOREIGN.fullmatch(name)
    if name in _DATA or _CLASS.fullmatch(name) or (found and found[1] not in _HAVE_GADGETS):
        module = name.partition(" ")[0]
        return f": torch.load would run code of {module}, if without weights_only"
    return None
