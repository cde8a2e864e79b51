"""Make: its variables are data, say what they mean, and its users are told make's commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.clone import BIN, Clone


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A clone with csm-tiny installed."""
    clone = Clone.make(tmp_path_factory.mktemp("make") / "clone")
    assert clone.make_target("weights", "MODEL=csm-tiny", "SMOKE=0").returncode == 0
    return clone


TEXTS = ["$(shell touch {0})", "`touch {0}`", "'; touch {0}; '", '"$(touch {0})"', "$$(touch {0})"]


@pytest.mark.parametrize("text", TEXTS)
def test_values_are_data(clone: Clone, tmp_path: Path, text: str) -> None:
    """Nothing in a value of a variable is run, whether it is given as an argument or exported."""
    mark = tmp_path / "mark"
    names = ("MODEL", "ONLY", "DEST", "SOURCE", "URL", "REVISION")
    values = {name: text.format(mark) for name in names}
    given = clone.make_target("status", *(f"{name}={values[name]}" for name in names))
    exported = clone.run("make", "status", env=values)
    assert [given.returncode, exported.returncode] == [2, 2]
    assert "no source called" in given.stderr and "no source called" in exported.stderr
    assert not mark.exists()


def test_sources_and_limits_are_passed_on(clone: Clone) -> None:
    """CACHE= and URL= may name several; LIMIT_RATE= goes to what downloads."""
    plan = clone.make_target("--dry-run", "weights", "CACHE=/a /b", "LIMIT_RATE=20M").stdout
    assert plan.count("--cache '/a' --cache '/b'") == 2
    assert plan.count("--limit-rate '20M'") == 1


def test_a_fleet_gets_its_options_and_a_page(clone: Clone) -> None:
    """NODES=, DIR= and REPORT= go to inv fleet; what is not named stays away."""
    words = ("NODES=3", "DIR=$TMPDIR/m", "REPORT=page.html")
    plan = clone.make_target("--dry-run", "fleet", *words).stdout
    assert "--nodes '3'" in plan and "--report 'page.html'" in plan
    assert "--dir '$TMPDIR/m'" in plan and "--address" not in plan


def test_a_folder_may_have_any_name(clone: Clone, tmp_path: Path) -> None:
    """Quotes, spaces, dollars and backslashes in DEST are part of the folder's name."""
    folder = tmp_path / "o'neil's \"$HOME\" (1) \\ #%"
    result = clone.make_target("weights", "MODEL=csm-tiny", "SMOKE=0", f"DEST={folder}")
    assert result.returncode == 0, result.stderr
    assert (folder / "model.safetensors").is_file()


@pytest.mark.parametrize("value", ["0", "no", "false", "off", "False"])
def test_smoke_off_by_any_word(clone: Clone, value: str) -> None:
    """SMOKE=0 and its like leave the smoke test out."""
    result = clone.make_target("weights", "MODEL=csm-tiny", f"SMOKE={value}")
    assert (result.returncode, "smoke test" in result.stdout) == (0, False)


@pytest.mark.parametrize("value", ["1", "yes", "true", "on"])
def test_switches_on_by_any_word(clone: Clone, value: str) -> None:
    """CONSUME=1 and SEAL=1 and their like are passed on as the switches that they name."""
    plan = clone.make_target("--dry-run", "weights", f"CONSUME={value}", f"SEAL={value}").stdout
    assert plan.count("--consume") == 2 and "--seal" in plan
    plan = clone.make_target("--dry-run", "weights", "CONSUME=0", "SEAL=no").stdout
    assert "--consume" not in plan and "--seal" not in plan


@pytest.mark.parametrize(
    ("variable", "said"),
    [
        ("SMOKE=maybe", "say SMOKE=1 or SMOKE=0"),
        ("CONSUME=yes please", "say CONSUME=1 or CONSUME=0"),
        ("SORCE=hf", "there is no variable SORCE"),
        ("MODEL=csm-tinny", "did you mean csm-tiny?"),
        ("SOURCE=huggingface", "did you mean hf?"),
        ("MODEL=a\nb", "MODEL has a line end"),
    ],
)
def test_an_unknown_value_is_refused(clone: Clone, variable: str, said: str) -> None:
    """What no variable is called, and no variable can be, is told and nothing is done."""
    result = clone.make_target("status", variable)
    assert (result.returncode, said in " ".join(result.stderr.split())) == (2, True)


def test_make_users_are_told_make_commands(clone: Clone) -> None:
    """Commands and options in messages are make's for those who use it, and inv's for others."""
    by_make, by_inv = clone.make_target("weights"), clone.inv("weights")
    assert "make weights SOURCE=hf" in by_make.stderr
    assert "inv " not in by_make.stderr.replace(".venv/bin/inv ", "")
    assert "inv weights --source=hf" in by_inv.stderr
    assert "make " not in by_inv.stderr
    refused = clone.make_target("fetch", "SOURCE=mirror")
    assert "SOURCE=mirror needs URL=" in refused.stderr


def test_help_fits_a_terminal(clone: Clone) -> None:
    """No line of `make help` has more than 80 columns."""
    lines = clone.make_target("help").stdout.splitlines()
    assert len(lines) > 30 and [line for line in lines if len(line) > 80] == []


@pytest.mark.parametrize("target", ["identify", "convert", "split"])
def test_a_file_is_no_option(clone: Clone, target: str) -> None:
    """A value of FILE that looks like an option is the name of a file."""
    result = clone.make_target(target, "FILE=--dry=a file", "TO=original", "OUT=there")
    assert (result.returncode, "missing: --dry=a file\n" in result.stderr) == (2, True)


def test_a_page_without_a_name_is_asked_for_in_makes_words(clone: Clone) -> None:
    """`make report` names the variable, and not the option that make gives to inv."""
    error = clone.make_target("report").stderr
    assert "report needs OUT" in error and "--html" not in error


def test_a_text_is_no_option(clone: Clone) -> None:
    """Nor are a value of TEXT and one of OUT: the run ends later, for want of a tokenizer."""
    result = clone.make_target("speak", "MODEL=csm-tiny", "TEXT=--speaker=1", "OUT=--seed=1")
    assert (result.returncode, "text needs a tokenizer" in result.stderr) == (2, True)


def test_nothing_is_said_of_what_is_up_to_date(clone: Clone) -> None:
    """A second run says nothing of make's own files, and nothing twice."""
    result = clone.make_target("weights", "MODEL=csm-tiny", "SMOKE=0")
    assert "up to date" not in result.stdout + result.stderr
    lines = [line for line in result.stdout.splitlines() if line.strip()]
    assert len(lines) == len(set(lines))


def test_a_moved_clone_says_what_to_do(tmp_path: Path) -> None:
    """A virtual environment whose programs name a Python that has gone is to be made anew."""
    clone = Clone.make(tmp_path / "clone")
    programs = clone.root / ".venv" / "bin"
    programs.unlink()
    programs.mkdir()
    (programs / "inv").write_text(f"#!{tmp_path}/before/.venv/bin/python\n")
    (programs / "inv").chmod(0o755)
    (programs / "python").symlink_to(BIN / "python")
    result = clone.make_target("status", "MODEL=csm-tiny")
    assert result.returncode == 2
    assert "moved or renamed" in result.stderr
    assert "Remove .venv and run the same command again" in result.stderr


def test_what_speaking_takes_comes_by_make(clone: Clone) -> None:
    """WITH=speak brings tokenizer and codec, REPORT writes the page, and make speak is next."""
    words = ("MODEL=csm-tiny", "SMOKE=0", "WITH=speak", "REPORT=page.html")
    done = clone.make_target("weights", *words)
    assert done.returncode == 0, done.stderr
    assert "make speak TEXT=Hello OUT=hello.wav MODEL=csm-tiny" in done.stdout
    assert (clone.root / "models" / "mimi-tiny" / "tokenizer.json").is_file()
    assert "mimi-tiny: tokenizer.json" in (clone.root / "page.html").read_text(encoding="utf-8")
