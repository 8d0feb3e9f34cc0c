"""What becomes of a collection that is killed, interrupted, or meets a full or damaged disk.

    python -m bench crashes                      # about two minutes
    python -m bench crashes --kills 3 --only kill Ctrl-C

Claim: no safe batch is lost, and the same command ends with the bytes of an undisturbed run. The
exit status is 1 if a row shows anything else.

Each row is `collect.py` on the toy (or `--model_name`), with 12 prompts in 6 batches. It is
disturbed once; then the cause is taken away and the same command is given again.

    lost          batches that were safe before and were generated again
    same bytes    every file of the folder compared with that of an undisturbed run

The last column has the exit status and the last line of the disturbed command. For speed each run
is a fork of this process, which has imported everything; torchrun is a real one. Full disks are
small tmpfs, in a mount namespace of this program's own (`unshare`). If no tmpfs can be mounted, a
row that needs one says that it is skipped.
"""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import collect
from cli import HERE, run_script
from store.activation_file import check_file
from store.collection import read_progress
from store.disk import read_json

PROMPTS = 12
BATCH = 2

MOMENT = 0.002  # seconds between two looks at a run
PAGE = 4096  # bytes; a tmpfs counts in pages

# Fraction of the free bytes that the files take on a disk that is nearly full. Above 0.98
# (FULLEST_DISK) collect.py refuses to start.
FULLNESS = 0.97


@dataclass
class Config:
    # model
    model_name: str = "toy"
    """Collect from this diffusers folder. It needs a prompts.csv of at least 12 prompts."""

    # measuring
    only: list[str] = field(default_factory=list)
    """Measure only the rows whose first column has one of these words. If not given, all rows are
    measured."""

    kills: int = 20
    """Kill a collection with -9 at this many random moments."""

    flips: int = 5
    """Damage each record in this many places, and start this many pairs at the same moment."""

    seed: int = 0
    """Choose the moments and the damaged bytes by this seed."""


class Result(NamedTuple):
    """What became of one disturbed collection."""

    lost: int
    """Batches that were safe and were generated again."""

    same: bool
    """Whether all files have the bytes of an undisturbed run."""

    seen: str
    """Exit status and last line of the disturbed command, or what else there is to say."""


def main(cfg: Config) -> None:
    """Print one line per row; exit with status 1 if a row lost a batch or has other bytes."""
    # as torchrun sets it: the last bits of a matrix product depend on the threads
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    enter_namespace()
    # what collect.py imports late, so that each fork has it already
    from diffusers import StableDiffusionPipeline  # noqa: F401
    from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

    rows = {
        f"kill -9, {cfg.kills} random moments": kill,
        "kill -9 of one of two processes": kill_one_of_two,
        "Ctrl-C": partial(interrupt, times=1),
        "Ctrl-C twice": partial(interrupt, times=2),
        "disk full before the first batch": full_at_once,
        "disk full after two batches": partial(full_later, reserving=True),
        "the same, without reserving space": partial(full_later, reserving=False),
        "folder that can't be written": read_only,
        "folder that can't be made": no_folder,
        "truncated file, half way": truncated_half_way,
        "truncated file, finished": truncated_when_finished,
        "flipped byte in .json, each in turn": flipped_description,
        "flipped byte in collect.json": partial(flipped_record, name="collect.json"),
        "torn line in progress.jsonl": torn_progress,
        "flipped byte in prompts.jsonl": partial(flipped_record, name="prompts.jsonl"),
        "a second collect.py on the folder": two_on_one_folder,
        "two at the same moment": two_at_the_same_moment,
    }
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        table = Table(cfg, Path(folder))
        for what, case in rows.items():
            if not cfg.only or any(word in what for word in cfg.only):
                table.print_row(what, case)
        for path in Path(folder).iterdir():
            subprocess.run(["umount", str(path)], capture_output=True)
    if table.num_failed:
        raise SystemExit(1)


def enter_namespace() -> None:
    """Start this program again in a mount namespace of its own, if the system allows it."""
    if "IN_NAMESPACE" in os.environ:
        return
    trial = subprocess.run(["unshare", "-rm", "true"], capture_output=True)
    if trial.returncode != 0:
        return
    os.environ["IN_NAMESPACE"] = "1"
    command = ["unshare", "-rm", sys.executable, "-m", "bench", "crashes", *sys.argv[1:]]
    os.execvp("unshare", command)


# ---- one run, and the table


class Run:
    """One run of `collect.py`, in a process of its own: a fork of this one."""

    def __init__(self, arguments: list[str], folder: Path, before: Callable[[], None] | None):
        """Start `collect.py` on a folder. If there is a function `before`, it runs there first."""
        self.folder = folder
        self.log = tempfile.TemporaryFile()  # noqa: SIM115
        self.pid = os.fork()
        if self.pid == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(self.log.fileno(), 2)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.argv = ["collect.py", *arguments, "--out_dir", str(folder)]
            os._exit(self.run_collect(before))

    @staticmethod
    def run_collect(before: Callable[[], None] | None) -> int:
        """Run `collect.py` in this process, and return its exit status."""
        try:
            if before is not None:
                before()
            run_script(collect.main, collect.Config)
        except SystemExit as error:
            return error.code
        except BaseException:
            traceback.print_exc()
            return 1
        return 0

    def wait_until(self, batches: int) -> None:
        """Wait until this many batches are safe. Raises AssertionError if the run ends before."""
        while count_safe(self.folder) < batches:
            if os.waitpid(self.pid, os.WNOHANG)[0]:
                raise AssertionError(f"ended early: {self.text()}")
            time.sleep(MOMENT)

    def send(self, number: int) -> None:
        """Send a signal, unless the run has ended."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def text(self) -> str:
        """Return what the run has written to stderr."""
        self.log.seek(0)
        return self.log.read().decode(errors="replace")

    def end(self) -> int:
        """Wait for the end; return the exit status, -9 for kill -9. Call it once."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def last_line(self) -> str:
        """Return the last line on stderr, with paths as seen from the folder's parent."""
        lines = [line for line in re.split(r"[\r\n]+", self.text()) if line.strip()]
        if not lines:
            return ""
        return lines[-1].replace(f"{self.folder.parent}/", "")

    def outcome(self) -> str:
        """Wait for the end; return status and last line: "2: collect.py: error: ..."."""
        status = self.end()
        return f"{status}: {self.last_line()}"


def count_safe(folder: Path) -> int:
    """Return the number of batches that are safe on the disk."""
    return len(read_progress(folder / "progress.jsonl"))


def contents(folder: Path) -> dict[str, bytes]:
    """Return {path below the folder: bytes} of all files in it."""
    files = {}
    for path in folder.rglob("*"):
        if path.is_file():
            files[str(path.relative_to(folder))] = path.read_bytes()
    return files


class Table:
    """Collects once undisturbed, then disturbs collections and prints a line for each case."""

    def __init__(self, cfg: Config, folder: Path):
        self.cfg = cfg
        self.folder = folder
        self.num_folders = 0
        self.num_failed = 0
        self.rng = np.random.default_rng(cfg.seed)
        self.arguments = ["--hook_names", "mid_block", "--num_inference_steps", "2"]
        self.arguments += ["--batch_size", str(BATCH), "--max_num_examples", str(PROMPTS)]
        self.arguments += ["--device", "cpu", "--model_name", cfg.model_name]
        columns = f"{'what was done':46} {'lost':>4}  {'same bytes':10}  exit status and last line"
        print(columns, flush=True)

        began = time.time()
        # as deep as the others: a description names the model's folder as seen from its own
        self.undisturbed = self.new_folder()
        assert self.start(self.undisturbed).end() == 0
        self.seconds = time.time() - began
        self.expected = contents(self.undisturbed)

    def new_folder(self) -> Path:
        """Return the path of a new folder, with a parent of its own. Neither of them is made."""
        self.num_folders += 1
        return self.folder / f"{self.num_folders}" / "acts"

    def start(self, folder: Path, before: Callable[[], None] | None = None) -> Run:
        """Start the command on a folder. If there is a function `before`, it runs there first."""
        return Run(self.arguments, folder, before)

    def killed_after(self, batches: int) -> Path:
        """Return the folder of a run that was killed when this many batches were safe."""
        folder = self.new_folder()
        run = self.start(folder)
        run.wait_until(batches)
        run.send(signal.SIGKILL)
        run.end()
        return folder

    def resume(self, folder: Path, seen: str) -> Result:
        """Give the same command once more, and return what became of the collection."""
        num_safe = count_safe(folder)
        run = self.start(folder)
        run.end()
        first_count = re.search(rf"(\d+)/{PROMPTS} ", run.text())  # of the bar, when it appears
        resumed_at = 0
        if first_count is not None:
            resumed_at = int(first_count[1]) // BATCH
        return Result(num_safe - resumed_at, contents(folder) == self.expected, seen)

    def print_row(self, what: str, case: Callable[["Table"], list[Result]]) -> None:
        """Run a case and print its line. It is skipped if it needs a tmpfs and there is none."""
        try:
            results = case(self)
        except subprocess.CalledProcessError as error:
            reason = f"no tmpfs can be mounted: {error.stderr.decode().strip()}"
            print(f"{what:46}    -  skipped     {reason}", flush=True)
            return

        lost = sum(result.lost for result in results)
        num_same = sum(result.same for result in results)
        if lost or num_same < len(results):
            self.num_failed += 1
        verdict = f"{num_same} of {len(results)}"
        if len(results) == 1:
            verdict = "yes" if num_same else "NO"
        different = dict.fromkeys(result.seen for result in results)  # each once, in order
        print(f"{what:46} {lost:4}  {verdict:10}  {'; '.join(different)}", flush=True)


# ---- killed and interrupted


def kill(table: Table) -> list[Result]:
    """Kill collections at random moments of the time that one takes."""
    results = []
    safe = []
    for moment in table.rng.uniform(0, table.seconds, table.cfg.kills):
        folder = table.new_folder()
        run = table.start(folder)
        time.sleep(moment)
        run.send(signal.SIGKILL)
        run.end()
        safe.append(count_safe(folder))
        results.append(table.resume(folder, ""))
        shutil.rmtree(folder.parent)
    counts = ", ".join(str(count) for count in sorted(safe))
    return [result._replace(seen=f"-9 with {counts} batches safe") for result in results]


def kill_one_of_two(table: Table) -> list[Result]:
    """Kill one of the two processes that a real torchrun started."""
    folder = table.new_folder()
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    torchrun += ["--nproc_per_node", "2", "--master_port", "29531"]
    command = [*torchrun, str(HERE / "collect.py"), *table.arguments, "--out_dir", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while count_safe(folder) < 2:
        assert process.poll() is None, process.stderr.read()
        time.sleep(MOMENT)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, error = process.communicate()
    blamed = re.search(r"\(exitcode: -9\) local_rank: \d", error.decode(errors="replace"))
    words = None if blamed is None else blamed[0]
    return [table.resume(folder, f"{process.returncode}: torchrun: failed {words}")]


def interrupt(table: Table, times: int) -> list[Result]:
    """Press Ctrl-C once or twice while a batch is written to a slow disk."""
    folder = table.new_folder()
    run = table.start(folder, before=slow_down_fsync)
    run.wait_until(2)
    for _ in range(times):
        run.send(signal.SIGINT)
        time.sleep(0.1)
    return [table.resume(folder, run.outcome())]


def slow_down_fsync() -> None:
    """Let each fsync of this process take 0.3 s more."""
    real_fsync = os.fsync

    def slow_fsync(fd: int) -> None:
        time.sleep(0.3)
        real_fsync(fd)

    os.fsync = slow_fsync


# ---- full and read-only disks


def mount(folder: Path) -> None:
    """Make a folder and mount a tmpfs of 64 MB there. Raises CalledProcessError if it can't be."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(folder)]
    subprocess.run(command, check=True, capture_output=True)


def remount(folder: Path, mode: str) -> None:
    """Mount a tmpfs again: "ro" for reading only, "rw" for writing too."""
    command = ["mount", "-o", f"remount,{mode}", "none", str(folder)]
    subprocess.run(command, check=True)


def fill(folder: Path, leave: int = 0) -> None:
    """Fill a disk until `leave` bytes are free, rounded up to pages of memory."""
    num_pages = shutil.disk_usage(folder).free // PAGE - math.ceil(leave / PAGE)
    (folder / "filler").write_bytes(bytes(PAGE * num_pages))


def full_at_once(table: Table) -> list[Result]:
    """Start on a disk with room for what collect.py asks for, and not for the images too."""
    folder = table.new_folder()
    mount(folder.parent)
    asked_for = len(table.expected["mid_block.npy"])
    fill(folder.parent, leave=int(asked_for / FULLNESS))
    seen = table.start(folder).outcome()
    (folder.parent / "filler").unlink()
    return [table.resume(folder, seen)]


def full_later(table: Table, reserving: bool) -> list[Result]:
    """Fill the disk after two batches. If not `reserving`, collect.py can't reserve its space."""
    folder = table.new_folder()
    mount(folder.parent)
    run = table.start(folder, before=None if reserving else forget_fallocate)
    run.wait_until(2)
    run.send(signal.SIGSTOP)
    fill(folder.parent)
    run.send(signal.SIGCONT)
    seen = run.outcome()
    (folder.parent / "filler").unlink()
    return [table.resume(folder, seen)]


def forget_fallocate() -> None:
    """Take from this process what reserves space on a disk, as on a system without it."""
    del os.posix_fallocate


def read_only(table: Table) -> list[Result]:
    """Resume a killed collection on a disk that has become read-only."""
    folder = table.new_folder()
    mount(folder.parent)
    run = table.start(folder)
    run.wait_until(2)
    run.send(signal.SIGKILL)
    time.sleep(0.2)
    remount(folder.parent, "ro")
    seen = table.start(folder).outcome()
    remount(folder.parent, "rw")
    return [table.resume(folder, seen)]


def no_folder(table: Table) -> list[Result]:
    """Start where a file has the name of the folder's parent."""
    folder = table.new_folder()
    folder.parent.parent.mkdir(exist_ok=True)
    folder.parent.write_text("a file, where the folder's parent has to be")
    seen = table.start(folder).outcome()
    folder.parent.unlink()
    return [table.resume(folder, seen)]


# ---- damaged files


def truncated_half_way(table: Table) -> list[Result]:
    """Resume a killed collection whose file has lost its second half; then put it back."""
    folder = table.killed_after(batches=2)
    path = folder / "mid_block.npy.partial"
    whole = path.read_bytes()
    os.truncate(path, len(whole) // 2)
    seen = table.start(folder).outcome()
    path.write_bytes(whole)
    return [table.resume(folder, seen)]


def truncated_when_finished(table: Table) -> list[Result]:
    """Read, and collect again, a finished file that has lost its last byte; then put it back."""
    folder = table.new_folder()
    shutil.copytree(table.undisturbed, folder)
    path = folder / "mid_block.npy"
    whole = path.read_bytes()
    os.truncate(path, len(whole) - 1)
    try:
        check_file(path)
        read = "NOT SEEN by train.py"
    except ValueError as error:
        read = f"train.py: {str(error).replace(f'{folder}/', '')}"
    seen = table.start(folder).outcome()
    path.write_bytes(whole)
    return [table.resume(folder, f"{seen}; {read}")]


def flipped_description(table: Table) -> list[Result]:
    """Flip every byte of a .json in turn: train.py refuses it, or reads the same content."""
    folder = table.new_folder()
    shutil.copytree(table.undisturbed, folder)
    path = folder / "mid_block.json"
    good = path.read_bytes()
    expected = read_json(path)
    num_refused = 0
    num_same = 0
    for position in range(len(good)):
        one_bit = 1 << int(table.rng.integers(8))
        for bits in (one_bit, 255):
            path.write_bytes(flip(good, position, bits))
            try:
                meta = check_file(folder / "mid_block.npy")[1]
            except ValueError:
                num_refused += 1
                continue
            if meta == expected or without_checksum(meta) == without_checksum(expected):
                num_same += 1
    path.write_bytes(good)

    num_wrong = 2 * len(good) - num_refused - num_same
    seen = f"{num_refused} refused, {num_same} of the same content, {num_wrong} wrong"
    result = table.resume(folder, seen)
    return [result._replace(same=result.same and num_wrong == 0)]


def flip(data: bytes, position: int, bits: int) -> bytes:
    """Return the data with some bits of one byte flipped: b"ab", 1 and 255 give b"a\\x9d"."""
    return data[:position] + bytes([data[position] ^ bits]) + data[position + 1 :]


def without_checksum(meta: dict) -> str:
    """Return a description as JSON, with the order of its keys and without its checksum."""
    return json.dumps({key: value for key, value in meta.items() if key != "checksum"})


def flipped_record(table: Table, name: str) -> list[Result]:
    """Change single bits of a record of a half-done collection: it is refused or mended."""
    half = table.killed_after(batches=3)
    good = (half / name).read_bytes()
    results = []
    for position in table.rng.integers(0, len(good), table.cfg.flips).tolist():
        folder = table.new_folder()
        shutil.copytree(half, folder)
        one_bit = 1 << int(table.rng.integers(8))
        (folder / name).write_bytes(flip(good, position, one_bit))
        run = table.start(folder)
        status = run.end()
        if status == 0:
            results.append(Result(0, contents(folder) == table.expected, "0"))
        else:
            (folder / name).write_bytes(good)
            results.append(table.resume(folder, f"{status}: {run.last_line()}"))
        shutil.rmtree(folder.parent)
    return results


def torn_progress(table: Table) -> list[Result]:
    """Cut the last line at lengths that a power cut may leave."""
    half = table.killed_after(batches=3)
    good = (half / "progress.jsonl").read_bytes()
    last_line = good.rindex(b"\n", 0, -1) + 1  # where it begins
    results = []
    for length in np.linspace(last_line, len(good) - 1, table.cfg.flips).astype(int):
        folder = table.new_folder()
        shutil.copytree(half, folder)
        (folder / "progress.jsonl").write_bytes(good[:length])
        results.append(table.resume(folder, "0"))
        shutil.rmtree(folder.parent)
    return results


# ---- two at once


def two_on_one_folder(table: Table) -> list[Result]:
    """Start a second collect.py on a folder while the first one is stopped; then let it go on."""
    folder = table.new_folder()
    first = table.start(folder)
    first.wait_until(1)
    first.send(signal.SIGSTOP)
    seen = table.start(folder).outcome()
    first.send(signal.SIGCONT)
    status = first.end()
    same_at_once = status == 0 and contents(folder) == table.expected
    result = table.resume(folder, seen)
    return [result._replace(same=same_at_once and result.same)]


def two_at_the_same_moment(table: Table) -> list[Result]:
    """Start two collect.py on a new folder: one of them is refused."""
    results = []
    for _ in range(table.cfg.flips):
        folder = table.new_folder()
        runs = [table.start(folder), table.start(folder)]
        outcomes = sorted(run.outcome() for run in runs)
        refused = re.sub(r"^(\d+: ).*?(error|$)", r"\1\2", outcomes[-1])
        results.append(table.resume(folder, refused))
        shutil.rmtree(folder.parent)
    return results
