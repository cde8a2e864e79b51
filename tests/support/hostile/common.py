"""The shape of a collection, and a file on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

Bad = Mapping[str, tuple[bytes, str]]

#: Files that break no rule: they are only beyond what is read, so their digest decides.
UNREAD = frozenset(
    {
        "shape_of_65_dimensions",
        "dtype_unknown",
        "text",
        "directory_over_the_ceiling",
        "torchscript",
        "pickle_huge",
        "tuple_as_name",
        "sharing_of_exponential_size",
        "dict_in_itself",
        "names_that_are_one",
        "set_of_tensors",
        "namespace",
        "two_objects_of_classes",
        "bytes_beyond_those_of_a_pickle",
        "text_with_letters_where_a_tar_has_its_sign",
        "class_of_another_package",
        "object_made_with_keywords",
        "sparse_tensor",
        "storage_for_a_tensor",
        "storage_of_another_kind",
        "tensor_with_other_metadata",
        "tensor_of_65_dimensions",
        "tensor_repeats_its_storage",
        "header_of_tensors",
        "pickle_of_objects",
        "numbers_big_endian",
        "endian_is_a_number",
        "endian_not_told",
    }
)


def written(folder: Path, content: bytes, name: str = "weights") -> Path:
    """Write content to a file in the folder, and return its path."""
    path = folder / name
    path.write_bytes(content)
    return path
