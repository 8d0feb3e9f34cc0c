"""Give way to Hugging Face's package `kernels`, which has this folder's name.

transformers imports that package where it is installed. Python started in a checkout would find
this folder instead, and transformers would fail. So `kernels/__init__.py` looks up in the package
whatever this folder does not have: modules along `folders()`, names by `attribute`.
"""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
OTHER_PATHS = [path for path in sys.path if Path(path).resolve() != CHECKOUT]
SPEC = PathFinder.find_spec("kernels", OTHER_PATHS)  # None if the package is not installed


def folders() -> list[str]:
    """Return the folders of the package's modules; an empty list if it is not installed."""
    if SPEC is None or SPEC.submodule_search_locations is None:
        return []
    return list(SPEC.submodule_search_locations)


def attribute(name: str) -> Any:
    """Return what the package holds under a name.

    Raises AttributeError if it does not hold it, or if the package is not installed.
    """
    if SPEC is None or SPEC.loader is None or name.startswith("__"):
        raise AttributeError(f"module 'kernels' has no attribute {name!r}")
    module = module_from_spec(SPEC)
    SPEC.loader.exec_module(module)
    return getattr(module, name)
