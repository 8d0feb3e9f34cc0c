"""Put a script and the modules that it needs from this repository into one file.

    python bundle.py train.py         # dist/train.py
    python bundle.py                  # all scripts, hook.py and sae.py

The file runs in an empty folder if the packages of requirements.txt are
installed, and with `uv run dist/train.py`, which installs them itself. It
contains, in this order: a PEP 723 block that names the packages, the source of
each module, and the script's own text, unchanged. The toy model is not in the
file; without a checkout, give `--model_name`.
"""

import argparse
import ast
import json
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent
BUNDLED = (
    "ablate.py",
    "collect.py",
    "diagnose.py",
    "train.py",
    "evaluate.py",
    "features.py",
    "steer.py",
    "export.py",
    "hook.py",
    "sae.py",
)
TEXTS = {"features": ["analysis/features.html"]}  # files that a module reads, besides modules

# What stands before the modules. A module's source runs when something is first taken from it:
# so `--help` does not wait for torch, and the order of the modules does not matter.
LOADER = '''
import linecache
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path


class Embedded(types.ModuleType):
    """A module of the repository whose source stands in this file."""

    def __init__(self, name, path, source):
        super().__init__(name)
        self.__file__ = path
        self.__spec__ = ModuleSpec(name, None, origin=path)
        self.__path__ = []
        self.__package__ = name if path.endswith("__init__.py") else name.rpartition(".")[0]
        self.__source__ = source

    def __getattr__(self, name):
        source = self.__dict__.pop("__source__", None)
        if source is not None:
            exec(compile(source, self.__file__, "exec"), self.__dict__)
            return getattr(self, name)
        submodule = sys.modules.get(f"{self.__name__}.{name}")
        if submodule is None:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return submodule


def embed(name, path, source):
    """Make a module importable; linecache finds its lines, which Triton compiles from source."""
    path = str(Path(__file__).resolve().parent / path)
    linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)
    if name is None:
        return
    present = sys.modules.setdefault(name, Embedded(name, path, source))
    if type(present).__name__ != "Embedded":
        message = f"{__file__} brings a module {name!r}, and another one is imported already"
        raise ImportError(message)
'''


def path_of(module: str) -> Path | None:
    """Return the file of a dotted name in this repository: "store.disk" gives store/disk.py, or
    None."""
    base = ROOT / module.replace(".", "/")
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


def imported_by(path: Path) -> set[str]:
    """Return the dotted names of the repository's modules that a file imports, in functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if path_of(name)}


def needed_by(script: str) -> list[str]:
    """Return all modules that a script needs from this repository, directly or not, sorted by
    name."""
    needed: set[str] = set()
    todo = imported_by(ROOT / script)
    while todo:
        module = todo.pop()
        needed.add(module)
        todo |= imported_by(path_of(module)) - needed
    return sorted(needed)


def embedded(module: str | None, path: str, source: str) -> str:
    """Return one call of `embed`, with the source as a raw string that can be read and searched."""
    if "'''" in source or source.endswith("\\"):
        raise SystemExit(f"bundle.py: error: {path} contains ''' or ends with a backslash")
    return f"embed({module!r}, {path!r}, r'''{source}''')\n"


def bundle(script: str) -> str:
    """Return the text of the one file."""
    packages = (ROOT / "requirements.txt").read_text().split("\n")
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()

    lines = ["# /// script", '# requires-python = ">=3.10"', "# dependencies = ["]
    lines += [f"#     {json.dumps(package)}," for package in packages if package]
    lines += ["# ]", "# ///"]
    lines += [f"# {script} in one file, made by `python bundle.py {script}`."]
    lines += [f"# Commit: {commit or 'unknown'}"]
    text = "\n".join(lines) + "\n" + LOADER + "\n\n"

    modules = needed_by(script)
    for package in sorted({module.partition(".")[0] for module in modules if "." in module}):
        if path_of(package) is None:  # a folder without __init__.py
            text += embedded(package, f"{package}/__init__.py", "")
    for module in modules:
        path = path_of(module)
        text += embedded(module, str(path.relative_to(ROOT)), path.read_text())
    for module in [*modules, Path(script).stem]:
        for path in TEXTS.get(module, []):
            text += embedded(None, path, (ROOT / path).read_text())

    # the script's docstring is not the file's first statement, so it would not be the `__doc__`
    rule = "# " + "-" * 96
    return f"{text}\n\n{rule}\n# {script}\n{rule}\n__doc__ = {(ROOT / script).read_text()}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scripts", nargs="*", metavar="SCRIPT", help="Bundle these; all if none.")
    parser.add_argument("--out_dir", default="dist", help="Write into this folder (default: dist).")
    args = parser.parse_args()
    for script in args.scripts:
        if script not in BUNDLED:
            parser.error(f"{script}: expected one of {', '.join(BUNDLED)}")

    folder = Path(args.out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for script in args.scripts or BUNDLED:
        path = folder / script
        path.write_text(bundle(script))
        print(f"{path}  {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
