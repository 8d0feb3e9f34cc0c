"""python -m bench NAME [options]: run one of the benchmarks beside this file."""

import importlib
import sys
from pathlib import Path

from cli import run

NAMES = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))

if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
    print(f"usage: python -m bench {{{','.join(NAMES)}}} [--help]", file=sys.stderr)
    raise SystemExit(2)
module = importlib.import_module(f"bench.{sys.argv.pop(1)}")
sys.modules["__main__"].__doc__ = module.__doc__
run(module.main, module.Config)
