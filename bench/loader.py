"""How fast shuffled vectors are read: ours, the ancestor's way, and plain reading.

    python -m bench loader                            # a file of 1 GB, batches of 4096 vectors
    python -m bench loader --large 8 --buffer_gb 1    # and the memory that reading 8 GB takes

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

Batches are looked at, not used. The memory is RssAnon, which is watched while a sparse file is read
(Linux).
"""

import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bench.step import conditions
from cli import check_positive
from store import dataset
from store.dataset import Activations

MB = 1 << 20
ENDLESS = 10**15  # vectors: more than any row reads

# Sizes of the file over that of the buffer. A file that fits leaves a hundredth of the buffer free.
FITS = 0.99
LARGER = 4

Way = Callable[[], int | None]
"""Reads the file once, and returns how many vectors it read; None means all."""


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


def main(cfg: Config) -> None:
    """Print the table, and with --large the memory that reading a large file takes."""
    check_positive(cfg, "tokens", "d", "batch_size", "rounds")
    where = conditions(torch.device("cpu"))
    dataset.HELD_OUT.update(at_least=0, share=1e-9)  # a single image is not trained on
    num_images = max(2, int(cfg.gb * 1e9 / (2 * cfg.tokens * cfg.d)))
    with tempfile.TemporaryDirectory(dir=cfg.folder) as folder_name:
        folder = Path(folder_name)
        path = folder / "a.npy"
        shape = (num_images, 1, cfg.tokens, cfg.d)
        gb = 2 * np.prod(shape) / 1e9
        print(f"{where.device}, {os.cpu_count()} CPUs; {where.versions}; commit {where.commit}")
        print(f"{shape} float16, {gb:.2f} GB, in the page cache; batches of {cfg.batch_size}\n")
        write_random(path, shape)
        ways = ways_of(cfg, path, folder)
        print_rates(measure(ways, num_images * cfg.tokens, cfg.rounds), cfg.d)
        if cfg.large:
            print_memory(cfg, folder)


def write_random(path: Path, shape: tuple[int, ...]) -> None:
    """Write random float16 numbers from a fixed seed."""
    rng = np.random.default_rng(0)
    array = np.lib.format.open_memmap(path, "w+", np.float16, shape)
    for row in array:
        row[:] = rng.random(row.shape, np.float32)
    array.flush()  # or it could not be dropped from the cache


def measure(ways: dict[str, Way], num_vectors: int, rounds: int) -> dict[str, float]:
    """Return the vectors per second of each way: medians of rounds in which they take turns."""
    times = {name: [] for name in ways}  # seconds per vector
    for number in tqdm(range(1 + rounds), "rounds", leave=False):
        for name, way in ways.items():
            start = time.perf_counter()
            count = way()
            if count is None:
                count = num_vectors
            if number > 0:
                times[name].append((time.perf_counter() - start) / count)
    return {name: 1 / statistics.median(each) for name, each in times.items()}


def print_rates(rates: dict[str, float], d: int) -> None:
    """Print the table. rates: vectors per second, each of d float16 numbers."""
    best_read = max(rate for name, rate in rates.items() if name.startswith("read"))
    ancestor = rates.get("the ancestor's, 1 workers", float("nan"))
    print(f"{'':38}{'vectors/s':>12}{'GB/s':>8}{'of the best read':>18}{'of the ancestor':>17}")
    for name, rate in rates.items():
        gb_per_second = rate * 2 * d / 1e9
        ratios = f"{rate / best_read:18.2f}{rate / ancestor:17.1f}"
        print(f"{name:38}{rate:12,.0f}{gb_per_second:8.2f}{ratios}")


# ---- the ways to read


def ways_of(cfg: Config, path: Path, folder: Path) -> dict[str, Way]:
    """Return the rows of the table: {name: what is measured}. Files of their own go to `folder`."""
    num_bytes = path.stat().st_size
    ways = {}
    for block in (1, 4, 8):
        ways[f"read, {block} MB blocks, 1 thread"] = partial(read, path, num_bytes, block * MB, 1)
        ways[f"read, {block} MB blocks, 2 threads"] = partial(read, path, num_bytes, block * MB, 2)
    ways["np.fromfile"] = partial(read_anew, path)
    memory = memoryview(np.zeros(num_bytes, np.uint8))
    ways["load into memory, 2 threads"] = partial(load, path, memory)

    data = Activations([path])
    num_batches = data.num_training // cfg.batch_size  # of an epoch
    fits = shuffled(data, cfg.batch_size, FITS)
    larger = shuffled(data, cfg.batch_size, LARGER)
    first_epoch = partial(read_first_epoch, data, cfg.batch_size)
    ways["ours, fits the buffer, first epoch"] = partial(first_epoch, FITS)
    ways["ours, fits the buffer"] = partial(count_next, fits, num_batches)
    ways["ours, file 4 x buffer"] = partial(count_next, larger, num_batches)
    read_blocks = ways["read, 4 MB blocks, 2 threads"]
    ways["from the disk: read, 4 MB blocks"] = partial(drop_and, path, read_blocks)
    larger_anew = partial(first_epoch, LARGER)
    ways["from the disk: ours, file 4 x buffer"] = partial(drop_and, path, larger_anew)

    if cfg.workers:
        write_ancestor_rows(cfg, path, folder)
    for num_workers in cfg.workers:
        loader = ancestor_loader(folder / "rows", max(1, cfg.batch_size // cfg.tokens), num_workers)
        ways[f"the ancestor's, {num_workers} workers"] = partial(count_ancestor, loader, cfg.d)
    return ways


def read(path: Path, size: int, block: int, threads: int) -> None:
    """Read a file of `size` bytes; each thread reads into one block of memory, again and again."""
    fd = os.open(path, os.O_RDONLY)

    def read_blocks(number: int) -> None:
        memory = bytearray(block)
        for offset in range(number * block, size, threads * block):
            os.preadv(fd, [memory], offset)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read_blocks, range(threads)))
    os.close(fd)


def read_anew(path: Path) -> None:
    """Read a file into fresh memory."""
    np.fromfile(path, np.uint8)


def load(path: Path, memory: memoryview, threads: int = 2) -> None:
    """Read a file into memory as large as it is."""
    fd = os.open(path, os.O_RDONLY)

    def read_block(offset: int) -> None:
        os.preadv(fd, [memory[offset : offset + 4 * MB]], offset)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read_block, range(0, len(memory), 4 * MB)))
    os.close(fd)


def drop_and(path: Path, way: Way) -> int | None:
    """Take a file out of the page cache, and return what the way returns."""
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    return way()


def shuffled(data: Activations, batch_size: int, file_over_buffer: float) -> Iterator[Tensor]:
    """Yield our batches (n, d) without end. file_over_buffer: the file's size over the buffer's."""
    gib = data.num_training * data.d * 2 / 2**30
    for x, _ in data.batches(batch_size, ENDLESS, buffer_gb=gib / file_over_buffer):
        yield x


def read_first_epoch(data: Activations, batch_size: int, file_over_buffer: float) -> int:
    """Begin to read anew, and return how many vectors came in one epoch."""
    batches = shuffled(data, batch_size, file_over_buffer)
    return count_next(batches, data.num_training // batch_size)


def count_next(batches: Iterator[Tensor], num_batches: int) -> int:
    """Return how many vectors are in the next batches."""
    return count_vectors(next(batches) for _ in range(num_batches))


def count_vectors(batches: Iterable[Tensor]) -> int:
    """Return how many vectors came; the last number of each batch is looked at."""
    count = 0
    for x in batches:
        count += len(x)
        assert x[-1, -1] == x[-1, -1]
    return count


def write_ancestor_rows(cfg: Config, path: Path, folder: Path) -> None:
    """Write the file's vectors into <folder>/rows as the ancestor does: one row per image."""
    from datasets import Array2D, Dataset, Features, Value, disable_progress_bars

    def rows() -> Iterator[dict[str, Any]]:
        for image in np.load(path, mmap_mode="r"):
            yield {"activations": image[0], "timestep": 0}

    disable_progress_bars()
    columns = {"activations": Array2D((cfg.tokens, cfg.d), "float16"), "timestep": Value("uint16")}
    table = Dataset.from_generator(
        rows, features=Features(columns), cache_dir=str(folder / "cache")
    )
    table.save_to_disk(folder / "rows")


def ancestor_loader(
    folder: Path, batch_size: int, num_workers: int
) -> torch.utils.data.DataLoader[dict[str, Tensor]]:
    """Return the ancestor's DataLoader: {"activations": (images, tokens, d)} per batch."""
    from datasets import Dataset
    from torch.utils.data import DataLoader

    data = Dataset.load_from_disk(folder)
    data.set_format("torch", columns=["activations"], dtype=torch.float16)
    data = data.shuffle(seed=42)
    options = {}
    if num_workers > 0:
        options = {"persistent_workers": True, "prefetch_factor": 2}
    return DataLoader(data, batch_size=batch_size, num_workers=num_workers, **options)


def count_ancestor(loader: Iterable[dict[str, Tensor]], d: int) -> int:
    """Return how many vectors of width d came in one epoch of the ancestor's loader."""
    return count_vectors(batch["activations"].view(-1, d) for batch in loader)


# ---- memory


def anonymous_bytes() -> int:
    """Return the bytes of this process's memory that belong to no file (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/self/status has no line RssAnon")


class PeakMemory:
    """Looks every 10 ms at the anonymous memory of this process, while a `with` block runs."""

    before: int
    """Bytes when the block began."""

    peak: int
    """The most bytes that were seen."""

    def __enter__(self) -> "PeakMemory":
        self.before = anonymous_bytes()
        self.peak = 0
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.ended.set()
        self.thread.join()

    def watch(self) -> None:
        """Look until the block has ended."""
        while not self.ended.wait(0.01):
            self.peak = max(self.peak, anonymous_bytes())


def print_memory(cfg: Config, folder: Path) -> None:
    """Print the peak of anonymous memory while the vectors of a sparse file are read once."""
    path = folder / "large.npy"
    num_images = int(cfg.large * 1e9 / (2 * cfg.tokens * cfg.d))
    shape = (num_images, 1, cfg.tokens, cfg.d)
    np.lib.format.open_memmap(path, "w+", np.float16, shape)  # all zeros, which take no disk

    data = Activations([path])
    with PeakMemory() as memory:
        start = time.perf_counter()
        batches = data.batches(cfg.batch_size, data.num_training, buffer_gb=cfg.buffer_gb)
        num_batches = data.num_training // cfg.batch_size
        bar = tqdm(batches, "large", total=num_batches, leave=False)
        count = count_vectors(x for x, _ in bar)
    seconds = time.perf_counter() - start

    before = memory.before / 2**30
    rise = (memory.peak - memory.before) / 2**30
    print(
        f"\nA sparse file of {path.stat().st_size / 1e9:.2f} GB, buffer {cfg.buffer_gb:g} GiB: "
        f"{count:,} vectors in {seconds:.1f} s; anonymous memory"
    )
    print(
        f"rose from {before:.2f} by at most {rise:.2f} GiB; the buffer has {cfg.buffer_gb:.2f} GiB"
    )
