"""Several processes of which one ends, sleeps or never starts: the others say so and end too."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import cli

pytestmark = pytest.mark.slow

GROUP = """
import sys, time
import distributed
from cli import run_script
from dataclasses import dataclass

@dataclass
class Config:
    how: str = "works"
    rank: int = 0

def main(cfg):
    distributed.START, distributed.NOTE, distributed.BEAT, distributed.SILENCE = 15.0, 2.0, 0.3, 4.0
    processes = distributed.Processes()
    mine = processes.rank == cfg.rank
    processes.barrier()
    print("all there", file=sys.stderr, flush=True)
    if cfg.how == "ends" and mine:
        raise OSError("no such prompt file")
    if cfg.how in ("killed", "asleep") and mine:
        time.sleep(3600)
    if cfg.how == "works":
        time.sleep(6 * mine)  # longer than SILENCE
    if cfg.how == "asleep":
        processes.barrier()
    print(processes.all_gather(processes.rank), flush=True)
    processes.barrier()
    processes.close()

run_script(main, Config)
"""


@pytest.fixture
def start_group(tmp_path):
    """Starts processes as torchrun on two machines would, without one that ends those of the other
    machine."""
    every = []

    def start(*options, ranks=(0, 1)):
        started = start_processes(tmp_path, options, ranks)
        every.extend(started.values())
        return started

    yield start
    for process in every:
        process.kill()
        process.communicate()


def start_processes(tmp_path, options, ranks, count=2):
    """{rank: process} of a group of `count`, of which only `ranks` are started."""
    (tmp_path / "group.py").write_text(GROUP)
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    started = {}
    for rank in ranks:
        variables = dict(
            RANK=rank,
            WORLD_SIZE=count,
            LOCAL_RANK=0,
            LOCAL_WORLD_SIZE=1,
            GROUP_RANK=rank,
            GROUP_WORLD_SIZE=count,
        )
        variables |= dict(
            MASTER_ADDR="localhost", MASTER_PORT=port, PYTHONPATH=Path(cli.__file__).parent
        )
        environment = os.environ | {name: str(value) for name, value in variables.items()}
        command = [sys.executable, str(tmp_path / "group.py"), *options]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started[rank] = subprocess.Popen(command, env=environment, **pipes)
    return started


def wait_until_there(process):
    while "all there" not in process.stderr.readline():
        assert process.poll() is None


def test_processes_that_live_are_waited_for(start_group):
    started = start_group("--rank", "1")
    printed = {rank: process.communicate(timeout=60) for rank, process in started.items()}
    assert all(process.returncode == 0 for process in started.values()), printed
    assert printed[0][0] == "[0, 1]\n"
    assert printed[0][1] == "all there\n"


def test_a_process_that_never_starts_is_named(start_group):
    (alone,) = start_group(ranks=(0,)).values()
    printed = alone.communicate(timeout=60)[1]
    assert alone.returncode == 2
    assert printed.count("waiting for process 1 of 2") >= 2
    assert (
        "group.py (process 0 of 2): error: process 1 of 2 did not start within 15 s; see what it says\n"
        in printed
    )


def test_a_process_that_ends_early_is_named(start_group):
    started = start_group("--how", "ends", "--rank", "1")
    printed = {rank: process.communicate(timeout=60)[1] for rank, process in started.items()}
    assert "group.py (process 1 of 2): error: no such prompt file\n" in printed[1]
    assert (
        "group.py (process 0 of 2): error: process 1 of 2 has ended; see what it says, the same command resumes\n"
        in printed[0]
    )
    assert started[0].returncode == started[1].returncode == 2


@pytest.mark.parametrize("how", ["killed", "asleep"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_machine_that_dies_is_noticed(start_group, how, rank):
    """A stopped process keeps its connections, as a machine without power seems to: "asleep" waits
    in gloo, "killed" in tell."""
    started = start_group("--how", how, "--rank", str(rank))
    wait_until_there(started[rank])
    wait_until_there(started[1 - rank])
    started[rank].send_signal(signal.SIGSTOP)
    printed = started[1 - rank].communicate(timeout=40)[1]
    assert started[1 - rank].returncode == 2
    assert "error: " in printed
    assert "the same command resumes\n" in printed
    assert "Traceback" not in printed
