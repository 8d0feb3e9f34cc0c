"""Turn a dataclass into a command line: its fields are the options, their docstrings the help.

    @dataclass
    class Config:
        # training
        k: list[int] = field(default_factory=lambda: [16])
        \"\"\"Keep this many latents active per vector.\"\"\"

    parse(Config, "train.py", ["--k", "16", "32"])        # Config(k=[16, 32])

A field without a default is a positional argument. A comment line between fields opens a group of
the help; a base class and its child add to the same group when they use the same words. A list
takes its values with spaces between them, and a repeated option appends to it. `--no_center` turns
off what `--center` turns on. `--out-dir` is the same as `--out_dir`.

argparse does the parsing; this page tells it what the dataclass says. Nothing here imports torch,
so `--help` and a mistyped option are answered at once.
"""

import argparse
import ast
import dataclasses
import difflib
import inspect
import re
import shutil
import sys
import textwrap
from collections.abc import Callable
from types import UnionType
from typing import Any, Literal, NamedTuple, NoReturn, Union, get_args, get_origin, get_type_hints

LAST_GROUPS = ["output", "hardware"]  # these stand last in the help, whichever class opens them
HELP_INDENT = 8  # characters; the help of an option stands below its name
WIDEST_HELP = 100  # characters of a line, if the terminal is not narrower
SHORTEST_FRAGMENT = 4  # characters; `--steps` stands for every option whose name contains it

Converter = Callable[[str], Any]
"""Turns one word of the command line into a value; raises ArgumentTypeError if it can't."""


def parse(Config: type, program: str, words: list[str]) -> Any:
    """Return the `Config` that the words of a command line ask for.

    Exits with status 0 after `--help`, and with status 2 after one line on stderr for a mistake.
    """
    parser = make_parser(Config, program)
    values, unknown = parser.parse_known_args([with_underscores(word) for word in words])
    if unknown:
        parser.error(describe_unknown(unknown[0], parser))

    given = vars(values)
    for name, hint in get_type_hints(Config).items():
        if name in given and get_origin(without_none(hint)) is tuple:
            given[name] = tuple(given[name])
    return Config(**given)


def with_underscores(word: str) -> str:
    """Return a word of the command line with the underscores of an option's name.

    `--out-dir=a-b` becomes `--out_dir=a-b`; a word that names no option stays as it is.
    """
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    return "--" + name.replace("-", "_") + equals + value


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line that begins with `<program>: error:`."""

    def error(self, message: str) -> NoReturn:
        # "argument --k: expected ..." is argparse's way to say which option it means
        message = re.sub(r"^argument (--\w+)\S*: ", r"\1: ", message)
        self.exit(2, f"{self.prog}: error: {message}\n")

    def option_names(self) -> list[str]:
        """Return the names of all options, without the short ones: ["--k", "--lr", ...]."""
        names = []
        for action in self._actions:
            names += [name for name in action.option_strings if name.startswith("--")]
        return names


def make_parser(Config: type, program: str) -> Parser:
    """Return the parser of a dataclass's fields, with a help that is as wide as the terminal."""
    width = min(WIDEST_HELP, shutil.get_terminal_size().columns)
    positional = [f for f in dataclasses.fields(Config) if default_of(f) is dataclasses.MISSING]
    parser = Parser(
        prog=program,
        usage=" ".join([program, *(field.name for field in positional), "[options]"]),
        description=fill_description(sys.modules[Config.__module__].__doc__ or "", width),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=HELP_INDENT, width=width
        ),
        add_help=False,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,  # the dataclass knows the defaults
    )
    # also "-1e39" and "-inf" are numbers; argparse would take them for options
    parser._negative_number_matcher = re.compile(r"^-(\d|\.\d|inf|nan)")

    hints = get_type_hints(Config)
    for group, options in grouped_options(Config).items():
        section = parser.add_argument_group(group)
        for option in options:
            add_option(section, option.field, without_none(hints[option.field.name]), option.help)
    parser.add_argument_group("help").add_argument(
        "-h", "--help", action="help", help="Show this text and exit."
    )
    return parser


def add_option(group: Any, field: dataclasses.Field, hint: Any, help: str) -> None:
    """Add one field to a group of the parser; `hint` is its type, None left out."""
    help = (help + describe_default(field)).replace("%", "%%")  # argparse formats with %
    is_positional = default_of(field) is dataclasses.MISSING
    name = field.name if is_positional else f"--{field.name}"

    if hint is bool:
        group.add_argument(name, action="store_true", help=help)
        group.add_argument(
            f"--no_{field.name}", dest=field.name, action="store_false", help=argparse.SUPPRESS
        )
        return

    if get_origin(hint) in (list, tuple):
        element, *others = get_args(hint)
        has_fixed_length = others and others != [...]
        nargs = len(get_args(hint)) if has_fixed_length else "+"
        metavar = metavar_of(element)
        group.add_argument(
            name, action="extend", nargs=nargs, type=converter(element), metavar=metavar, help=help
        )
        return

    group.add_argument(name, type=converter(hint), metavar=metavar_of(hint), help=help)


def default_of(field: dataclasses.Field) -> Any:
    """Return the default of a field, or dataclasses.MISSING if it has none."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def describe_default(field: dataclasses.Field) -> str:
    """Return the end of an option's help, such as ` (default: 16)`.

    It is "" where there is no default to show: for None, where the help itself says what happens
    without the option, for an option that is off, for an empty text or list, and for a positional
    argument.
    """
    default = default_of(field)
    if isinstance(default, (list, tuple)):
        default = " ".join(str(value) for value in default)
    if default is True:
        return f" (default: on; --no_{field.name} turns it off)"
    # by identity: 0 == False, and a default of 0 is shown
    if default is None or default is False or default is dataclasses.MISSING or default == "":
        return ""
    return f" (default: {default})"


def without_none(hint: Any) -> Any:
    """Return a type without None: `int | None` becomes int; other types stay as they are."""
    if get_origin(hint) in (Union, UnionType):
        [hint] = [member for member in get_args(hint) if member is not type(None)]
    return hint


def metavar_of(hint: Any) -> str:
    """Return how the help writes a value of a type: INT, FLOAT, TEXT or {one,two}."""
    if get_origin(hint) is Literal:
        return "{" + ",".join(str(choice) for choice in get_args(hint)) + "}"
    return {int: "INT", float: "FLOAT", str: "TEXT"}[hint]


def converter(hint: Any) -> Converter:
    """Return the function that turns a word into a value of a type: int, float, str or Literal."""
    if get_origin(hint) is Literal:
        return one_of(get_args(hint))
    return {int: whole_number, float: number, str: str}[hint]


def whole_number(word: str) -> int:
    """Return the integer that a word spells: "1_000" and "1000" give 1000."""
    try:
        return int(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {word!r}") from None


def number(word: str) -> float:
    """Return the number that a word spells: "1e-3" gives 0.001."""
    try:
        return float(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {word!r}") from None


def one_of(choices: tuple[str, ...]) -> Converter:
    """Return a converter that returns a word if it is among `choices`, and refuses all others."""

    def choice(word: str) -> str:
        if word in choices:
            return word
        allowed = ", ".join(choices)
        raise argparse.ArgumentTypeError(
            f"expected one of {allowed}; got {word!r}{suggest(word, choices)}"
        )

    return choice


def describe_unknown(word: str, parser: Parser) -> str:
    """Return what is wrong with a word that belongs to no option, and which option may be meant."""
    if not word.startswith("-"):
        return f"{word!r} belongs to no option; write the option's name before it (see --help)"
    name = word.partition("=")[0]
    return f"there is no option {name}{suggest(name, parser.option_names())} (see --help)"


def suggest(word: str, choices: list[str] | tuple[str, ...]) -> str:
    """Return `; did you mean --k?` for the nearest choices, or "" if none resembles the word."""
    bare = word.strip("-")
    spelled = {choice.strip("-"): choice for choice in choices}
    nearest = difflib.get_close_matches(bare, spelled, n=1, cutoff=0.8)
    if not nearest and len(bare) >= SHORTEST_FRAGMENT:
        nearest = [name for name in spelled if bare in name]
    if not nearest:
        nearest = difflib.get_close_matches(bare, spelled, n=1, cutoff=0.6)
    if not nearest:
        return ""
    return f"; did you mean {' or '.join(spelled[name] for name in nearest[:3])}?"


class Option(NamedTuple):
    """A field of a dataclass and its docstring."""

    field: dataclasses.Field
    help: str


def grouped_options(Config: type) -> dict[str, list[Option]]:
    """Return {group: its options} in the order of the help; a child's fields follow its base's."""
    fields = {field.name: field for field in dataclasses.fields(Config)}
    groups: dict[str, list[Option]] = {}
    for cls in reversed(Config.__mro__):
        for name, (group, help) in read_fields(cls).items():
            if name in fields:
                options = groups.setdefault(group, [])
                options.append(Option(fields.pop(name), help))
    for field in fields.values():  # of a class whose source can't be read
        groups.setdefault("options", []).append(Option(field, ""))

    for name in LAST_GROUPS:
        if name in groups:
            groups[name] = groups.pop(name)
    return groups


def read_fields(cls: type) -> dict[str, tuple[str, str]]:
    """Return {field: (group, docstring)} from a class's source; {} if there is none to read."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):  # a class made by exec, or a built-in such as object
        return {}
    [definition] = ast.parse(source).body
    lines = source.splitlines()

    described = {}
    group = "options"
    last_line = definition.lineno
    for statement, following in zip(definition.body, [*definition.body[1:], None]):
        for line in lines[last_line : statement.lineno - 1]:
            if line.startswith("    # "):
                group = line.strip("# ")
        last_line = statement.end_lineno
        if isinstance(statement, ast.AnnAssign):
            described[statement.target.id] = (group, docstring_of(following))
    return described


def docstring_of(statement: ast.stmt | None) -> str:
    """Return the text of a statement that is only a string, as one line; else ""."""
    is_text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    if not is_text or not isinstance(statement.value.value, str):
        return ""
    return " ".join(statement.value.value.split())


def fill_description(docstring: str, width: int) -> str:
    """Return a module's docstring with lines of at most `width` characters.

    Prose is wrapped. A line like `Reads   .npy files`, indented or not, and the lines below it that
    begin at its second column are wrapped at that column. A command that is too long continues on
    the next line, and the comment behind it goes above it.
    """
    items: list[tuple[str, str]] = []  # (what its further lines begin with, text)
    may_continue = False
    for line in inspect.cleandoc(docstring).splitlines():
        text = line.strip()
        indent = " " * (len(line) - len(line.lstrip()))
        heading = re.match(r" *\S+( \S+)* {2,}(?=[^\s#])", line)
        if text and may_continue and indent == items[-1][0]:
            items[-1] = (indent, f"{items[-1][1]} {text}")
        elif heading:
            items.append((" " * heading.end(), line))
            may_continue = True
        else:
            items.append(("", line))
            may_continue = bool(text) and not indent

    filled = []
    for indent, text in items:
        is_command = text.startswith(" ") and not indent
        if len(text) <= width:
            filled.append(text)
        elif is_command:
            filled += fold_command(text, width)
        else:
            filled += wrap(text, width, indent)
    return "\n".join(filled)


def fold_command(line: str, width: int) -> list[str]:
    """Return an indented command as lines of at most `width` characters.

    The line `    python x.py --k 16   # one` becomes `    # one` and `    python x.py --k 16`. A
    command that is still too long is continued before an option, a line of Python behind a comma.
    """
    command, _, comment = line.rstrip().partition("  # ")
    indent = " " * (len(line) - len(line.lstrip()))
    folded = wrap(f"{indent}# {comment}", width, f"{indent}# ") if comment else []

    is_shell = command.split()[0] in ("python", "torchrun", "pip")
    end = " \\" if is_shell else ""
    first, *others = re.split(r" (?=--)" if is_shell else r"(?<=,) ", command.rstrip())
    lines = [first]
    for piece in others:
        if len(f"{lines[-1]} {piece}{end}") <= width:
            lines[-1] += f" {piece}"
        else:
            lines[-1] += end
            lines.append(f"{indent}    {piece}")
    return folded + lines


def wrap(text: str, width: int, indent: str) -> list[str]:
    """Return a text as lines of at most `width` characters, all but the first behind `indent`.

    Words are never cut.
    """
    return textwrap.wrap(
        text, width, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )
