"""The one exception that a script answers with a single line and exit status 2."""

from collections.abc import Iterable


class UsageError(ValueError):
    """A mistake that the user can mend.

    The message is one line: what was wrong, what is allowed, and what to do.
    """


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise UsageError if the value of the option `name` is none of the choices.

    check_choice("rows", "all", ("cond", "uncond")) says "rows: expected cond, uncond, got 'all'".
    """
    if value not in choices:
        raise UsageError(f"{name}: expected {', '.join(choices)}, got {value!r}")
