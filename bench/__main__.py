"""Run one of the benchmarks beside this file.

python -m bench NAME [options]
python -m bench --help            # the names, and what each one measures
"""

import importlib
import sys
from pathlib import Path

from cli import STATUS_MISTAKE, run_script

FOLDER = Path(__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("[a-z]*.py"))


def print_names() -> None:
    """Print each benchmark's name and the first line of its docstring."""
    print("python -m bench NAME [options]; NAME --help tells more\n")
    for name in NAMES:
        first_line = (FOLDER / f"{name}.py").read_text().splitlines()[0]
        print(f"{name:10} {first_line.strip(chr(34))}")


def main() -> None:
    """Run the benchmark that the first word of the command line names."""
    name = ""
    if len(sys.argv) > 1:
        name = sys.argv[1]
    if name in ("-h", "--help"):
        print_names()
        return
    if name not in NAMES:
        names = ", ".join(NAMES)
        print(f"python -m bench: error: no benchmark {name!r}; there are {names}", file=sys.stderr)
        raise SystemExit(STATUS_MISTAKE)

    module = importlib.import_module(f"bench.{name}")
    sys.argv = [f"python -m bench {name}", *sys.argv[2:]]
    run_script(module.main, module.Config)


main()
