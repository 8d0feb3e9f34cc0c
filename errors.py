"""The one exception that a script answers with a single line and exit status 2."""


class UsageError(ValueError):
    """A mistake that the user can mend. The message is one line: what was wrong, and what to do instead."""
