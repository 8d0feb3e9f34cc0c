"""What a user reads: UsageError, which a script answers with one line and exit status 2; and small
numbers that do not look like zero."""

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


def decimals(value: float, digits: int) -> str:
    """Return a number with so many digits after the point; a smaller one keeps two of its digits.

    With 3 digits, 0.1234 gives "0.123" and 0.00002 gives "2e-05", not "0.000". Thousands have a
    comma: "1,234.500".
    """
    text = f"{value:,.{digits}f}"
    if value != 0 and not text.strip("-0."):
        return f"{value:.2g}"
    return text
