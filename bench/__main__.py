"""python -m bench NAME [options]: run one of the benchmarks beside this file."""

import importlib
import sys
from pathlib import Path

from cli import run_script

NAMES = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))
name = sys.argv[1] if len(sys.argv) > 1 else ""
if name in ("-h", "--help"):
    print("python -m bench NAME [options]; NAME --help tells more\n")
    for name in NAMES:
        first = (Path(__file__).parent / f"{name}.py").read_text().splitlines()[0]
        print(f"{name:10} {first.strip(chr(34))}")
    raise SystemExit(0)
if name not in NAMES:
    print(
        f"python -m bench: error: no benchmark {name!r}; there are {', '.join(NAMES)}",
        file=sys.stderr,
    )
    raise SystemExit(2)
module = importlib.import_module(f"bench.{sys.argv.pop(1)}")
sys.argv[0] = f"python -m bench {name}"
run_script(module.main, module.Config)
