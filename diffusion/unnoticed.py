"""What a user attached to a denoiser does not notice the calls that only find something out.

    with without_hooks(denoisers), processors_put_back(denoisers):
        ...                                       # a dry step, or a probe

A dry step and a probe run the denoiser more often than the user's pipeline does. A hook of the
user that counts the steps would count wrongly then, and so would an attention processor that
counts or stores, as those of prompt-to-prompt editing do.

These are not covered: hooks and state outside the denoisers (in a text encoder, or hooks that
PyTorch calls for all modules), and state of attention processors in NumPy arrays, in closures, in
global variables or in files.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from diffusion.locate import bare
from diffusion.signatures import unwrap

DEPTH = (
    8  # attributes and entries from a processor to what is still put back: a store of maps has 5
)
# Packages whose objects are left as they are, since they may lead to a whole model
LIBRARIES = ("builtins", "torch", "diffusers", "transformers", "tokenizers", "diffusion", "hook")


@contextmanager
def without_hooks(denoisers: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Take all forward hooks off the denoisers and their modules while the context lasts."""
    with ExitStack() as stack:
        for denoiser in denoisers:
            stack.enter_context(bare(denoiser))
        yield


@contextmanager
def processors_put_back(denoisers: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Give the denoisers' attention processors their present state back when the context ends.

    The state is what the attributes of a processor lead to: numbers, texts, lists, dicts, sets,
    tensors, and the attributes of further objects of the user's own. Tensors are copied meanwhile;
    weights (`torch.nn.Parameter`) are not, since no forward changes them.
    """
    saved = {}
    for denoiser in denoisers:
        for processor in processors_in(unwrap(denoiser)):
            save_state(vars(processor), saved, DEPTH)
    try:
        yield
    finally:
        for value, contents in saved.values():
            put_back(value, contents)


def processors_in(root: torch.nn.Module) -> list:
    """Return the attention processors of a module and of all below it, if they have attributes.

    It reads the modules' own dicts, since this runs before every forward that is recorded: it takes
    0.3 ms for 253 modules, and with `modules()` and `getattr` it takes 1.2 ms.
    """
    processors = []
    waiting = [root]
    while waiting:
        module = waiting.pop()
        children = module._modules
        processor = vars(module).get("processor") or children.get("processor")
        if getattr(processor, "__dict__", None):
            processors.append(processor)
        waiting += [child for child in children.values() if child is not None]
    return processors


def save_state(value: Any, saved: dict[int, tuple[Any, Any]], depth: int) -> None:
    """Add the contents of `value`, and of all that it leads to, to `saved`.

    saved: {id of an object: (the object, a copy of its contents)}, of tensors, dicts, lists and
    sets. depth: how many attributes and entries further it goes.
    """
    if depth == 0 or id(value) in saved:
        return
    if torch.is_tensor(value):
        if not isinstance(value, torch.nn.Parameter):
            saved[id(value)] = (value, value.detach().clone())
        return
    if isinstance(value, dict):
        saved[id(value)] = (value, dict(value))
        entries = list(value.values())
    elif isinstance(value, (list, set)):
        saved[id(value)] = (value, list(value))
        entries = list(value)
    elif isinstance(value, tuple):
        entries = value
    elif is_of_the_user(value):
        entries = [vars(value)]
    else:
        return
    for entry in entries:
        save_state(entry, saved, depth - 1)


def is_of_the_user(value: Any) -> bool:
    """Return whether an object has attributes and its class is the user's own, not a library's.

    False for modules of a network, classes and functions.
    """
    if isinstance(value, (type, torch.nn.Module)):
        return False
    library = type(value).__module__.partition(".")[0]
    return hasattr(value, "__dict__") and library not in LIBRARIES


def put_back(value: Any, contents: Any) -> None:
    """Give a tensor, dict, list or set its saved contents back, in place, where they changed."""
    if torch.is_tensor(value):
        if not torch.equal(value, contents):
            with torch.no_grad():
                value.copy_(contents)
    elif isinstance(value, dict):
        unchanged = list(value) == list(contents)
        if not unchanged or any(value[key] is not contents[key] for key in contents):
            value.clear()
            value.update(contents)
    elif isinstance(value, set):
        value.clear()
        value.update(contents)
    else:
        value[:] = contents
