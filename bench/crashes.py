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
is a fork of this process, which has imported everything; torchrun is real. Full disks are small
tmpfs, in a mount namespace of this program's own (`unshare`). A row that needs one says so if there
is none.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import collect
from cli import HERE, run_script
from store.activation_file import check_file
from store.collection import read_progress
from store.disk import read_json

PROMPTS, BATCH = 12, 2
ARGS = ["--hook_names", "mid_block", "--num_inference_steps", "2", "--batch_size", str(BATCH)]
ARGS += ["--max_num_examples", str(PROMPTS), "--device", "cpu"]


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


class Run:
    """One run of `collect.py` in a process of its own; the function `before` runs in it first."""

    def __init__(self, folder, before=None):
        self.folder, self.log = folder, tempfile.TemporaryFile()  # noqa: SIM115
        self.pid = os.fork()
        if self.pid == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(self.log.fileno(), 2)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.argv, status = ["collect.py", *ARGS, "--out_dir", str(folder)], 0
            try:
                if before is not None:
                    before()
                run_script(collect.main, collect.Config)
            except SystemExit as error:
                status = error.code
            except BaseException:
                traceback.print_exc()
                status = 1
            os._exit(status)

    def until(self, batches):
        """Wait until this many batches are safe; return the run."""
        while done(self.folder) < batches:
            if os.waitpid(self.pid, os.WNOHANG)[0]:
                raise AssertionError(f"ended early: {self.text()}")
            time.sleep(0.002)
        return self

    def send(self, number):
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def text(self):
        self.log.seek(0)
        return self.log.read().decode(errors="replace")

    def end(self):
        """Wait for the end; return the exit status, -9 for kill -9."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def seen(self):
        """Wait for the end; return status and last line: "2: collect.py: error: ..."."""
        status = self.end()
        lines = [line for line in re.split(r"[\r\n]+", self.text()) if line.strip()]
        return f"{status}: {lines[-1].replace(f'{self.folder.parent}/', '') if lines else ''}"


def done(folder):
    """Return the number of batches that are safe on the disk."""
    return len(read_progress(folder / "progress.jsonl"))


def contents(folder):
    """Return {path below the folder: bytes} of all files in it."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


class Table:
    def __init__(self, cfg, folder):
        self.cfg, self.folder, self.failed, self.number = cfg, folder, 0, 0
        self.rng = np.random.default_rng(cfg.seed)
        print(
            f"{'what was done':46} {'lost':>4}  {'same bytes':10}  exit status and last line",
            flush=True,
        )
        began = time.time()
        undisturbed = (
            self.fresh()
        )  # as deep as the others: a description names the model's folder as seen from its own
        assert Run(undisturbed).end() == 0
        self.seconds, self.undisturbed, self.expected = (
            time.time() - began,
            undisturbed,
            contents(undisturbed),
        )

    def fresh(self):
        self.number += 1
        return self.folder / f"{self.number}" / "acts"

    def again(self, folder):
        """Run the same command once more, and return (how many batches it generated again although
        they were written, whether all files are as expected)."""
        before, process = done(folder), Run(folder)
        process.end()
        start = re.search(rf"(\d+)/{PROMPTS} ", process.text())  # of the bar, when it appears
        return before - (int(start[1]) // BATCH if start else 0), contents(folder) == self.expected

    def row(self, what, case):
        if self.cfg.only and not any(word in what for word in self.cfg.only):
            return
        results = case()  # [(lost, same, seen)]
        same = sum(same for _, same, _ in results)
        lost, seen = (
            sum(lost for lost, _, _ in results),
            "; ".join(dict.fromkeys(seen for _, _, seen in results)),
        )
        self.failed += bool(lost) or same < len(results)
        verdict = f"{same} of {len(results)}" if len(results) != 1 else "yes" if same else "NO"
        print(f"{what:46} {lost:4}  {verdict:10}  {seen}", flush=True)


def kill(table):
    results, safe = [], []
    for moment in table.rng.uniform(0, table.seconds, table.cfg.kills):
        process = Run(folder := table.fresh())
        time.sleep(moment)
        process.send(signal.SIGKILL)
        process.end()
        safe.append(done(folder))
        results.append(table.again(folder))
        shutil.rmtree(folder.parent)
    return [
        (*result, f"-9 with {', '.join(map(str, sorted(safe)))} batches safe") for result in results
    ]


def kill_one_of_two(table):
    """Kill one of the two processes that a real torchrun started."""
    folder = table.fresh()
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        "29531",
    ]
    command = [*torchrun, str(HERE / "collect.py"), *ARGS, "--out_dir", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while done(folder) < 2:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, error = process.communicate()
    where = re.search(r"\(exitcode: -9\) local_rank: \d", error.decode(errors="replace"))
    return [(*table.again(folder), f"{process.returncode}: torchrun: failed {where and where[0]}")]


def interrupt(table, times):
    def slow_disk():
        real = os.fsync
        os.fsync = lambda fd: (time.sleep(0.3), real(fd))[1]

    process = Run(folder := table.fresh(), slow_disk).until(2)
    for _ in range(times):
        process.send(signal.SIGINT)
        time.sleep(0.1)
    return [(seen := process.seen(), *table.again(folder))[1:] + (seen,)]


def mount(folder, size="64m"):
    folder.mkdir(parents=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)],
        check=True,
        capture_output=True,
    )


def fill(folder, leave=0):
    """Fill a disk until `leave` bytes are free, rounded up to pages of memory."""
    blocks = shutil.disk_usage(folder).free // 4096 - -(-leave // 4096)
    (folder / "filler").write_bytes(bytes(4096 * blocks))


def full_at_once(table):
    mount((folder := table.fresh()).parent)
    need = len(table.expected["mid_block.npy"])
    fill(
        folder.parent, int(need / 0.97)
    )  # enough for what collect.py asks for, and not for the images too
    seen = Run(folder).seen()
    (folder.parent / "filler").unlink()
    return [(*table.again(folder), seen)]


def full_later(table, reserving):
    mount((folder := table.fresh()).parent)
    process = Run(folder, None if reserving else lambda: delattr(os, "posix_fallocate")).until(2)
    process.send(signal.SIGSTOP)
    fill(folder.parent)
    process.send(signal.SIGCONT)
    seen = process.seen()
    (folder.parent / "filler").unlink()
    return [(*table.again(folder), seen)]


def read_only(table):
    mount((folder := table.fresh()).parent)
    Run(folder).until(2).send(signal.SIGKILL)
    time.sleep(0.2)
    remount = lambda how: subprocess.run(
        ["mount", "-o", f"remount,{how}", "none", str(folder.parent)], check=True
    )
    remount("ro")
    seen = Run(folder).seen()
    remount("rw")
    return [(*table.again(folder), seen)]


def no_folder(table):
    folder = table.fresh()
    folder.parent.parent.mkdir(exist_ok=True)
    folder.parent.write_text("a file, where the folder's parent has to be")
    seen = Run(folder).seen()
    folder.parent.unlink()
    return [(*table.again(folder), seen)]


def truncated_half_way(table):
    process = Run(folder := table.fresh()).until(2)
    process.send(signal.SIGKILL)
    process.end()
    path = folder / "mid_block.npy.partial"
    whole = path.read_bytes()
    os.truncate(path, len(whole) // 2)
    seen = Run(folder).seen()
    path.write_bytes(whole)
    return [(*table.again(folder), seen)]


def truncated_when_finished(table):
    shutil.copytree(table.undisturbed, folder := table.fresh())
    path = folder / "mid_block.npy"
    whole = path.read_bytes()
    os.truncate(path, len(whole) - 1)
    try:
        check_file(path)
        read = "NOT SEEN by train.py"
    except ValueError as error:
        read = f"train.py: {str(error).replace(f'{folder}/', '')}"
    seen = Run(folder).seen()
    path.write_bytes(whole)
    return [(*table.again(folder), f"{seen}; {read}")]


def flipped_description(table):
    """Flip every byte of a .json in turn: train.py refuses it, or reads the same content."""
    shutil.copytree(table.undisturbed, folder := table.fresh())
    path = folder / "mid_block.json"
    good, expected, refused, same = path.read_bytes(), read_json(path), 0, 0
    for place in range(len(good)):
        for bit in (1 << int(table.rng.integers(8)), 255):
            path.write_bytes(good[:place] + bytes([good[place] ^ bit]) + good[place + 1 :])
            try:
                meta = check_file(folder / "mid_block.npy")[1]
                without = lambda record: {k: v for k, v in record.items() if k != "checksum"}
                same += meta == expected or (
                    json.dumps(without(meta)) == json.dumps(without(expected))
                )
            except ValueError:
                refused += 1
    path.write_bytes(good)
    wrong = 2 * len(good) - refused - same
    lost, equal = table.again(folder)
    return [
        (lost, equal and not wrong, f"{refused} refused, {same} of the same content, {wrong} wrong")
    ]


def flipped_record(table, name):
    """Change single bits of a record of a collection that is half done: the next start refuses the
    record or mends it."""
    process = Run(half := table.fresh()).until(3)
    process.send(signal.SIGKILL)
    process.end()
    results, good = [], (half / name).read_bytes()
    for place in table.rng.integers(0, len(good), table.cfg.flips).tolist():
        shutil.copytree(half, folder := table.fresh())
        (folder / name).write_bytes(
            good[:place]
            + bytes([good[place] ^ 1 << int(table.rng.integers(8))])
            + good[place + 1 :]
        )
        process = Run(folder)
        status = process.end()
        if status == 0:
            results.append((0, contents(folder) == table.expected, "0"))
        else:
            (folder / name).write_bytes(good)
            seen = re.split(r"[\r\n]+", process.text().strip())[-1].replace(f"{folder.parent}/", "")
            results.append((*table.again(folder), f"{status}: {seen}"))
        shutil.rmtree(folder.parent)
    return results


def torn_progress(table):
    """Cut the last line at lengths that a power cut may leave."""
    process = Run(half := table.fresh()).until(3)
    process.send(signal.SIGKILL)
    process.end()
    good = (half / "progress.jsonl").read_bytes()
    last = good.rindex(b"\n", 0, -1) + 1
    results = []
    for length in np.linspace(last, len(good) - 1, table.cfg.flips).astype(int):
        shutil.copytree(half, folder := table.fresh())
        (folder / "progress.jsonl").write_bytes(good[:length])
        results.append((*table.again(folder), "0"))
        shutil.rmtree(folder.parent)
    return results


def two_on_one_folder(table):
    one = Run(folder := table.fresh()).until(1)
    one.send(signal.SIGSTOP)
    two = Run(folder)
    seen = two.seen()
    one.send(signal.SIGCONT)
    status = one.end()
    same = contents(folder) == table.expected
    return [(status, same and table.again(folder)[1], seen)]


def two_at_the_same_moment(table):
    results = []
    for _ in range(table.cfg.flips):
        folder = table.fresh()
        runs = [Run(folder), Run(folder)]
        seen = sorted(process.seen() for process in runs)
        results.append((*table.again(folder), re.sub(r"^(\d+: ).*?(error|$)", r"\1\2", seen[-1])))
        shutil.rmtree(folder.parent)
    return results


def main(cfg: Config) -> None:
    os.environ["OMP_NUM_THREADS"] = (
        "1"  # as torchrun sets it: the last bits of a matrix product depend on the threads
    )
    torch.set_num_threads(1)
    ARGS.extend(["--model_name", cfg.model_name])
    if (
        "IN_NAMESPACE" not in os.environ
        and not subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode
    ):
        os.environ["IN_NAMESPACE"] = "1"
        os.execvp(
            "unshare", ["unshare", "-rm", sys.executable, "-m", "bench", "crashes", *sys.argv[1:]]
        )
    from diffusers import StableDiffusionPipeline  # noqa: F401
    from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        table = Table(cfg, Path(folder))
        rows = {
            f"kill -9, {cfg.kills} random moments": kill,
            "kill -9 of one of two processes": kill_one_of_two,
            "Ctrl-C": lambda t: interrupt(t, 1),
            "Ctrl-C twice": lambda t: interrupt(t, 2),
            "disk full before the first batch": full_at_once,
            "disk full after two batches": lambda t: full_later(t, True),
            "the same, without reserving space": lambda t: full_later(t, False),
            "folder that can't be written": read_only,
            "folder that can't be made": no_folder,
            "truncated file, half way": truncated_half_way,
            "truncated file, finished": truncated_when_finished,
            "flipped byte in .json, each in turn": flipped_description,
            "flipped byte in collect.json": lambda t: flipped_record(t, "collect.json"),
            "torn line in progress.jsonl": torn_progress,
            "flipped byte in prompts.jsonl": lambda t: flipped_record(t, "prompts.jsonl"),
            "a second collect.py on the folder": two_on_one_folder,
            "two at the same moment": two_at_the_same_moment,
        }
        for what, case in rows.items():
            try:
                table.row(what, lambda case=case: case(table))
            except subprocess.CalledProcessError as error:
                print(
                    f"{what:46}    -  skipped     "
                    f"no tmpfs can be mounted: {error.stderr.decode().strip()}",
                    flush=True,
                )
        for path in Path(folder).iterdir():
            subprocess.run(["umount", str(path)], capture_output=True)
    if table.failed:
        raise SystemExit(1)
