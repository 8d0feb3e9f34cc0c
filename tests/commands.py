"""The scripts as a user runs them: command lines, their status, and what they print."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_script(*words, cwd, timeout=120, **environment):
    """Run `python <words>` in the folder `cwd`; words[0] is a script of this repository, such as train.py.

    environment: variables beside those of this process. Returns a CompletedProcess with returncode, stdout, stderr (text).
    """
    words = [str(ROOT / words[0]), *map(str, words[1:])]
    environment = {**os.environ, **environment}
    return subprocess.run([sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
