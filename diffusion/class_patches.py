"""Replace a method of a class for a while, also if several ask for it and end in any order.

A sampling watches a scheduler by replacing `step` of its class. The class is patched and not the
object, since some pipelines step a copy of their scheduler, which they make while they run.

Two samplings may watch at once, in nested contexts or in two threads, and the first that began may
be the first that ends. If each put back what it had met, the class would end up wrong:

    A begins    step = A(original)       A met the original
    B begins    step = B(A(original))    B met A(original)
    A ends      step = original          B is watching, and no longer called
    B ends      step = A(original)       A has ended, and is called for ever

So one record per method counts who asks for it, and rebuilds the method at each change:

    A begins    step = A(original)
    B begins    step = B(A(original))
    A ends      step = B(original)
    B ends      step = original, and the record is deleted
"""

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

MakeReplacement = Callable[[Callable], Callable]
"""make(function) -> the function that takes its place, and that usually calls it."""


@dataclass
class Patch:
    """A method that is replaced at present."""

    in_class: Any
    """What the class itself holds under this name; None if it inherits the method."""

    original: Callable
    """The method that the class has without any replacement, its own or inherited."""

    makers: list[MakeReplacement]
    """Those who ask for a replacement, in the order in which they asked."""


PATCHES: dict[tuple[type, str], Patch] = {}
PATCHING = threading.Lock()


@contextmanager
def patched(cls: type, name: str, make: MakeReplacement) -> Iterator[None]:
    """Replace the method `name` of the class by `make(method)` while the context lasts.

    The signature stays the same. When the last context for this method has ended, the class is
    exactly as it was before the first.
    """
    key = cls, name
    with PATCHING:
        if key not in PATCHES:
            PATCHES[key] = Patch(vars(cls).get(name), getattr(cls, name), [])
        patch = PATCHES[key]
        patch.makers.append(make)
        apply_patch(cls, name, patch)
    try:
        yield
    finally:
        with PATCHING:
            patch.makers.remove(make)
            if patch.makers:
                apply_patch(cls, name, patch)
            else:
                del PATCHES[key]
                restore(cls, name, patch)


def apply_patch(cls: type, name: str, patch: Patch) -> None:
    """Put `makers[-1](... makers[0](original))` into the class, with the original's signature.

    There must be at least one maker; without any, `restore` is for the class.
    """
    function = patch.original
    for make in patch.makers:
        function = make(function)
        function.__signature__ = inspect.signature(patch.original)  # the next maker may read it
        function.__wrapped__ = patch.original
    setattr(cls, name, function)


def restore(cls: type, name: str, patch: Patch) -> None:
    """Put the class's own method back. If the class had none, delete the replacement, so that the
    class inherits the method again."""
    if patch.in_class is not None:
        setattr(cls, name, patch.in_class)
    else:
        delattr(cls, name)
