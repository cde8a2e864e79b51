"""Manifests that are wrong on purpose."""

from __future__ import annotations

from tests.support.hostile.common import Bad

_HEAD = 'schema = 1\nname = "bad"\n[layout]\nstaging = "output/bad"\ndestination = "{to}"\n'

_FILE = '[[artifact]]\npath = "{path}"\ngroup = "g"\nformat = "opaque"\nsize = {size}\n{more}\n'

_SHA = f'sha256 = "{"1" * 64}"'


def manifest(
    path: str = "a.bin", size: object = 8, more: str = _SHA, to: str = "models/bad"
) -> bytes:
    """Return the text of a manifest of one file, with changes."""
    head, file = _HEAD.replace("{to}", to), _FILE.replace("{path}", path)
    return (head + file.replace("{size}", str(size)).replace("{more}", more)).encode()


def files(*paths: str) -> bytes:
    """Return the text of a manifest of small files with those paths."""
    entry = manifest().partition(b"[[artifact]]")[2].decode()
    entries = ("[[artifact]]" + entry.replace("a.bin", path) for path in paths)
    return _HEAD.replace("{to}", "models/bad").encode() + "".join(entries).encode()


def _pieces(*pieces: str, size: object = 8) -> bytes:
    return manifest(size=size, more=f"pieces = [{', '.join(pieces)}]")


def piece(offset: object, size: object, part: str = "chunks/p-aa") -> str:
    """Return a piece of the array, in TOML."""
    return f'{{ part = "{part}", offset = {offset}, size = {size}, {_SHA} }}'


_MANY = [piece(i, 1, f"chunks/p-{i}") for i in range(20_000)]

BAD_MANIFESTS: Bad = {
    "path_climbs_out": (manifest("../../.bashrc"), "'..' component"),
    "path_climbs_out_from_within": (manifest("a/../../b"), "'..' component"),
    "path_absolute": (manifest("/etc/cron.d/run"), "absolute"),
    "path_of_a_windows_drive": (manifest("C:/Windows/run"), "some file system refuses"),
    "path_with_backslashes": (manifest("..\\\\..\\\\b"), "some file system refuses"),
    "path_in_the_home_of_git": (manifest(".git/hooks/pre-commit"), "reserved folder"),
    "path_that_macos_takes_for_git": (manifest(".g\\u200cit/config"), "cannot be seen"),
    "path_with_escape_sequence": (manifest("a\\u001b]0;owned\\u0007"), "some file system refuses"),
    "path_with_c1_escape": (manifest("a\\u009b2Jb"), "some file system refuses"),
    "path_turned_round": (manifest("gnp.\\u202esh"), "cannot be seen"),
    "path_with_nul": (manifest("a\\u0000b"), "some file system refuses"),
    "path_of_a_receipt": (manifest(".csm-weights/a.json"), "reserved folder"),
    "path_of_a_journal": (manifest("a.partial.journal"), "unfinished files"),
    "path_of_a_megabyte": (manifest("a/" * 500_000 + "b"), "at most 1,000 bytes"),
    "path_replaces_the_tasks": (manifest("tasks.py", to="."), "not for data"),
    "path_replaces_the_makefile": (manifest("GNUmakefile", to="."), "not for data"),
    "path_replaces_a_library": (manifest("torch.py", to="."), "not for data"),
    "path_replaces_a_package": (manifest("__init__.py", to="invoke"), "not for data"),
    "path_replaces_the_tests": (manifest("tests/conftest.py", to="."), "not for data"),
    "path_in_the_workflows": (manifest("x.yml", to=".github/workflows"), "not for data"),
    "paths_differ_in_case": (files("a.bin", "A.BIN"), "a path of its own"),
    "paths_differ_in_composed_accents": (files("\u00e9", "e\u0301"), "a path of its own"),
    "path_below_another_file": (files("a", "a/b"), "below the file at"),
    "destination_absolute": (manifest(to="/etc"), "absolute"),
    "destination_climbs_out": (manifest(to="../up"), "'..' component"),
    "size_2_to_the_63": (manifest(size=1 << 63), "an integer of bytes"),
    "size_minus_2_to_the_63": (manifest(size=-(1 << 63)), "an integer of bytes"),
    "size_of_40_000_bits": (manifest(size="0x" + "f" * 10_000), "an integer of 40,000 bits"),
    "size_of_5_000_digits": (manifest(size="9" * 5_000), "TOML"),
    "size_infinite": (manifest(size="inf"), "an integer of bytes"),
    "size_is_a_date": (manifest(size="1979-05-27"), "an integer of bytes"),
    "pieces_leave_a_hole": (_pieces(piece(0, 4), piece(5, 3, "chunks/p-ab")), "a hole"),
    "pieces_overlap": (_pieces(piece(0, 5), piece(4, 4, "chunks/p-ab")), "an overlap"),
    "piece_of_size_2_to_the_63": (_pieces(piece(0, 1 << 63)), "an integer of bytes"),
    "piece_of_negative_size": (_pieces(piece(8, -8)), "an integer of bytes"),
    "piece_outside": (_pieces(piece(0, 8, "../../secret")), "'..' component"),
    "pieces_by_the_million": (_pieces("{}, " * 1_000_000), "at most 40,000 tables"),
    "pieces_as_numbers": (_pieces("1, " * 300_000), "at most 300,000 items"),
    "pieces_by_the_thousand": (_pieces(*_MANY * 2), "at most 40,000 tables"),
    "files_by_the_thousand": (b"[[artifact]]\n" * 300_000, "at most 50,000 files"),
    "tables_by_the_thousand": (b"[[artifacts]]\n" * 300_000, "at most 40,000 tables"),
    "alternatives_by_the_thousand": (
        manifest(more="[[artifact.alternative]]\nsize = 1\n" * 13_000),
        "more findings",
    ),
    "key_of_4_000_words": (b"a." * 4_000 + b"a = 1", "keys of at most 8 words"),
    "key_of_4_000_quoted_words": (b"'!'." * 4_000 + b'"\\u0061" = 1', "keys of at most 8 words"),
    "key_of_4_000_words_in_a_header": (b"[" + b"a . " * 4_000 + b"a]", "keys of at most 8 words"),
    "keys_of_many_words": (
        b"".join(b"a%d.b.c.d.e.f.g=1\n" % i for i in range(7_000)),
        "at most 40,000 tables",
    ),
    "arrays_100_000_deep": (b"x = " + b"[" * 30_000, "TOML"),
    "tables_100_000_deep": (b"x = " + b"{a=" * 30_000, "TOML"),
    "quotes_only": (b'"' * 3_000_000, "TOML"),
    "quotes_escaped": (b'x = """' + b'""\\"' * 900_000, "TOML"),
    "comments_of_megabytes": (b"#" * ((12 << 20) + 1), "at most 12,582,912 bytes"),
    "comments_of_emoji": ("# \N{GRINNING FACE}\r\n".encode() * 600_000, "at most 4,194,304 bytes"),
    "not_utf8": (b"\xff\xfe", "TOML"),
    "not_toml": (b"Access to model sesame/csm-1b is restricted.", "TOML"),
    "empty": (b"", "schema"),
}
