"""Functions that note how they are called, in the place of the real ones."""

import functools


def note_calls(patch, owner, name, note):
    """Let each call of `owner.name` append `note(*args, **options)` to a list, before it is made.

    patch: a pytest MonkeyPatch, which undoes it. Returns the list. For example
    `sizes = note_calls(monkeypatch, os, "write", lambda file, data: len(data))`.
    """
    notes = []
    real = getattr(owner, name)

    @functools.wraps(real)
    def noted(*args, **options):
        notes.append(note(*args, **options))
        return real(*args, **options)

    patch.setattr(owner, name, noted)
    return notes
