"""Every configuration of every kernel compiles for four generations of GPUs and spills nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


def test_no_configuration_spills():
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = [sys.executable, "-m", "bench", "registers"]
    done = subprocess.run(
        run, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("sm_")]
    assert {line[0] for line in lines} == {"sm_75", "sm_80", "sm_90", "sm_100"}
    assert len(lines) > 300
    assert all(line[-2] == "0" for line in lines)
