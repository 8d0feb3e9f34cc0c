"""A dataclass as a command line: values, help, and one line for each mistake."""

import ast
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from options import fill_description, grouped_options, parse, suggest

ROOT = Path(__file__).parents[1]


@dataclass
class Base:
    # model
    name: str = "toy"
    """Load this model."""

    # hardware
    device: str = "auto"
    """Run here: 100 % of it."""


@dataclass
class Config(Base):
    # training
    k: list[int] = field(default_factory=lambda: [16])
    """Keep this many latents
    active per vector."""

    lr: float | None = None
    """Learn this fast. If not given, a rule decides."""

    kind: Literal["topk", "batchtopk"] = "topk"
    """Select latents like this."""

    # output
    size: tuple[int, int] | None = None
    """Draw this many rows and columns."""

    widths: tuple[int, ...] = (1, 2)
    """Try these widths."""

    seed: int = 0
    """Draw with this seed."""

    center: bool = True
    """Start b_dec at the median."""

    quiet: bool = False
    """Print nothing."""

    # model
    revision: str | None = None
    """Load this revision."""


@dataclass
class Command:
    command: Literal["draw", "train"]
    """Do this."""

    n: int = 1
    """So often."""


def options(line, cls=Config):
    return parse(cls, "x.py", line.split())


def mistake(capsys, line, cls=Config):
    """The line that a mistake prints; its status is 2, and nothing is printed to stdout."""
    with pytest.raises(SystemExit) as stop:
        options(line, cls)
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err.strip()


def test_values():
    """Lists, numbers, tuples, switches and positional arguments become the fields' types."""
    assert options("") == Config()
    assert options("--k 1 2 --lr 1e-3 --kind batchtopk --name a").k == [1, 2]
    assert options("--lr 1e-3").lr == 0.001
    assert options("--lr -1e39").lr == -1e39
    assert options("--size 3 4").size == (3, 4)
    assert options("--widths 5").widths == (5,)
    assert options("--quiet").quiet
    assert not options("--no_center").center
    assert options("draw --n 3", Command) == Command("draw", 3)


def test_repeating_a_list_appends_and_repeating_a_value_replaces():
    assert options("--k 16 --name a --k 32 64 --name=b --k=128") == Config("b", k=[16, 32, 64, 128])


def test_hyphens_and_underscores_are_the_same_in_names_alone():
    assert options("--no-center --name=a-b") == Config("a-b", center=False)


@pytest.mark.parametrize(
    "line, message",
    [
        ("--k x", "--k: expected a whole number, got 'x'"),
        ("--k", "--k: expected at least one argument"),
        ("--lr fast", "--lr: expected a number, got 'fast'"),
        (
            "--kind topkk",
            "--kind: expected one of topk, batchtopk; got 'topkk'; did you mean topk?",
        ),
        ("--devise cpu", "there is no option --devise; did you mean --device? (see --help)"),
        ("--visio a", "there is no option --visio; did you mean --revision? (see --help)"),
        ("--zzz", "there is no option --zzz (see --help)"),
        ("--nam a", "there is no option --nam; did you mean --name? (see --help)"),
        ("a.npy", "'a.npy' belongs to no option; write the option's name before it (see --help)"),
        ("--size 3", "--size: expected 2 arguments"),
    ],
)
def test_a_mistake_is_one_line(capsys, line, message):
    assert mistake(capsys, line) == f"x.py: error: {message}"


def test_a_missing_positional_argument(capsys):
    """Its choices are named, and the nearest right spelling."""
    assert "draw,train" in mistake(capsys, "", Command)
    assert "expected one of draw, train; got 'dra'; did you mean draw?" in mistake(
        capsys, "dra", Command
    )


def test_groups_follow_the_source_and_output_and_hardware_come_last():
    groups = {
        group: [option.field.name for option in options]
        for group, options in grouped_options(Config).items()
    }
    assert list(groups) == ["model", "training", "output", "hardware"]
    assert groups["model"] == ["name", "revision"]
    assert groups["training"] == ["k", "lr", "kind"]


@pytest.mark.parametrize("columns", [50, 80, 200])
def test_help_fits_the_terminal(monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit, match="0"):
        options("--help")
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= min(columns, 100)
    words = " ".join(text.split())
    assert "--k INT [INT ...] Keep this many latents active per vector. (default: 16)" in words
    assert "Run here: 100 % of it. (default: auto)" in words
    assert "(default: on; --no_center turns it off)" in words
    assert "--seed INT Draw with this seed. (default: 0)" in words
    assert "Print nothing. (default" not in words
    assert "Print nothing. --" not in words
    assert "None" not in words


def test_a_description_wraps_prose():
    text = "Do it.\n\n    python x.py --a\n\nReads   one file and\n        another\nThe end of\nit."
    assert fill_description(text, 24).splitlines() == [
        "Do it.", "", "    python x.py --a", "", "Reads   one file and", "        another", "The end of it.",
    ]  # fmt: skip
    assert fill_description(text, 80).splitlines()[4] == "Reads   one file and another"


def test_a_description_folds_what_is_indented():
    text = "Do it.\n\n    python x.py --a   # one command\n    python x.py --a b --bcd e\n    mean    one mean\n            of all\nEnd."
    assert fill_description(text, 24).splitlines() == [
        "Do it.", "", "    # one command", "    python x.py --a", "    python x.py --a b \\", "        --bcd e",
        "    mean    one mean of", "            all", "End.",
    ]  # fmt: skip
    assert fill_description(text, 80).splitlines()[2] == "    python x.py --a   # one command"


@pytest.mark.parametrize(
    "page", ["ablate", "collect", "diagnose", "train", "evaluate", "features", "steer", "export"]
)
def test_descriptions_fit_80_columns(page):
    docstring = ast.get_docstring(ast.parse((ROOT / f"{page}.py").read_text()))
    assert max(map(len, fill_description(docstring, 80).splitlines())) <= 80


def test_suggestions():
    """The nearest right spelling is suggested where one is near."""
    assert suggest("--steps", ["--num_steps", "--seed"]) == "; did you mean --num_steps?"
    assert suggest("--x", ["--k", "--seed"]) == ""
