"""Hugging Face's package `kernels`, which has this folder's name.

transformers imports from it where it is installed. Python started in a checkout would find this
folder instead and fail, so whatever is not here is looked up there.
"""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
SPEC = PathFinder.find_spec(
    "kernels", [path for path in sys.path if Path(path).resolve() != CHECKOUT]
)


def folders():
    """Where its modules are: a list of paths, empty where it is not installed."""
    return list(SPEC.submodule_search_locations or []) if SPEC is not None else []


def attribute(name):
    """What it holds under a name. Raises AttributeError if that is not there, or it is not
    installed."""
    if SPEC is None or SPEC.loader is None or name.startswith("__"):
        raise AttributeError(f"module 'kernels' has no attribute {name!r}")
    module = module_from_spec(SPEC)
    SPEC.loader.exec_module(module)
    return getattr(module, name)
