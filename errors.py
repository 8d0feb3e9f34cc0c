"""The one exception that a script answers with a single line and exit status 2."""

from collections.abc import Iterable


class UsageError(ValueError):
    """A mistake that the user can mend. The message is one line: what was wrong, and what to do
    instead."""


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise UsageError where the value of the option `name` is none of the choices."""
    if value not in choices:
        raise UsageError(f"{name}: expected {', '.join(choices)}, got {value!r}")
