"""Collections that are killed, interrupted, or meet a full or damaged disk; `python -m bench
crashes` has more of them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROWS = {
    "kill -9, 3 random moments": r"-9 with \d, \d, \d batches safe",
    "kill -9 of one of two processes": r"1: torchrun: failed \(exitcode: -9\)",
    "Ctrl-C": "130: interrupted: the same command resumes",
    "Ctrl-C twice": "130: interrupted$",
    "the same, without reserving space": "2: .* can't be written: No space left on device; finished batches are kept",
    "folder that can't be written": "2: .*can't be written: Read-only",
    "a second collect.py on the folder": "2: .*another collect.py is writing to acts",
}


@pytest.fixture(scope="module")
def table(model_folder):
    command = [
        sys.executable,
        "-m",
        "bench",
        "crashes",
        "--kills",
        "3",
        "--model_name",
        str(model_folder),
        "--only",
        *ROWS,
    ]
    result = subprocess.run(
        command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.splitlines()[1:]


@pytest.mark.parametrize("what", ROWS)
def test_nothing_is_lost_and_no_byte_is_wrong(table, what):
    (line,) = (line for line in table if line.startswith(what.ljust(46)))
    columns = re.match(r"\s*(\d+|-)  (yes|\d of \d|skipped)\s+(.*)", line[46:])
    if columns[2] == "skipped":
        pytest.skip(columns[3])
    assert columns[1] == "0"
    assert re.search(ROWS[what], columns[3])
    assert columns[2] == "yes" or columns[2][0] == columns[2][-1]
