"""Imports go one way: who may import whom, and that the top holds what the house says."""

import ast
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parents[1]
SCRIPTS = ("collect", "train", "ablate", "diagnose", "evaluate", "features", "steer", "export")
ROOMS = ("kernels", "diffusion", "store", "analysis", "toy", "bench")
FOUNDATION = {"distributed", "errors"}
MODEL_SIDE = FOUNDATION | {"hook", "diffusion"}
SAE_SIDE = FOUNDATION | {"sae", "kernels"}

# who may import whom; the names are rooms, and modules at the top
ALLOWED = {
    "errors": set(),
    "distributed": {"errors"},
    "kernels": {"kernels"},
    "store": FOUNDATION | {"store"},
    "diffusion": FOUNDATION | {"diffusion", "store"},
    "hook": FOUNDATION | {"diffusion", "store"},
    "sae": FOUNDATION | {"kernels", "store"},
    "analysis": MODEL_SIDE | SAE_SIDE | {"analysis", "store"},
    "options": set(),
    "bundle": set(),
    "cli": FOUNDATION | {"options"},
    "script": MODEL_SIDE | SAE_SIDE | {"analysis", "store", "cli"},
    "toy": MODEL_SIDE | SAE_SIDE | {"analysis", "store", "cli", "toy"},
    "bench": MODEL_SIDE | SAE_SIDE | {"analysis", "store", "cli", "toy", "bench", "script"},
}
EXCEPTIONS = {("diagnose", "train")}  # diagnose.py predicts what train.py will do


def sources() -> dict[str, Path]:
    """{dotted module name: file} of the product."""
    paths = [*HERE.glob("*.py"), *(path for room in ROOMS for path in (HERE / room).rglob("*.py"))]
    files = {}
    for path in paths:
        parts = path.relative_to(HERE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name not in ("conftest", "test_kernels"):
            files[name] = path
    return files


def imported(path: Path, at_once: bool = False) -> set[str]:
    """Dotted names of what a file imports from the project; with `at_once` without what functions
    import when they run."""
    known = sources()
    found = set()
    tree = ast.parse(path.read_text())
    for node in tree.body if at_once else ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        found |= {name for name in names if name in known}
    return found


def group(module: str) -> str:
    top = module.split(".")[0]
    return "script" if top in SCRIPTS else top


@pytest.mark.parametrize("module", sorted(sources()))
def test_imports_go_one_way(module):
    for other in imported(sources()[module]):
        if other == module or (module, other) in EXCEPTIONS:
            continue
        assert group(other) in ALLOWED[group(module)], f"{module} imports {other}"


def needs(module: str) -> set[str]:
    """A module, and all that is imported of the project when it is, directly or not."""
    modules = {module}
    todo = [module]
    while todo:
        for other in imported(sources()[todo.pop()], at_once=True) - modules:
            modules.add(other)
            todo.append(other)
    return modules


def test_train_needs_few_files():
    """What a reader opens who wants to understand all of training, but for the kernels."""
    modules = {name for name in needs("train") if group(name) != "kernels"}
    assert len(modules) <= 13, sorted(modules)


def test_the_top_holds_what_the_house_says():
    top = {path.stem for path in HERE.glob("*.py")}
    assert top == {
        *SCRIPTS,
        "hook",
        "sae",
        "cli",
        "options",
        "bundle",
        "errors",
        "distributed",
        "test_kernels",
        "conftest",
    }
