"""The shuffle buffer: rows of files read by background threads in large blocks, and given out in
seeded random batches.

What comes is fixed by the seed, the buffer's size and the rows alone, so it can start anywhere, and
processes that each have a buffer agree on it.

    fits     the rows fit the buffer: read once, shuffled as a whole every epoch.
    else     the blocks of an epoch are permuted and cut into S parts of an eighth of the buffer, a slab. In stage t, parts t to
             t + 6 are in memory and t + 7 is read into the slab that is free. A part gives a share of its rows to each stage
             in which it is there (7; at the ends of an epoch fewer), and a stage shuffles all that it was given.

Two rows of one block meet in a batch 1.15 to 1.45 x (bytes of the rows / buffer) times as often as
by chance. Rows are bytes here; store/dataset.py knows what is in them.
"""

import mmap
import os
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache

import numpy as np
import torch
from tqdm import tqdm

from store.disk import fill

BLOCK_BYTES = (
    1 << 20
)  # read at once: large enough for a sequential read's speed, small enough to mix prompts
SLABS = 8
READERS, GATHERERS = 4, 2  # threads; reading is mostly waiting
SMALL = 1 << 20  # bytes of a batch that are gathered sooner than another thread is told to


def cut(units, most):
    """Blocks (n, 3) - file, first row, end row - of at most so many rows that cover the units,
    which adjoining ones share."""
    units = units[units[:, 1] < units[:, 2]]
    joined = (units[1:, 0] == units[:-1, 0]) & (units[1:, 1] == units[:-1, 2])
    begins, ends = np.append(True, ~joined), np.append(~joined, True)
    file, first, end = units[begins, 0], units[begins, 1], units[ends, 2]
    counts = -(-(end - first) // most)
    run = np.arange(len(file)).repeat(counts)
    first = first[run] + most * (np.arange(len(run)) - (np.cumsum(counts) - counts)[run])
    return np.stack([file[run], first, np.minimum(first + most, end[run])], 1)


def permutation(rng, n, most=0):
    """rng.permutation(n), in 32 bits where they hold n and `most`."""
    order = np.arange(n, dtype=np.int32 if max(n, most) < 2**31 else np.int64)
    rng.shuffle(order)
    return order


def shuffle(steps, seed):
    """A random order (n,) of rows of these steps (n,), in which the steps take turns. Takes 24
    bytes a row while it works."""
    rng = np.random.default_rng(seed)
    order = permutation(rng, len(steps))
    if len(counts := np.bincount(steps)) > 1:
        order = order[np.argsort(steps[order], kind="stable")]
        place, ends = np.empty(len(steps)), np.cumsum(counts)
        for count, end in zip(counts.tolist(), ends.tolist()):
            here = place[end - count : end]
            rng.random(out=here)
            here += np.arange(count)
            here /= max(count, 1)
        order = order[np.argsort(place)]
    return order


def allocate(num_bytes):
    """Memory (num_bytes,) uint8, in large pages where there are such: rows are gathered a third
    faster from them."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(num_bytes, dtype=torch.uint8)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


class Plan:
    """What is in memory when, and what order it comes in: arithmetic alone. Counted in groups,
    `tokens` rows that stay together.

    Parts and stages are numbered through all epochs: part e S + p is the p-th of epoch e. A part's
    place in the buffer is fixed by its number.
    """

    def __init__(self, units, steps_of, row_bytes, tokens, buffer_bytes, seed):
        self.steps_of, self.tokens, self.seed, self.drawn = steps_of, tokens, seed, {}
        self.group_bytes = row_bytes * tokens
        self.total = int((units[:, 2] - units[:, 1]).sum()) // tokens
        self.slab = max(2, int(buffer_bytes // (SLABS * self.group_bytes)))
        most = max(1, min(BLOCK_BYTES // self.group_bytes, self.slab // 8))
        self.blocks = cut(units, most * tokens)
        self.fits = self.total <= SLABS * self.slab
        self.parts = 1 if self.fits else -(-self.total // (self.slab - most))
        self.resident = 1 if self.fits else SLABS - 1
        self.stages = self.parts - self.resident + 1
        self.size = self.total if self.fits else SLABS * self.slab
        self.given_by = self.shares()
        self.epoch = lru_cache(2)(self._epoch)

    def _epoch(self, epoch):
        """The order of the blocks, where each part ends in it (parts + 1,), and the groups of each
        part (parts,)."""
        if self.fits:
            return (
                np.arange(len(self.blocks)),
                np.array([0, len(self.blocks)]),
                np.array([self.total]),
            )
        order = (
            np.random.default_rng([self.seed, 2, epoch])
            .permutation(len(self.blocks))
            .astype(np.int32)
        )
        ends = np.cumsum((self.blocks[order, 2] - self.blocks[order, 1]) // self.tokens)
        cuts = np.searchsorted(ends, np.arange(1, self.parts) * self.total // self.parts)
        cuts = np.concatenate([[0], cuts, [len(order)]])
        sizes = np.diff(np.append(0, ends)[cuts])
        assert sizes.max() <= self.slab
        return order, cuts, sizes

    def pieces(self, part):
        """The blocks of a part."""
        order, cuts, _ = self.epoch(part // self.parts)
        p = part % self.parts
        return self.blocks[order[cuts[p] : cuts[p + 1]]]

    def place(self, part):
        """The group of the buffer at which a part begins."""
        return 0 if self.fits else part % SLABS * self.slab

    def window(self, stage):
        """First and last part in memory during a stage."""
        first = 0 if self.fits else stage // self.stages * self.parts + stage % self.stages
        return first, first + self.resident - 1

    def shares(self):
        """Which part of its groups a part has given before and with the j-th of the stages in which
        it is there: (S, 1 + 7).

        Equal shares would crowd those parts that are there for few stages: two of their groups met
        1.6 times as often as the buffer's size explains. The chance is least for shares as large as
        the stages are, which these go towards.
        """
        p, j = np.arange(self.parts)[:, None], np.arange(self.resident)
        t = p - (self.resident - 1) + j
        there = (t >= 0) & (t < self.stages)
        sizes = np.ones(self.stages)
        for _ in range(4):
            shares = np.where(there, sizes[t.clip(0, self.stages - 1)], 0)
            shares /= shares.sum(1, keepdims=True)
            sizes = np.bincount(t[there], shares[there], self.stages)
        return np.pad(np.cumsum(shares, 1), ((0, 0), (1, 0))).round(9)

    def given(self, size, p, t):
        """Of a part's `size` groups, in an order of their own, those that it gives to stage t: from
        and to."""
        j = t - p + self.resident - 1
        return (size * self.given_by[p, j]).astype(np.int64), (
            size * self.given_by[p, j + 1]
        ).astype(np.int64)

    def find(self, group):
        """The stage in which an endless shuffle's group comes, and how many come in that stage
        before it."""
        epoch, left = divmod(group, self.total)
        sizes, t = self.epoch(epoch)[2], np.arange(self.stages)
        counts = np.zeros(self.stages, np.int64)
        for r in range(self.resident):
            low, high = self.given(sizes[t + r], t + r, t)
            counts += high - low
        ends = np.cumsum(counts)
        t = int(np.searchsorted(ends, left, side="right"))
        return epoch * self.stages + t, int(left - (ends[t] - counts[t]))

    def draw(self, part):
        """A part's own order of its groups, as places in the buffer (None: all in a row), and their
        steps."""
        pieces = self.pieces(part)
        some = np.array_split(pieces, -(-len(pieces) // 64))  # 64 bits a row for few at a time
        steps = np.concatenate(
            [self.steps_of(pieces)[:: self.tokens].astype(np.int16) for pieces in some]
        )
        if self.fits:
            return None, steps
        order = permutation(np.random.default_rng([self.seed, 4, part]), len(steps), self.size)
        return self.place(part) + order, steps[order]

    def order(self, stage):
        """Where in the buffer each group of a stage is, in the order that they come in, and its
        step: (n,), (n,)."""
        t, (first, last) = stage % self.stages, self.window(stage)
        self.drawn = {
            part: self.drawn.get(part) or self.draw(part) for part in range(first, last + 1)
        }
        if self.fits:
            steps = self.drawn[first][1]
            order = shuffle(steps, [self.seed, 3, stage])
            return order, steps[order]
        found = []
        for part, drawn in self.drawn.items():
            low, high = self.given(len(drawn[0]), part % self.parts, t)
            found.append([array[low:high] for array in drawn])
        places, steps = map(np.concatenate, zip(*found))
        order = shuffle(steps, [self.seed, 3, stage])
        return places[order], steps[order]


class Reader:
    """Endless shuffled rows of files, from a buffer in memory.

    files: StoredRows of one width and dtype; units (n, 3): file, first row, end row, of what is
    read; steps_of(pieces): the step of each of their rows, at most 32,767. The rest as in
    `Activations.batches`.
    """

    def __init__(self, files, units, steps_of, tokens, seed, buffer_gb, pin=False):
        self.files, self.tokens, self.pin = files, tokens, pin
        self.row_bytes = files[0].row_bytes
        self.plan = Plan(units, steps_of, self.row_bytes, tokens, buffer_gb * 2**30, seed)
        self.buffer = allocate(self.plan.size * self.plan.group_bytes).numpy()
        self.reads, self.orders = {}, {}
        self.silent = False  # no progress bar

    def batches(self, batch_size, stop, start, share, ahead):
        """(rows (n, row_bytes) uint8, their steps (n,) int64) of each batch: what is this process'
        share of it."""
        tokens, (mine, many) = self.tokens, share
        self.silent = mine > 0
        assert not start % tokens and not stop % tokens and not batch_size % tokens
        start, stop, size = start // tokens, stop // tokens, batch_size // tokens
        if start >= stop:
            return
        waiting = deque()  # batches that are being gathered: rows, steps, and the tasks
        paths, finalizing = {file.path for file in self.files}, sys.is_finalizing
        self.open_files = {path: os.open(path, os.O_RDONLY) for path in paths}
        for file in self.files:
            file.check_stamp(self.open_files[file.path])
        self.readers, self.gatherers = (
            ThreadPoolExecutor(READERS, "reader"),
            ThreadPoolExecutor(GATHERERS, "gatherer"),
        )
        try:
            (stage, at), (self.last, _) = self.plan.find(start), self.plan.find(stop - 1)
            order, steps = self.enter(stage)
            while start < stop or waiting:
                while start < stop and len(waiting) <= ahead:
                    n, done = min(size, stop - start), 0
                    low, high = n * mine // many, n * (mine + 1) // many
                    rows, taken, tasks = self.memory((high - low) * self.plan.group_bytes), [], []
                    waiting.append((rows, taken, tasks))
                    while done < n:
                        if at == len(order):
                            for (
                                *_,
                                others,
                            ) in waiting:  # the next stage may read over what these still need
                                for task in others:
                                    task.result()
                            stage, at = stage + 1, 0
                            order, steps = self.enter(stage)
                        take = min(n - done, len(order) - at)
                        first, end = max(done, low), min(done + take, high)
                        if first < end:
                            here = slice(at + first - done, at + end - done)
                            if (end - first) * self.plan.group_bytes < SMALL:
                                self.gather(order[here], rows, first - low)
                            else:
                                tasks.append(
                                    self.gatherers.submit(
                                        self.gather, order[here], rows, first - low
                                    )
                                )
                            taken.append(steps[here])
                        at, done = at + take, done + take
                    start += n
                rows, taken, tasks = waiting.popleft()
                for task in tasks:
                    task.result()
                step = torch.from_numpy(
                    np.concatenate([*taken, steps[:0]]).repeat(tokens).astype(np.int64)
                )
                yield rows[: len(step) * self.row_bytes].view(len(step), self.row_bytes), step
        finally:
            if not finalizing():  # else the threads have ended, and half of Python with them
                for pool in (self.readers, self.gatherers):
                    pool.shutdown(cancel_futures=True)
                for fd in self.open_files.values():
                    os.close(fd)

    def enter(self, stage):
        """Wait until the parts of a stage are in memory, ask for what the next one needs, and
        return its order."""
        plan, (first, last) = self.plan, self.plan.window(stage)
        if stage not in self.orders:
            self.orders[stage] = self.readers.submit(plan.order, stage)
        self.wait()
        if any(
            part not in self.reads for part in range(first, last + 1)
        ):  # the beginning, also of an epoch
            self.ask(first, last)
            self.wait()
        order = self.orders.pop(stage).result()
        self.reads = {part: tasks for part, tasks in self.reads.items() if part >= first}
        if stage < self.last:
            self.orders[stage + 1] = self.readers.submit(plan.order, stage + 1)
            self.ask(last + 1, min(plan.window(stage + 1)[1], first + SLABS - 1))
        return order

    def ask(self, first, last):
        """Read parts in the background."""
        for part in range(first, last + 1):
            if part not in self.reads:
                pieces = self.plan.pieces(part)
                sizes = (pieces[:, 2] - pieces[:, 1]) * self.row_bytes
                at = self.plan.place(part) * self.plan.group_bytes + np.cumsum(sizes) - sizes
                self.reads[part] = [
                    self.readers.submit(self.read, *piece, at)
                    for piece, at in zip(pieces.tolist(), at.tolist())
                ]

    def wait(self):
        """Until all that was asked for is there."""
        tasks = [task for tasks in self.reads.values() for task in tasks]
        for task in tqdm(tasks, "reading", unit="block", leave=False, delay=2, disable=self.silent):
            task.result()
        self.reads = dict.fromkeys(self.reads, ())

    def read(self, number, first, end, at):
        """Copy rows of a file into the buffer, whose byte `at` is where the first goes."""
        file = self.files[number]
        memory = memoryview(self.buffer)[at : at + (end - first) * self.row_bytes]
        fill(self.open_files[file.path], memory, file.offset + first * self.row_bytes, file.path)

    def gather(self, places, rows, at):
        """Copy groups from the buffer; NumPy's own thread, so that PyTorch's are left to the
        training."""
        size = self.plan.group_bytes
        out = rows.numpy()[at * size : (at + len(places)) * size].reshape(len(places), size)
        np.take(
            self.buffer.reshape(-1, size), places, axis=0, out=out, mode="clip"
        )  # clip: no copy between

    def memory(self, num_bytes):
        """Fresh memory for a batch, uint8: of PyTorch's cache of pinned memory, or of NumPy, which
        asks for large pages."""
        if self.pin:
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        return torch.from_numpy(np.empty(num_bytes, np.uint8))
