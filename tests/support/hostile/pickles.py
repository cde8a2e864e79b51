"""Pickles that name other things than tensors, or tensors outside their storage."""

from __future__ import annotations

from typing import Any

from tests.support.hostile.checkpoints import GOOD_PICKLE
from tests.support.hostile.common import Bad
from tests.support.hostile.opcodes import (
    FLOAT,
    HOOKS,
    REBUILD,
    state_dict,
    storage,
    tensor,
    text,
)
from tests.support.hostile.payloads import SYSTEM, protocol


def _one_tensor(**fields: Any) -> bytes:
    return state_dict(text("w"), tensor(**fields))


_ESCAPED = b"\x80\x02ctorch\\x2e_utils\n_rebuild_tensor_v2\n."

_SHARED = b"\x80\x02)" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(64)) + b"."

_LOOP = b"\x80\x02}q\0" + text("self") + b"h\0s."

_PARAMETER = b"ctorch._utils\n_rebuild_parameter\n("

_HOOKED = b"ccollections\nOrderedDict\n)R" + text("a") + b"K\1s"

_ORDERED = b"\x80\x02ccollections\nOrderedDict\n"

_NAMESPACE = b"cargparse\nNamespace\n)\x81}" + text("lr") + b"K\1sb"

BAD_PICKLES: Bad = {
    "empty": (b"", "pickle protocol 2"),
    "only_protocol": (b"\x80\x02", "the end of the pickle"),
    "half_a_protocol": (b"\x80", "pickle protocol 2 to 5, found bytes b'\\x80' "),
    "protocol_of_another_byte": (b"\x81\x02}.", "pickle protocol 2"),
    "protocol_0": (b"(dp0\n.", "pickle protocol 2"),
    "protocol_1": (b"}q\0.", "pickle protocol 2"),
    "protocol_1_is_told": (protocol(1), "pickle protocol 2"),
    "protocol_6": (protocol(6), "pickle protocol 2"),
    "protocol_twice": (b"\x80\x02\x80\x02}.", "opcode PROTO"),
    "no_stop": (GOOD_PICKLE[:-1], "the end of the pickle"),
    "bytes_after_stop": (GOOD_PICKLE + b".", "nothing after it"),
    "objects_left_over": (b"\x80\x02}" + GOOD_PICKLE[2:], "nothing after it"),
    "mark_left_over": (b"\x80\x02(}.", "nothing after it"),
    "not_an_opcode": (b"\x80\x02\xff.", "opcode byte 0xff"),
    "truncated_text": (b"\x80\x02X\xff\xff\xff\x7fabc", "the argument of BINUNICODE"),
    "text_not_utf8": (b"\x80\x02X\1\0\0\0\xff.", "the argument of BINUNICODE"),
    "truncated_global": (b"\x80\x02ctorch\nFloatStorage", "the end of the pickle"),
    "global_with_spaces": (
        b"\x80\x02ctorch \nFloatStorage\n.",
        "a global of a checkpoint, found global torch",
    ),
    "global_os_system": (b"\x80\x02" + SYSTEM + text("true") + b"\x85R.", "global os system"),
    "global_with_escapes": (_ESCAPED, "torch\\x2e_utils"),
    "global_load_from_bytes": (b"\x80\x02ctorch.storage\n_load_from_bytes\n.", "_load_from_bytes"),
    "newobj": (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "opcode NEWOBJ"),
    "newobj_ex": (b"\x80\x02ccollections\nOrderedDict\n)}\x92.", "opcode NEWOBJ_EX"),
    "newobj_of_one_object": (b"\x80\x02)\x81.", "an object on the stack"),
    "newobj_ex_of_two_objects": (b"\x80\4)}\x92.", "an object on the stack"),
    "object_made_with_keywords": (
        b"\x80\4cnobody.knows\nConfig\n)}\x92.",
        "global nobody.knows Config: torch.load would run",
    ),
    "text_of_python_2_not_utf8": (b"\x80\x02U\1\xff.", "the argument of SHORT_BINSTRING"),
    "item_for_a_dict": (b"\x80\x02}K\1a.", "items for a list, found a dict"),
    "items_for_text": (b"\x80\x02" + text("a") + b"(K\1e.", "items for a list, found text"),
    "set_items_for_a_dict": (b"\x80\4}(K\1\x90.", "items for a set, found a dict"),
    "set_items_for_a_list": (b"\x80\4](K\1\x90.", "items for a set, found a list"),
    "pair_of_one": (_ORDERED + b"]]K\1aa\x85R.", "pairs of name and value, found a list"),
    "pair_of_three": (
        _ORDERED + b"](" + text("a") + b"K\1K\1\x87e\x85R.",
        "pairs of name and value, found a tuple",
    ),
    "pair_of_letters": (_ORDERED + b"](" + text("ab") + b"e\x85R.", "value, found text"),
    "ext1": (b"\x80\x02\x82\1.", "opcode EXT1"),
    "ext2": (b"\x80\x02\x83\1\0.", "opcode EXT2"),
    "ext4": (b"\x80\x02\x84\1\0\0\0.", "opcode EXT4"),
    "persid_of_text": (b"\x80\x02Phello\n.", "opcode PERSID"),
    "frame_cut": (b"\x80\4\x95" + bytes(7), "the argument of FRAME"),
    "frame_of_nothing": (b"\x80\4\x95" + bytes(8), "the end of the pickle"),
    "names_of_a_global_are_numbers": (b"\x80\4K\1K\2\x93.", "the names of a global"),
    "module_of_a_global_is_a_number": (b"\x80\4K\1" + text("a") + b"\x93.", "names of a global"),
    "name_of_a_global_is_a_number": (b"\x80\4" + text("a") + b"K\1\x93.", "names of a global"),
    "buffer": (b"\x80\x02\x97.", "opcode NEXT_BUFFER"),
    "call_of_a_storage_type": (b"\x80\x02" + FLOAT + b")R.", "a call of global torch FloatStorage"),
    "call_of_a_call": (b"\x80\x02" + HOOKS + b")R.", "a call of a OrderedDict"),
    "call_with_a_dict": (b"\x80\x02ccollections\nOrderedDict\n}R.", "a call of global collections"),
    "dict_call_with_items": (
        b"\x80\x02ccollections\nOrderedDict\n}\x85R.",
        "a call of global collections OrderedDict",
    ),
    "build_of_a_dict": (b"\x80\x02}}" + text("_metadata") + b"}sb.", "BUILD of a dict"),
    "build_of_a_global": (b"\x80\x02" + FLOAT + b"}b.", "BUILD of global torch FloatStorage"),
    "build_of_a_tensor": (b"\x80\x02" + tensor() + b"}b.", "BUILD of a tensor"),
    "build_sets_setstate": (
        b"\x80\x02" + HOOKS + b"}" + text("__setstate__") + FLOAT + b"sb.",
        "BUILD of a OrderedDict",
    ),
    "build_with_slots": (b"\x80\x02" + HOOKS + b"N}\x86b.", "BUILD of a OrderedDict"),
    "set_item_of_a_global": (b"\x80\x02" + FLOAT + text("a") + b"K\1s.", "for a dict"),
    "odd_set_items": (b"\x80\x02}(" + text("a") + b"u.", "for a dict"),
    "three_set_items": (b"\x80\x02}(" + text("a") + b"K\1K\1u.", "for a dict"),
    "tuple_as_name": (_SHARED[:-1] + b"}h\1K\2s.", "a name that is text"),
    "surrogate_as_name": (b"\x80\x02}" + text("\ud800") + b"K\2s.", "a name that is text"),
    "name_twice": (state_dict(text("w"), tensor(), text("w"), tensor()), "w twice"),
    "pop_from_nothing": (b"\x80\x02R", "an object on the stack"),
    "pop_below_a_mark": (b"\x80\x02}}(R", "an object on the stack"),
    "pop_below_the_second_mark": (b"\x80\x02(}}(R", "an object on the stack"),
    "tuple_without_mark": (b"\x80\x02t", "a mark on the stack"),
    "memo_never_put": (b"\x80\x02}q\0h\1.", "memorized before, found memo 1"),
    "memo_far_beyond": (b"\x80\x02}q\0h\5.", "memorized before, found memo 5"),
    "memo_with_a_gap": (b"\x80\x02}q\0q\2.", "expected memo 1, the next one, found memo 2"),
    "memo_put_two_too_far": (b"\x80\x02}q\2.", "expected memo 0, the next one, found memo 2"),
    "stack_too_deep": (b"\x80\x02" + b"N" * 20_000, "at most 10000 objects"),
    "marks_too_many": (b"\x80\x02" + b"(" * 20_000, "at most 10000 marks"),
    "sharing_of_exponential_size": (_SHARED, "at most 1,000,000 values"),
    "dict_in_itself": (_LOOP, "at most 100 containers"),
    "names_that_are_one": (
        state_dict(text("a.b"), tensor(), text("a"), b"}" + text("b") + tensor() + b"s"),
        "a name for each tensor, found a.b twice",
    ),
    "set_of_tensors": (b"\x80\x02cbuiltins\nset\n](" + tensor() + b"e\x85R.", "tensors in a set"),
    "namespace": (state_dict(text("args"), _NAMESPACE), "global argparse Namespace: torch.load"),
    "two_objects_of_classes": (
        state_dict(text("args"), _NAMESPACE, text("config"), b"cnobody.knows\nConfig\n)\x81"),
        "global argparse Namespace: torch.load",
    ),
    "namespace_before_os_system": (
        b"\x80\x02" + _NAMESPACE + SYSTEM + text("true") + b"\x85R\x86.",
        "global os system",
    ),
    "namespace_of_a_call": (
        b"\x80\x02" + _NAMESPACE[:-1] + SYSTEM + b"b.",
        "global os system",
    ),
    "class_of_another_package": (
        b"\x80\x02cnobody.knows\nConfig\n)\x81.",
        "global nobody.knows Config: torch.load would run code of nobody.knows",
    ),
    "class_of_another_package_before_os_system": (
        b"\x80\x02cnobody.knows\nConfig\n)\x81" + SYSTEM + text("true") + b"\x85R\x86.",
        "global os system",
    ),
    "module_of_another_package": (
        b"\x80\4" + b"\x8c\x06nobody\x8c\x09os.system\x93" + text("true") + b"\x85R.",
        "a global of a checkpoint, found global nobody os.system",
    ),
    "call_of_torch": (b"\x80\x02ctorch.hub\nload\n.", "global torch.hub load"),
    "method_of_a_namespace": (
        b"\x80\x02cargparse\nNamespace.__init__\n.",
        "a global of a checkpoint, found global argparse Namespace.__init__",
    ),
    "module_beside_the_layers": (
        b"\x80\x02ctorch.nn.modules.module\nwarnings.sys\n.",
        "a global of a checkpoint, found global torch.nn.modules.module",
    ),
    "sparse_tensor_before_os_system": (
        b"\x80\x02ctorch._utils\n_rebuild_sparse_tensor\n" + SYSTEM + b"\x86.",
        "global os system",
    ),
    "sparse_tensor": (b"\x80\x02ctorch._utils\n_rebuild_sparse_tensor\n.", "_sparse_tensor"),
    "storage_for_a_tensor": (state_dict(text("w"), storage()), "found a storage"),
    "one_storage_of_two_sizes": (
        state_dict(text("v"), tensor(of=storage(elements=3)), text("w"), tensor()),
        "one size for each storage",
    ),
    "one_storage_that_shrinks": (
        state_dict(text("v"), tensor(), text("w"), tensor(of=storage(elements=3))),
        "one size for each storage",
    ),
    "storage_of_another_kind": (
        state_dict(text("w"), tensor(of=storage(kind=b"ctorch\nQInt8Storage\n"))),
        "global torch QInt8Storage",
    ),
    "storage_type_is_a_function": (_one_tensor(of=storage(kind=REBUILD)), "a storage: type"),
    "storage_of_bool_size": (
        b"\x80\x02(" + text("storage") + FLOAT + text("0") + text("cpu") + b"\x88tQ.",
        "a storage: type",
    ),
    "storage_of_more_words": (_one_tensor(of=storage()[:-2] + b"K\1tQ"), "a storage: type"),
    "storage_of_negative_size": (_one_tensor(of=storage(elements=-1)), "a storage: type"),
    "storage_size_beyond_64_bits": (_one_tensor(of=storage(elements=1 << 63)), "a storage: type"),
    "storage_size_too_long_to_print": (
        _one_tensor(of=storage(elements=1 << 40_000)),
        "a storage: type",
    ),
    "storage_record_is_larger": (_one_tensor(of=storage(elements=5)), "20 bytes in data/0"),
    "storage_record_is_smaller": (_one_tensor(of=storage(elements=7)), "28 bytes in data/0"),
    "storage_dtype_lies": (
        _one_tensor(of=storage(kind=b"ctorch\nDoubleStorage\n")),
        "48 bytes in data/0",
    ),
    "storage_key_climbs_out": (_one_tensor(of=storage(key="../0")), "a record data/../0"),
    "tensor_with_metadata_twice": (_one_tensor(tail=b"\x89" + HOOKS + b"}}"), "other arguments"),
    "tensor_with_other_metadata": (
        _one_tensor(tail=b"\x89" + HOOKS + b"}" + text("x") + b"\x88s"),
        "a view of F32 with metadata",
    ),
    "tensor_with_hooks": (_one_tensor(tail=b"\x89" + _HOOKED), "other arguments"),
    "tensor_without_hooks": (_one_tensor(tail=b"\x89"), "other arguments"),
    "tensor_whose_flag_is_a_number": (_one_tensor(tail=b"K\1" + HOOKS), "other arguments"),
    "tensor_with_a_number_more": (_one_tensor(tail=b"\x89" + HOOKS + b"K\1"), "other arguments"),
    "tensor_v2_with_a_dtype": (
        _one_tensor(tail=b"\x89" + HOOKS + b"ctorch\nint32\n"),
        "other arguments",
    ),
    "tensor_of_torch_0_1_with_a_flag": (
        _one_tensor(tail=b"\x89" + HOOKS).replace(b"_v2", b""),
        "other arguments",
    ),
    "tensor_v2_without_a_flag": (_one_tensor(tail=b""), "other arguments"),
    "tensor_v3_without_a_dtype": (_one_tensor().replace(b"_v2", b"_v3"), "other arguments"),
    "tensor_v3_with_hooks": (
        _one_tensor(tail=b"\x89" + _HOOKED + b"ctorch\nint32\n").replace(b"_v2", b"_v3"),
        "other arguments",
    ),
    "tensor_v3_of_no_dtype": (
        _one_tensor(tail=b"\x89" + HOOKS + b"ctorch\nSize\n").replace(b"_v2", b"_v3"),
        "other arguments",
    ),
    "tensor_of_another_tensor": (_one_tensor(of=tensor()), "other arguments"),
    "tensor_negative_offset": (_one_tensor(offset=-1), "other arguments"),
    "tensor_negative_stride": (_one_tensor(offset=5, stride=(-3, -1)), "other arguments"),
    "tensor_negative_shape": (_one_tensor(shape=(-2, -3)), "other arguments"),
    "tensor_stride_too_short": (_one_tensor(stride=(1,)), "other arguments"),
    "tensor_of_65_dimensions": (
        _one_tensor(shape=[1] * 65, stride=[1] * 65),
        "at most 64 dimensions",
    ),
    "tensor_size_beyond_64_bits": (_one_tensor(shape=(1 << 64, 0)), "other arguments"),
    "tensor_after_its_storage": (_one_tensor(offset=1), "a view of 6 elements"),
    "tensor_stride_leaves_storage": (_one_tensor(stride=(4, 1)), "a view of 6 elements"),
    "tensor_of_overflowing_extent": (
        _one_tensor(shape=(1 << 62, 1 << 62), stride=(1 << 62, 1 << 62)),
        "a view of 6 elements",
    ),
    "tensor_repeats_its_storage": (
        _one_tensor(shape=(1 << 40, 1), stride=(0, 1)),
        "at most 1,073,741,824 bytes of repeated elements",
    ),
    "parameter_of_a_storage": (
        state_dict(text("w"), _PARAMETER + storage() + b"\x88" + HOOKS + b"tR"),
        "a call of global torch._utils _rebuild_parameter",
    ),
    "parameter_with_a_word_more": (
        state_dict(text("w"), _PARAMETER + tensor() + b"\x88" + HOOKS + b"}tR"),
        "a call of global torch._utils _rebuild_parameter",
    ),
    "parameter_without_its_state": (
        state_dict(
            text("w"),
            _PARAMETER.replace(b"\n(", b"_with_state\n(") + tensor() + b"\x88" + HOOKS + b"tR",
        ),
        "a call of global torch._utils _rebuild_parameter_with_state",
    ),
    "parameter_with_hooks": (
        state_dict(text("w"), _PARAMETER + tensor() + b"\x88" + _HOOKED + b"tR"),
        "a call of global torch._utils _rebuild_parameter",
    ),
}
