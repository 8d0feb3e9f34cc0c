"""The shuffle buffer: threads read rows of files in large blocks, and batches come out shuffled.

What comes is fixed by the seed, the buffer's size and the rows alone. So it can start at any
position, and processes that each have a buffer agree on it.

If all rows fit the buffer, they are read once, and every epoch shuffles them as a whole. Else the
blocks of an epoch are permuted and cut into S parts, each of an eighth of the buffer, a slab. In
stage t, the parts t to t + 6 are in memory, and part t + 7 is read into the slab that is free. A
part gives some of its rows to each of the 7 stages in which it is in memory (fewer at the ends of
an epoch), and a stage shuffles all rows that it was given. For S = 9 an epoch has three stages:

    stage   parts in memory    part that is read meanwhile
    0       0 1 2 3 4 5 6      7
    1       1 2 3 4 5 6 7      8
    2       2 3 4 5 6 7 8      0 of the next epoch, into the slab of part 1

Part 0 is in memory in stage 0 alone, and gives it all its rows. Part 1 gives 61 % of its rows to
stage 0 and 39 % to stage 1; the parts 2 to 6 give 38, 24 and 38 % to the three stages, which so
have the rows of 3.5, 2 and 3.5 parts. `Plan.shares` says why.

Reading goes on while batches are taken, the disk is read in blocks of 1 MB, and each batch mixes
rows of seven eighths of the buffer. Two rows of one block meet in a batch 1.15 to 1.45 x (bytes of
the rows / buffer) times as often as by chance. Rows are bytes here; store/dataset.py knows what
they hold.
"""

import mmap
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from store.activation_file import StoredRows
from store.disk import fill

# Read at once: large enough for the speed of a sequential read, small enough to mix prompts.
BLOCK_BYTES = 1 << 20
SLABS = 8  # of a buffer: seven hold the parts that are shuffled, one is read into
READERS = 4  # threads; reading is mostly waiting
GATHERERS = 2  # threads that copy the rows of batches
SMALL = 1 << 20  # bytes of a batch that are gathered sooner than another thread is told to


def cut(units: np.ndarray, most: int) -> np.ndarray:
    """Cut units into blocks of at most `most` rows: (n, 3), file, first row and end row of each.

    Adjoining units are joined first. For rows 0 to 3 and 3 to 10 of file 0, and 4, it gives
    [[0, 0, 4], [0, 4, 8], [0, 8, 10]].
    """
    units = units[units[:, 1] < units[:, 2]]
    same_file = units[1:, 0] == units[:-1, 0]
    is_joined = same_file & (units[1:, 1] == units[:-1, 2])
    begins = np.append(True, ~is_joined)
    ends = np.append(~is_joined, True)
    file = units[begins, 0]
    first = units[begins, 1]
    end = units[ends, 2]

    # each run of joined units becomes `num_blocks` blocks; `number` counts them from 0
    num_blocks = -(-(end - first) // most)
    run = np.arange(len(file)).repeat(num_blocks)
    blocks_before = np.cumsum(num_blocks) - num_blocks
    number = np.arange(len(run)) - blocks_before[run]
    starts = first[run] + most * number
    return np.stack([file[run], starts, np.minimum(starts + most, end[run])], 1)


def permutation(rng: np.random.Generator, n: int, most: int = 0) -> np.ndarray:
    """Return rng.permutation(n), as int32 where that can hold n and `most`, else as int64."""
    order = np.arange(n, dtype=np.int32 if max(n, most) < 2**31 else np.int64)
    rng.shuffle(order)
    return order


def shuffle(steps: np.ndarray, seed: int | list[int]) -> np.ndarray:
    """Return a random order (n,) of rows in which their `steps` (n,) take turns.

    Every stretch of the order holds about the same share of each step: the i-th of a step's m rows
    comes at a random place between i / m and (i + 1) / m of the whole. For steps 0 0 1 1 the first
    two places may hold a 0 and a 1, and the last two too. Takes 24 bytes per row while it works.
    """
    rng = np.random.default_rng(seed)
    order = permutation(rng, len(steps))
    counts = np.bincount(steps)
    if len(counts) <= 1:
        return order
    order = order[np.argsort(steps[order], kind="stable")]
    positions = np.empty(len(steps))
    ends = np.cumsum(counts)
    for count, end in zip(counts.tolist(), ends.tolist()):
        of_step = positions[end - count : end]  # a view, filled in place
        rng.random(out=of_step)
        of_step += np.arange(count)
        of_step /= max(count, 1)
    return order[np.argsort(positions)]


def allocate(num_bytes: int) -> torch.Tensor:
    """Return memory (num_bytes,) uint8, in large pages if the system has them.

    Rows are gathered a third faster from large pages.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(num_bytes, dtype=torch.uint8)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


class Epoch(NamedTuple):
    """How the blocks of one epoch are cut into parts."""

    order: np.ndarray
    """(blocks,): numbers of blocks, in the order of the epoch."""

    cuts: np.ndarray
    """(parts + 1,): part p holds the blocks order[cuts[p] : cuts[p + 1]]."""

    sizes: np.ndarray
    """(parts,): the groups of each part."""


class Plan:
    """What is in memory in each stage, and in what order it comes: arithmetic alone, no reading.

    It counts in groups: `tokens` rows that stay together. Parts and stages are numbered through all
    epochs: part e S + p is the p-th of epoch e. The slab of the buffer in which a part lies is
    fixed by its number.

    units (n, 3): file, first row, end row. steps_of(pieces): the step of each of their rows.
    """

    def __init__(
        self,
        units: np.ndarray,
        steps_of: Callable[[np.ndarray], np.ndarray],
        row_bytes: int,
        tokens: int,
        buffer_bytes: float,
        seed: int,
    ) -> None:
        self.steps_of = steps_of
        self.tokens = tokens
        self.seed = seed
        self.drawn = {}  # {part: what `draw` gave} of the stage that `order` was asked for last
        self.group_bytes = row_bytes * tokens
        self.total = int((units[:, 2] - units[:, 1]).sum()) // tokens  # groups of an epoch
        self.slab = max(2, int(buffer_bytes // (SLABS * self.group_bytes)))
        most = max(1, min(BLOCK_BYTES // self.group_bytes, self.slab // 8))  # groups of a block
        self.blocks = cut(units, most * tokens)
        self.fits = self.total <= SLABS * self.slab
        if self.fits:
            self.parts = 1
            self.resident = 1  # parts in memory during a stage
            self.size = self.total  # groups in the buffer
        else:
            # a part ends with a whole block, so it can be longer than the mean by one
            self.parts = -(-self.total // (self.slab - most))
            self.resident = SLABS - 1
            self.size = SLABS * self.slab
        self.stages = self.parts - self.resident + 1  # of an epoch
        self.shares_given = self.shares()
        self.epoch = lru_cache(2)(self.cut_epoch)

    def cut_epoch(self, epoch: int) -> Epoch:
        """Return the blocks of an epoch, permuted and cut into parts of nearly equal size."""
        if self.fits:
            whole = np.array([0, len(self.blocks)])
            return Epoch(np.arange(len(self.blocks)), whole, np.array([self.total]))
        rng = np.random.default_rng([self.seed, 2, epoch])
        order = rng.permutation(len(self.blocks)).astype(np.int32)
        ends = np.cumsum((self.blocks[order, 2] - self.blocks[order, 1]) // self.tokens)
        wanted_ends = np.arange(1, self.parts) * self.total // self.parts
        cuts = np.concatenate([[0], np.searchsorted(ends, wanted_ends), [len(order)]])
        sizes = np.diff(np.append(0, ends)[cuts])
        assert sizes.max() <= self.slab
        return Epoch(order, cuts, sizes)

    def pieces(self, part: int) -> np.ndarray:
        """Return the blocks of a part: (n, 3)."""
        order, cuts, _ = self.epoch(part // self.parts)
        p = part % self.parts
        return self.blocks[order[cuts[p] : cuts[p + 1]]]

    def first_group(self, part: int) -> int:
        """Return the group of the buffer at which a part begins: that of its slab."""
        if self.fits:
            return 0
        return part % SLABS * self.slab

    def window(self, stage: int) -> tuple[int, int]:
        """Return the first and the last part that are in memory during a stage."""
        first = 0
        if not self.fits:
            epoch, t = divmod(stage, self.stages)
            first = epoch * self.parts + t
        return first, first + self.resident - 1

    def shares(self) -> np.ndarray:
        """Return what share of its groups each part has given after each of its stages, in [0, 1]:
        (S, 1 + 7).

        Column j counts the stages in which the part is in memory: [p, j] is what part p has given
        before the j-th, [p, j + 1] what it has given with it. A part is the last in memory in its
        stage j = 0 and the first in j = 6; near the ends of an epoch some of these do not exist.

        Equal shares would crowd those parts that are in memory for few stages: two of their groups
        met 1.6 times as often as the buffer's size explains. The chance is least if a part's shares
        are proportional to the sizes of its stages. These follow from the shares, so a few rounds
        of one after the other come close.
        """
        p = np.arange(self.parts)[:, None]
        j = np.arange(self.resident)
        t = p - (self.resident - 1) + j  # the stage of the epoch
        exists = (t >= 0) & (t < self.stages)
        stage_sizes = np.ones(self.stages)
        for _ in range(4):
            shares = np.where(exists, stage_sizes[t.clip(0, self.stages - 1)], 0)
            shares /= shares.sum(1, keepdims=True)
            stage_sizes = np.bincount(t[exists], shares[exists], self.stages)
        return np.pad(np.cumsum(shares, 1), ((0, 0), (1, 0))).round(9)

    def groups_for_stage(
        self, size: np.ndarray | int, p: np.ndarray | int, t: np.ndarray | int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return which of its groups part p of an epoch gives to stage t of it: the first and the
        end, counted within the part.

        The part has `size` groups, in an order of its own (see `draw`). A part of 100 groups that
        gives 38, 24 and 38 % to the stages 0, 1 and 2 gives groups 38 to 62 to stage 1. Works on
        arrays too.
        """
        j = t - p + self.resident - 1
        first = (size * self.shares_given[p, j]).astype(np.int64)
        end = (size * self.shares_given[p, j + 1]).astype(np.int64)
        return first, end

    def stage_of_group(self, group: int) -> tuple[int, int]:
        """Return the stage in which a group comes, and its number among the groups of that stage.

        group: its number in the endless shuffle, from 0. Stages are numbered through all epochs.
        """
        epoch, position = divmod(group, self.total)
        sizes = self.epoch(epoch).sizes
        t = np.arange(self.stages)
        stage_sizes = np.zeros(self.stages, np.int64)
        for r in range(self.resident):
            first, end = self.groups_for_stage(sizes[t + r], t + r, t)
            stage_sizes += end - first
        ends = np.cumsum(stage_sizes)
        t = int(np.searchsorted(ends, position, side="right"))
        return epoch * self.stages + t, int(position - (ends[t] - stage_sizes[t]))

    def draw(self, part: int) -> tuple[np.ndarray | None, np.ndarray]:
        """Return a part's groups in a random order, and their steps: (n,) each.

        A group is named by its place in the buffer, counted in groups. If all rows fit the buffer,
        there is no such order but None, and the steps are those of the groups as they lie.
        """
        pieces = self.pieces(part)
        steps = []
        for some in np.array_split(pieces, -(-len(pieces) // 64)):  # few at a time: 64 bits per row
            steps.append(self.steps_of(some)[:: self.tokens].astype(np.int16))
        steps = np.concatenate(steps)
        if self.fits:
            return None, steps
        order = permutation(np.random.default_rng([self.seed, 4, part]), len(steps), self.size)
        return self.first_group(part) + order, steps[order]

    def order(self, stage: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the groups of a stage in the order in which they come, and their steps: (n,) each.

        A group is named by its place in the buffer, counted in groups.
        """
        first, last = self.window(stage)
        drawn = {}
        for part in range(first, last + 1):
            drawn[part] = self.drawn.get(part) or self.draw(part)
        self.drawn = drawn
        seed = [self.seed, 3, stage]
        if self.fits:
            steps = drawn[first][1]
            order = shuffle(steps, seed)
            return order, steps[order]
        groups = []
        steps = []
        for part, (part_groups, part_steps) in drawn.items():
            t = stage % self.stages
            begin, end = self.groups_for_stage(len(part_groups), part % self.parts, t)
            groups.append(part_groups[begin:end])
            steps.append(part_steps[begin:end])
        groups = np.concatenate(groups)
        steps = np.concatenate(steps)
        order = shuffle(steps, seed)
        return groups[order], steps[order]


class Batch:
    """One batch that is being gathered."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows  # bytes, filled by `tasks`
        self.steps: list[np.ndarray] = []
        self.tasks: list[Future] = []

    def wait_until_copied(self) -> None:
        """Wait until all rows are copied. Raises what a task raised."""
        for task in self.tasks:
            task.result()


class Reader:
    """Endless shuffled rows of files, from a buffer in memory.

    files: rows of one width and dtype. units (n, 3): file, first row and end row of what is read.
    steps_of(pieces): the step of each of their rows, at most 32,767. tokens, seed, buffer_gb, pin:
    see `Activations.batches`.
    """

    def __init__(
        self,
        files: list[StoredRows],
        units: np.ndarray,
        steps_of: Callable[[np.ndarray], np.ndarray],
        tokens: int,
        seed: int,
        buffer_gb: float,
        pin: bool = False,
    ) -> None:
        self.files = files
        self.tokens = tokens
        self.pin = pin
        self.row_bytes = files[0].row_bytes
        self.plan = Plan(units, steps_of, self.row_bytes, tokens, buffer_gb * 2**30, seed)
        self.buffer = allocate(self.plan.size * self.plan.group_bytes).numpy()
        self.reads = {}  # {part: tasks that read it}; () when it is in memory
        self.orders = {}  # {stage: the task that computes its order}
        self.silent = False  # no progress bar

    def batches(
        self, batch_size: int, stop: int, start: int, share: tuple[int, int], ahead: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (rows (n, row_bytes) uint8, their steps (n,) int64) of each batch.

        Only this process's share (i, n) of a batch is yielded. See `Activations.batches`.
        """
        tokens = self.tokens
        assert not start % tokens and not stop % tokens and not batch_size % tokens
        self.silent = share[0] > 0
        if start >= stop:
            return
        is_finalizing = sys.is_finalizing  # `sys` may be gone when Python ends
        self.open()
        try:
            yield from self.gather_batches(
                batch_size // tokens, stop // tokens, start // tokens, share, ahead
            )
        finally:
            if not is_finalizing():  # else the threads have ended, and half of Python with them
                self.readers.shutdown(cancel_futures=True)
                self.gatherers.shutdown(cancel_futures=True)
                for fd in self.open_files.values():
                    os.close(fd)

    def open(self) -> None:
        """Open the files and start the threads. Raises UsageError if a file was exchanged."""
        self.open_files = {}
        for path in {file.path for file in self.files}:
            self.open_files[path] = os.open(path, os.O_RDONLY)
        for file in self.files:
            file.check_stamp(self.open_files[file.path])
        self.readers = ThreadPoolExecutor(READERS, "reader")
        self.gatherers = ThreadPoolExecutor(GATHERERS, "gatherer")

    def gather_batches(
        self, size: int, stop: int, start: int, share: tuple[int, int], ahead: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield what `batches` describes; here `size`, `stop` and `start` count groups.

        While one batch is used, up to `ahead` more are being gathered.
        """
        self.stage, self.position = self.plan.stage_of_group(start)
        self.last, _ = self.plan.stage_of_group(stop - 1)
        self.order, self.steps = self.enter(self.stage)
        waiting: deque[Batch] = deque()
        while start < stop or waiting:
            while start < stop and len(waiting) <= ahead:
                num_groups = min(size, stop - start)
                self.begin_batch(num_groups, share, waiting)
                start += num_groups
            batch = waiting.popleft()
            batch.wait_until_copied()
            steps = np.concatenate([*batch.steps, self.steps[:0]]).repeat(self.tokens)
            step = torch.from_numpy(steps.astype(np.int64))
            num_bytes = len(step) * self.row_bytes
            yield batch.rows[:num_bytes].view(len(step), self.row_bytes), step

    def begin_batch(self, num_groups: int, share: tuple[int, int], waiting: deque[Batch]) -> None:
        """Append the batch of the next `num_groups` groups to those that are being gathered.

        A batch may span stages. Its groups `low` to `high` are this process's share; only these are
        gathered.
        """
        index, count = share
        low = num_groups * index // count
        high = num_groups * (index + 1) // count
        batch = Batch(self.memory((high - low) * self.plan.group_bytes))
        waiting.append(batch)
        done = 0
        while done < num_groups:
            if self.position == len(self.order):
                for other in waiting:  # the next stage may read over what these still need
                    other.wait_until_copied()
                self.stage += 1
                self.position = 0
                self.order, self.steps = self.enter(self.stage)
            taken = min(num_groups - done, len(self.order) - self.position)
            first = max(done, low)
            end = min(done + taken, high)
            if first < end:
                offset = self.position - done
                self.begin_gather(batch, first + offset, end + offset, first - low)
            self.position += taken
            done += taken

    def begin_gather(self, batch: Batch, first: int, end: int, at: int) -> None:
        """Copy the groups `first` to `end` of the stage's order to group `at` of a batch.

        A thread does it, unless the work is small.
        """
        groups = self.order[first:end]
        if len(groups) * self.plan.group_bytes < SMALL:
            self.gather(groups, batch.rows, at)
        else:
            batch.tasks.append(self.gatherers.submit(self.gather, groups, batch.rows, at))
        batch.steps.append(self.steps[first:end])

    def enter(self, stage: int) -> tuple[np.ndarray, np.ndarray]:
        """Wait until the parts of a stage are in memory, and return its order (see `Plan.order`).

        The reading of the part that the next stage needs is started, and so is the computing of
        that stage's order.
        """
        first, last = self.plan.window(stage)
        if stage not in self.orders:
            self.orders[stage] = self.readers.submit(self.plan.order, stage)
        self.wait_until_read()
        if any(part not in self.reads for part in range(first, last + 1)):
            self.start_reading(first, last)  # the beginning, also that of an epoch
            self.wait_until_read()
        order = self.orders.pop(stage).result()
        self.reads = {part: tasks for part, tasks in self.reads.items() if part >= first}
        if stage < self.last:
            self.orders[stage + 1] = self.readers.submit(self.plan.order, stage + 1)
            next_last = self.plan.window(stage + 1)[1]
            last_with_slab = first + SLABS - 1
            self.start_reading(last + 1, min(next_last, last_with_slab))
        return order

    def start_reading(self, first: int, last: int) -> None:
        """Read the parts `first` to `last` in the background, without those that are in memory or
        being read already."""
        for part in range(first, last + 1):
            if part in self.reads:
                continue
            pieces = self.plan.pieces(part)
            sizes = (pieces[:, 2] - pieces[:, 1]) * self.row_bytes
            part_begins = self.plan.first_group(part) * self.plan.group_bytes
            begins = part_begins + np.cumsum(sizes) - sizes
            tasks = []
            for piece, begin in zip(pieces.tolist(), begins.tolist()):
                tasks.append(self.readers.submit(self.read, *piece, begin))
            self.reads[part] = tasks

    def wait_until_read(self) -> None:
        """Wait until all parts whose reading was started are in memory."""
        tasks = []
        for part_tasks in self.reads.values():
            tasks += part_tasks
        for task in tqdm(tasks, "reading", unit="block", leave=False, delay=2, disable=self.silent):
            task.result()
        self.reads = dict.fromkeys(self.reads, ())

    def read(self, number: int, first: int, end: int, begin: int) -> None:
        """Copy rows `first` to `end` of file `number` into the buffer, from the buffer's byte
        `begin` on."""
        file = self.files[number]
        memory = memoryview(self.buffer)[begin : begin + (end - first) * self.row_bytes]
        fill(self.open_files[file.path], memory, file.offset + first * self.row_bytes, file.path)

    def gather(self, groups: np.ndarray, rows: torch.Tensor, at: int) -> None:
        """Copy groups of the buffer to group `at` of a batch's rows.

        NumPy does it in this one thread, so that PyTorch's threads are left to the training.
        """
        size = self.plan.group_bytes
        out = rows.numpy()[at * size : (at + len(groups)) * size].reshape(len(groups), size)
        buffer = self.buffer.reshape(-1, size)
        np.take(buffer, groups, axis=0, out=out, mode="clip")  # clip: no copy between

    def memory(self, num_bytes: int) -> torch.Tensor:
        """Return memory for a batch, uint8: of PyTorch's cache of pinned memory, or of NumPy, which
        asks for large pages.
        """
        if self.pin:
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        return torch.from_numpy(np.empty(num_bytes, np.uint8))
