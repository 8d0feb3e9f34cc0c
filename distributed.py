"""The processes that torchrun started together: which one this is, and what they tell each other.

    torchrun --nproc_per_node 4 collect.py ...
    torchrun --nnodes 2 --nproc_per_node 4 --rdzv_backend c10d --rdzv_endpoint first-machine:29500 train.py ...

Without torchrun there is one process, and everything here is free. Messages are JSON, never
pickles.

Work of any length may lie between two messages, so waiting has no limit as long as the other
processes live. Each one gives a sign of life every few seconds from a thread of its own; a process
that hears nothing of another one for minutes ends itself. On one machine torchrun does that, and
where a process dies its connections tell; a machine that loses power tells nobody.
"""

import atexit
import itertools
import json
import os
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

FOREVER = timedelta(days=30)
START = 600.0  # seconds in which all processes have to be there
NOTE = 30.0  # seconds of waiting after which a line says for whom
BEAT = 5.0  # seconds between two signs of life
SILENCE = 300.0  # seconds without one, after which a process counts as gone


class Group:
    """Some of the processes, of which this is number `index` of `count`. Alone, every method gives
    back what it gets."""

    def __init__(self, ranks=(0,), rank=0, group=None, device="cpu"):
        self.index, self.count, self.ranks, self.group, self.device = (
            ranks.index(rank),
            len(ranks),
            ranks,
            group,
            device,
        )

    def part(self, n):
        """Which of n things, shared out in contiguous parts, are this process's: a slice."""
        return slice(n * self.index // self.count, n * (self.index + 1) // self.count)

    def sum(self, x):
        """The sum of every process's x, in place, the same bits in all."""
        if self.count > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def sum_all(self, *tensors):
        """The sums of several small tensors of one dtype, in one message."""
        if self.count == 1:
            return tensors
        sums = self.sum(torch.cat([x.flatten() for x in tensors])).split(
            [x.numel() for x in tensors]
        )
        return tuple(total.view(x.shape) for total, x in zip(sums, tensors))

    def side_by_side(self, x):
        """Every process's x (n, k), of one shape: (n, count k)."""
        if self.count == 1:
            return x
        every = [
            torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.count)
        ]
        dist.all_gather(every, x.contiguous(), group=self.group)
        return torch.cat(every, dim=1)

    def share(self, x):
        """The first process's x, in place."""
        if self.count > 1:
            dist.broadcast(x, self.ranks[0], self.group)
        return x


ALONE = Group()


def connect(number: int, is_host: bool) -> dist.Store:
    """The store of the group `number` of this process (0, 1, ...). Raises OSError where its machine
    can't be reached.

    Unlike `dist.rendezvous` this does not wait for the other processes, so that `Processes` can say
    for which it waits.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    limit = timedelta(seconds=START)
    try:
        store = dist.TCPStore(
            address,
            port,
            is_master=is_host,
            wait_for_workers=False,
            timeout=limit,
            multi_tenant=True,
        )
    except RuntimeError as error:
        raise OSError(
            f"{address}:{port}, the first process, can't be reached: {str(error).splitlines()[0]}"
        ) from None
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"attempt_{attempt}/{number}", store)


class Heartbeat:
    """Signs of life of this process for the others, and the end of this process where one of them
    gives none any more.

    One thread talks to torchrun's store, by a connection of its own, since one that waits for a
    message blocks the other; it also waits for ever where the store's machine is dead. So a second
    thread looks at the clock.
    """

    def __init__(self, number: int, rank: int, count: int) -> None:
        self.rank, self.count = rank, count
        self.store = connect(number, is_host=False)
        self.stopped = threading.Event()
        self.heard = dict.fromkeys(
            range(count), time.monotonic()
        )  # when: of this process, the store's last answer
        threading.Thread(target=self.talk, daemon=True).start()
        threading.Thread(target=self.watch, daemon=True).start()
        atexit.register(self.stop)

    def talk(self) -> None:
        """Give signs of life and look for those of the others, until `stop`, or until the store is
        gone."""
        others = [rank for rank in range(self.count) if rank != self.rank]
        last, number = dict.fromkeys(others), 0
        while not self.stopped.wait(BEAT):
            number += 1
            try:
                self.store.set(f"life/{self.rank}", str(number))
                for rank in others:
                    key = f"life/{rank}"
                    sign = self.store.get(key) if self.store.check([key]) else None
                    if sign != last[rank]:
                        last[rank], self.heard[rank] = sign, time.monotonic()
            except RuntimeError:  # `watch` ends the process, unless its work is done before
                return
            self.heard[self.rank] = time.monotonic()

    def watch(self) -> None:
        """End this process where nothing was heard for SILENCE seconds, of another process or of
        the store."""
        before = time.monotonic()
        while not self.stopped.wait(BEAT):
            now = time.monotonic()
            if now - before > SILENCE / 2:  # this process itself was asleep
                self.heard = dict.fromkeys(self.heard, now)
            before = now
            if now - self.heard[self.rank] > SILENCE:
                self.end_process(
                    f"the machine of the first process did not answer for {SILENCE:.0f} s"
                )
            for rank, when in self.heard.items():
                if now - when > SILENCE + 2 * BEAT:
                    self.end_process(f"process {rank} gave no sign of life for {SILENCE:.0f} s")

    def end_process(self, reason: str) -> None:
        """Say the reason and end this process, which waits for the other in a call that can't be
        interrupted."""
        program = Path(sys.argv[0]).name
        line = f"{program} (process {self.rank} of {self.count}): error: {reason}; the same command resumes\n"
        os.write(2, line.encode())
        os._exit(2)

    def has_left(self, rank: int) -> bool:
        """Whether another process has ended, in order or by an exception."""
        return self.store.check([f"left/{rank}"])

    def stop(self) -> None:
        """Tell the others that this process gives no more signs of life."""
        if not self.stopped.is_set():
            self.stopped.set()
            with suppress(RuntimeError):  # the store is gone already
                self.store.set(f"left/{self.rank}", "")


class Processes:
    """Who is there: process `rank` of `count`; of them `local_rank` of `local_count` on this
    machine, `node` of `nodes`.

    device: this process's own GPU, where "cuda" was asked for.

    Joins the group that torchrun's variables name: gloo for what is on CPUs, nccl for what is on
    GPUs. Raises OSError where another process is not there after START seconds, and in `tell` where
    one has ended; see also `Heartbeat`. One may follow another after its `close`, in the same order
    in every process.
    """

    made = itertools.count()  # groups of this process: each has keys of its own in torchrun's store

    def __init__(self, device="cpu"):
        read = lambda name, default: int(os.environ.get(name, default))
        self.rank, self.count = read("RANK", 0), read("WORLD_SIZE", 1)
        self.local_rank, self.local_count = read("LOCAL_RANK", 0), read("LOCAL_WORLD_SIZE", 1)
        self.node, self.nodes = read("GROUP_RANK", 0), read("GROUP_WORLD_SIZE", 1)
        self.device = torch.device(device)
        if self.count > 1 and self.device == torch.device("cuda"):
            self.device = torch.device("cuda", self.local_rank)
            torch.cuda.set_device(self.device)
        self.said, self.here, self.numbers = 0, None, {}
        if self.count == 1:
            return
        has_own_host = (
            os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        )  # that of torchrun itself
        number = next(Processes.made)
        self.store = connect(number, is_host=self.rank == 0 and not has_own_host)
        self.wait_for_all()
        self.heartbeat = Heartbeat(number, self.rank, self.count)
        self.store.set_timeout(FOREVER)
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=self.store, rank=self.rank, world_size=self.count, timeout=FOREVER
        )
        machines = self.tell(self.node)
        for node in sorted(set(machines)):  # every process has to make every group
            group = dist.new_group(
                [r for r, n in enumerate(machines) if n == node], FOREVER, "gloo"
            )
            self.here = group if node == self.node else self.here

    def wait_for_all(self):
        """Until every process has come this far. Raises OSError, which names one that has not,
        after START seconds."""
        began, noted = time.monotonic(), time.monotonic()
        self.store.set(f"here/{self.rank}", "")
        for rank in range(self.count):
            while not self.store.check([f"here/{rank}"]):
                now = time.monotonic()
                if now - began > START:
                    raise OSError(
                        f"process {rank} of {self.count} did not start within {START:.0f} s; see what it says"
                    )
                if now - noted > NOTE and self.local_rank == 0:
                    noted = now
                    print(
                        f"waiting for process {rank} of {self.count}; {now - began:.0f} s so far",
                        file=sys.stderr,
                    )
                time.sleep(0.05)

    def receive(self, key, rank):
        """What process `rank` has set, or will set, under a key of the store. Raises OSError if it
        ends before."""
        pause = 0.001
        while not self.store.check([key]):  # `wait` with a limit prints warnings
            if self.heartbeat.has_left(rank) and not self.store.check([key]):
                raise OSError(
                    f"process {rank} of {self.count} has ended; see what it says, the same command resumes"
                )
            time.sleep(pause)
            pause = min(2 * pause, 0.2)
        return self.store.get(key)

    def tell(self, value):
        """Every process's value, by rank; all have to call it. Values are what JSON can hold."""
        if self.count == 1:
            return [value]
        self.said += 1
        self.store.set(f"{self.said}/{self.rank}", json.dumps(value))
        return [json.loads(self.receive(f"{self.said}/{rank}", rank)) for rank in range(self.count)]

    def any(self, value):
        """Whether the value is true in any process; all have to ask."""
        if self.count == 1:
            return bool(value)
        dist.all_reduce(found := torch.tensor([float(bool(value))]))
        return bool(found)

    def next(self, name):
        """0, 1, 2, ...: no two processes of the group get the same number under a name."""
        if self.count > 1:
            return self.store.add(f"next/{name}", 1) - 1
        self.numbers[name] = self.numbers.get(name, -1) + 1
        return self.numbers[name]

    def barrier(self, local=False):
        """Wait until every process, or every one on this machine, is here."""
        if self.count > 1:
            dist.all_reduce(torch.zeros(1), group=self.here if local else None)

    def close(self):
        if self.count > 1:
            self.heartbeat.stop()
            dist.destroy_process_group()
