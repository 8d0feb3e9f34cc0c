"""How fast shuffled vectors are read: ours, the ancestor's way, and plain reading.

    python -m bench loader                              # a file of 1 GB, batches of 4096 vectors
    python -m bench loader --large 8 --buffer_gb 1      # and the memory that reading 8 GB takes

Claim: ours reads 11 times as fast as the ancestor's trainer where the file fits the buffer, and 5.2
times where it does not (docs/benchmarks.md; two cores of an AMD EPYC, the page cache warm).

Every row reads all vectors once per round. Rows take turns, the first round is not counted, and the
numbers are medians of the others. Everything is in the page cache, except in the rows
"from the disk".

    read            pread of a block into one small piece of memory: the best that reading can be
    np.fromfile     reads the whole file into fresh memory
    load            reads the whole file into memory that exists already
    ours            store/dataset.py, from a file that fits the buffer, and from one that does not
    the ancestor's  universal-diffsae's trainer: a shuffled `datasets` table of Array2D in torch
                    format through a DataLoader with 1 worker, whole images per batch; other numbers
                    of workers stand beside it

Batches are looked at, not used. Memory is RssAnon, watched while the vectors of a sparse file come
(Linux).
"""

import os
import statistics
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from bench.step import conditions
from cli import check_positive
from store import dataset
from store.dataset import Activations

MB = 1 << 20


@dataclass
class Config:
    # data
    gb: float = 1.0
    """Write and read a file of this many GB."""

    tokens: int = 256
    """Give each image and step this many vectors."""

    d: int = 1280
    """Give the vectors this width."""

    large: float | None = None
    """Also read a sparse file of this many GB and print how much memory that takes. If not given,
    this is left out."""

    buffer_gb: float = 1.0
    """Give the reading of the large file a shuffle buffer of this many GiB."""

    batch_size: int = 4096
    """Give each batch this many vectors."""

    workers: tuple[int, ...] = (0, 1, 2)
    """Measure the ancestor's DataLoader with these numbers of workers. Its own default is 1."""

    # measuring
    rounds: int = 5
    """Count this many rounds. More rounds make the medians steadier."""

    # output
    folder: str | None = None
    """Put the files into a folder here. If not given, it is the system's temporary folder."""


def read(path: Path, size: int, block: int, threads: int) -> None:
    """Read a file of `size` bytes; each thread reads into one block of memory, again and again."""
    fd = os.open(path, os.O_RDONLY)

    def some(number):
        memory = bytearray(block)
        for offset in range(number * block, size, threads * block):
            os.preadv(fd, [memory], offset)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(some, range(threads)))
    os.close(fd)


def drop(path: Path) -> None:
    """Take a file out of the page cache."""
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def load(path: Path, memory: memoryview, threads: int = 2) -> None:
    """Read a file into memory as large as it is."""
    fd = os.open(path, os.O_RDONLY)
    cuts = range(0, len(memory), 4 * MB)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda at: os.preadv(fd, [memory[at : at + 4 * MB]], at), cuts))
    os.close(fd)


def ancestor(folder, batch_size, workers):
    """Return an iterable of batches (images, tokens, d), as the ancestor's trainer gets them."""
    from datasets import Dataset
    from torch.utils.data import DataLoader

    data = Dataset.load_from_disk(folder)
    data.set_format("torch", columns=["activations"], dtype=torch.float16)
    data = data.shuffle(seed=42)
    more = dict(persistent_workers=True, prefetch_factor=2) if workers else {}
    return DataLoader(data, batch_size=batch_size, num_workers=workers, **more)


def count_vectors(batches) -> int:
    """Return how many vectors came; the last number of each batch is looked at."""
    count = 0
    for x in batches:
        count += len(x)
        assert x[-1, -1] == x[-1, -1]
    return count


def anonymous_bytes() -> int:
    """Return the bytes of this process's memory that belong to no file (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def watch_memory(cfg, folder):
    """Print the peak of anonymous memory while the vectors of a sparse file are read once."""
    path, rows = folder / "large.npy", int(cfg.large * 1e9 / (2 * cfg.tokens * cfg.d))
    array = np.lib.format.open_memmap(path, "w+", np.float16, (rows, 1, cfg.tokens, cfg.d))
    del array
    data, before, peak, ended = Activations([path]), anonymous_bytes(), [0], threading.Event()

    def watch():
        while not ended.wait(0.01):
            peak[0] = max(peak[0], anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.perf_counter()
    try:
        batches = data.batches(cfg.batch_size, data.num_training, buffer_gb=cfg.buffer_gb)
        count = count_vectors(
            x
            for x, _ in tqdm(
                batches, "large", total=data.num_training // cfg.batch_size, leave=False
            )
        )
    finally:
        ended.set()
        thread.join()
    seconds, more, gb = (
        time.perf_counter() - start,
        (peak[0] - before) / 2**30,
        path.stat().st_size / 1e9,
    )
    print(
        f"\nA sparse file of {gb:.2f} GB, buffer {cfg.buffer_gb:g} GiB: "
        f"{count:,} vectors in {seconds:.1f} s; anonymous memory"
    )
    print(
        f"rose from {before / 2**30:.2f} by at most {more:.2f} GiB; "
        f"the buffer has {cfg.buffer_gb:.2f} GiB"
    )


def ways_of(cfg, path, folder):
    """Return what is measured: {name: function}; it returns the number of vectors, None for all."""
    num_bytes = path.stat().st_size
    data, memory = Activations([path]), memoryview(np.zeros(num_bytes, np.uint8))
    gb = data.num_training * data.d * 2 / 2**30
    ours = lambda times: data.batches(cfg.batch_size, 10**15, buffer_gb=gb / times)
    fits, larger = ours(0.99), ours(4)
    epoch = lambda batches: count_vectors(
        next(batches)[0] for _ in range(data.num_training // cfg.batch_size)
    )
    ways = {
        f"read, {block} MB blocks, {n} thread{'s' * (n > 1)}": lambda block=block, n=n: read(
            path, num_bytes, block * MB, n
        )
        for block in (1, 4, 8)
        for n in (1, 2)
    }
    ways["np.fromfile"] = lambda: np.fromfile(path, np.uint8) is None
    ways["load into memory, 2 threads"] = lambda: load(path, memory)
    ways["ours, fits the buffer, first epoch"] = lambda: epoch(ours(0.99))
    ways["ours, fits the buffer"] = lambda: epoch(fits)
    ways["ours, file 4 x buffer"] = lambda: epoch(larger)
    ways["from the disk: read, 4 MB blocks"] = lambda: (
        drop(path) or read(path, num_bytes, 4 * MB, 2)
    )
    ways["from the disk: ours, file 4 x buffer"] = lambda: drop(path) or epoch(ours(4))
    if cfg.workers:
        from datasets import Array2D, Dataset, Features, Value, disable_progress_bars

        disable_progress_bars()
        kinds = Features(
            {"activations": Array2D((cfg.tokens, cfg.d), "float16"), "timestep": Value("uint16")}
        )
        rows = lambda: (
            {"activations": row[0], "timestep": 0} for row in np.load(path, mmap_mode="r")
        )
        Dataset.from_generator(rows, features=kinds, cache_dir=str(folder / "cache")).save_to_disk(
            folder / "rows"
        )
    for n in cfg.workers:
        loader = ancestor(folder / "rows", max(1, cfg.batch_size // cfg.tokens), n)
        ways[f"the ancestor's, {n} workers"] = lambda loader=loader: count_vectors(
            b["activations"].view(-1, cfg.d) for b in loader
        )
    return ways


def measure(ways: dict, num_vectors: int, rounds: int) -> dict[str, float]:
    """Return the vectors per second of each way: medians of rounds in which they take turns."""
    times = {name: [] for name in ways}
    for number in tqdm(range(1 + rounds), "rounds", leave=False):
        for name, way in ways.items():
            start = time.perf_counter()
            count = way() or num_vectors
            if number:
                times[name].append((time.perf_counter() - start) / count)
    return {name: 1 / statistics.median(each) for name, each in times.items()}


def main(cfg: Config) -> None:
    """Print the table, and with --large the memory that reading a large file takes."""
    check_positive(cfg, "tokens", "d", "batch_size", "rounds")
    where, versions, commit = conditions(torch.device("cpu"))
    dataset.HELD_OUT.update(at_least=0, share=1e-9)  # a single image is not trained on
    images = max(2, int(cfg.gb * 1e9 / (2 * cfg.tokens * cfg.d)))
    with tempfile.TemporaryDirectory(dir=cfg.folder) as folder:
        folder = Path(folder)
        path, shape = folder / "a.npy", (images, 1, cfg.tokens, cfg.d)
        gb = 2 * np.prod(shape) / 1e9
        print(f"{where}, {os.cpu_count()} CPUs; {versions}; commit {commit}")
        print(f"{shape} float16, {gb:.2f} GB, in the page cache; batches of {cfg.batch_size}\n")
        rng, array = (
            np.random.default_rng(0),
            np.lib.format.open_memmap(path, "w+", np.float16, shape),
        )
        for row in array:
            row[:] = rng.random(row.shape, np.float32)
        array.flush()  # or it could not be dropped from the cache
        del array, row
        rates = measure(ways_of(cfg, path, folder), images * cfg.tokens, cfg.rounds)
        best = max(rate for name, rate in rates.items() if name.startswith("read"))
        theirs = rates.get("the ancestor's, 1 workers", float("nan"))
        print(f"{'':38}{'vectors/s':>12}{'GB/s':>8}{'of the best read':>18}{'of the ancestor':>17}")
        for name, rate in rates.items():
            print(
                f"{name:38}{rate:12,.0f}{rate * 2 * cfg.d / 1e9:8.2f}"
                f"{rate / best:18.2f}{rate / theirs:17.1f}"
            )
        if cfg.large:
            watch_memory(cfg, folder)
