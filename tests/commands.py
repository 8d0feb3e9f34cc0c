"""The scripts as a user runs them: command lines, their status, and what they print.

Python takes 3 to 6 s to import torch and diffusers. So a command line runs in a fork of a process
that has imported them and done nothing else (multiprocessing's fork server); the modules of this
repository are imported by each fork. What is read when those libraries are imported, and how a
script really starts, a fork can't show: `run_fresh` starts Python itself.
"""

import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing import forkserver
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).parents[1]
PRELOADED = [  # what the scripts import of others
    "torch", "torch.distributed", "torch._dynamo", "triton", "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.schedulers.scheduling_ddim", "transformers.models.clip.modeling_clip", "matplotlib.figure",
    "transformers.models.clip.tokenization_clip", "matplotlib.backends.backend_agg", "safetensors.torch", "filelock", "tqdm",
    "PIL.Image",
]  # fmt: skip
# beginnings of variables that a fork would see too late
READ_AT_IMPORT = (
    "HF_",
    "TRITON_",
    "MPLBACKEND",
    "CUDA_",
)
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(PRELOADED)


def run_script(*words, cwd, timeout=120, **environment):
    """Run `python <words>` in the folder `cwd`; words[0] is a script of this repository, such as
    train.py.

    environment: variables beside those of this process. Returns a CompletedProcess with returncode,
    stdout, stderr (text).
    """
    script = Script(*words, cwd=cwd, **environment)
    try:
        script.wait(timeout)
    finally:
        script.kill()
    return subprocess.CompletedProcess(script.words, script.poll(), script.stdout, script.stderr)


def run_fresh(*words, cwd, timeout=120, **environment):
    """`run_script` in a Python of its own."""
    words = [str(ROOT / words[0]), *map(str, words[1:])]
    environment = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


class Script:
    """A command line that runs; the methods are those of subprocess.Popen. words and environment:
    as in `run_script`."""

    def __init__(self, *words, cwd, **environment):
        late = [name for name in environment if name.startswith(READ_AT_IMPORT)]
        assert not late, f"{late} are read when Python starts: run_fresh"
        self.words = [str(ROOT / words[0]), *map(str, words[1:])]
        self.folder = tempfile.TemporaryDirectory()
        self.printed = [Path(self.folder.name, name) for name in ("stdout", "stderr")]
        for path in self.printed:
            path.touch()
        start_server()
        arguments = (
            self.words,
            str(cwd),
            {**os.environ, **environment},
            list(map(str, self.printed)),
        )
        self.process = FORKS.Process(target=be_script, args=arguments)
        self.process.start()
        self.pid = self.process.pid

    @property
    def stdout(self):
        return self.printed[0].read_text(errors="replace")

    @property
    def stderr(self):
        return self.printed[1].read_text(errors="replace")

    def poll(self):
        """Exit status, negative for a signal; None while it runs."""
        return self.process.exitcode

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self.words, timeout, self.stdout, self.stderr)
        return self.poll()

    def send_signal(self, number):
        if self.poll() is None:
            # The server that forked it may have noticed its end before this process did.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self):
        """End it, if it has not ended."""
        self.send_signal(signal.SIGKILL)
        self.process.join()


class Processes:
    """A script by several processes, as torchrun runs them: a store for all, and when one fails the
    others are ended.

    words and environment: as in `run_script`.
    """

    def __init__(self, count, *words, cwd, **environment):
        from torch.distributed import TCPStore

        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        torchrun = dict(
            WORLD_SIZE=count,
            LOCAL_WORLD_SIZE=count,
            GROUP_RANK=0,
            GROUP_WORLD_SIZE=1,
            OMP_NUM_THREADS=1,
        )
        torchrun |= dict(
            MASTER_ADDR="127.0.0.1", MASTER_PORT=self.store.port, TORCHELASTIC_USE_AGENT_STORE=True
        )
        self.scripts = []
        for rank in range(count):
            variables = {**torchrun, "RANK": rank, "LOCAL_RANK": rank, **environment}
            variables = {name: str(value) for name, value in variables.items()}
            self.scripts.append(Script(*words, cwd=cwd, **variables))

    def poll(self):
        """Exit status of one that failed, 0 when all have ended well; None while they run."""
        statuses = [script.poll() for script in self.scripts]
        if any(statuses):
            self.send_signal(signal.SIGTERM)
            return next(filter(None, statuses))
        return None if None in statuses else 0

    def wait(self, timeout=120):
        end = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(
                    self.scripts[0].words, timeout, self.scripts[0].stdout, self.stderr
                )
            time.sleep(0.01)
        for script in self.scripts:
            script.wait(30)
        return status

    def send_signal(self, number):
        for script in self.scripts:
            script.send_signal(number)

    def kill(self):
        """End those that have not ended."""
        for script in self.scripts:
            script.kill()

    @property
    def stderr(self):
        return "".join(script.stderr for script in self.scripts)


def start_server():
    """Start the process that is forked, once; it inherits this one's environment."""
    # as cli.read_options says before transformers is imported
    quiet = dict(TRANSFORMERS_VERBOSITY="error")
    # asking whether there is a GPU must not start CUDA, which no fork survives
    quiet |= dict(PYTORCH_NVML_BASED_CUDA_CHECK="1")
    with patch.dict(os.environ, quiet):
        forkserver.ensure_running()


def be_script(words, cwd, environment, printed):
    """What a fork does: become `python <words>`."""
    import torch

    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, path in enumerate(printed, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if "OMP_NUM_THREADS" in environment:
        # OpenMP has read it when the server started
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    ours = (str(ROOT), str(ROOT / "tests"))
    sys.path[:] = [
        str(Path(words[0]).parent),
        str(ROOT),
        *(path for path in sys.path if path not in ours),
    ]
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
