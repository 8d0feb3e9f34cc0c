"""The processes that torchrun started together: which one this is, and what they exchange.

    torchrun --nproc_per_node 4 collect.py ...
    torchrun --nnodes 2 --node_rank 0 --nproc_per_node 4 --master_addr first-machine \\
        --master_port 29500 train.py ...            # on the second machine: --node_rank 1

`Processes` is all of them, and exchanges small JSON values, never pickles. A `Group` is some of
them, and exchanges tensors. Without torchrun there is one process, and every call returns at once.

Work of any length may lie between two messages, so a process waits without a limit as long as the
other processes live. Each one gives a sign of life every few seconds from a thread of its own
(`Heartbeat`); a process that hears nothing of another one for minutes ends itself. This is needed
for several machines: on one machine torchrun ends the others, and the connections of a process that
dies are closed. A machine that loses power closes nothing.
"""

import atexit
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

FOREVER = timedelta(days=30)
START = 600.0  # seconds in which all processes have to start
NOTE = 30.0  # seconds of waiting after which a line says for which process
BEAT = 5.0  # seconds between two signs of life
SILENCE = 300.0  # seconds without one, after which a process counts as gone


class Group:
    """Some of the processes, which exchange tensors. Alone, every method returns what it is given.

    index, count: this process is number `index` of the `count` in the group. ranks: their numbers
    among all processes, `rank` that of this one. group: torch's process group. device: where the
    tensors are. A method that exchanges something has to be called by all processes of the group.
    """

    def __init__(
        self,
        ranks: Sequence[int] = (0,),
        rank: int = 0,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.index = ranks.index(rank)
        self.count = len(ranks)
        self.ranks = ranks
        self.group = group
        self.device = device

    def slice_of(self, n: int) -> slice:
        """Return which of n things are this process's, if each gets a contiguous part.

        For 10 things and 4 processes these are 0 to 2, 2 to 5, 5 to 7 and 7 to 10.
        """
        return slice(n * self.index // self.count, n * (self.index + 1) // self.count)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Add up the x of all processes in place, and return it; it has the same bits in each."""
        if self.count > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def sum_all(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the `sum` of each of several small tensors of one dtype; they are one message."""
        if self.count == 1:
            return tensors
        flat = torch.cat([x.flatten() for x in tensors])
        sums = self.sum(flat).split([x.numel() for x in tensors])
        return tuple(total.view(x.shape) for total, x in zip(sums, tensors))

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Return the x (n, k) of all processes beside each other: (n, count k).

        The shape has to be the same in all.
        """
        if self.count == 1:
            return x
        gathered = []
        for _ in range(self.count):
            gathered.append(torch.empty_like(x, memory_format=torch.contiguous_format))
        dist.all_gather(gathered, x.contiguous(), group=self.group)
        return torch.cat(gathered, dim=1)

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """Overwrite x with the first process's x, and return it."""
        if self.count > 1:
            dist.broadcast(x, self.ranks[0], self.group)
        return x


ALONE = Group()


def connect(number: int, is_host: bool) -> dist.Store:
    """Return torchrun's store: a dictionary on the first machine that all processes read and write.

    number: which `Processes` of this process it is for (0, 1, ...); each has keys of its own.
    is_host: this process runs the store. Unlike `dist.rendezvous` it does not wait for the other
    processes, so that `Processes` can say for which it waits. Raises OSError if the machine can't
    be reached.
    """
    address = os.environ["MASTER_ADDR"]
    port = int(os.environ["MASTER_PORT"])
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
    """Gives signs of life of this process, and ends it when another process gives none any more.

    One thread talks to torchrun's store. It has a connection of its own, because a connection on
    which somebody waits for a message is blocked. It would wait for ever if the store's machine
    were dead, so a second thread looks at the clock.
    """

    def __init__(self, number: int, rank: int, count: int) -> None:
        self.rank = rank
        self.count = count
        self.store = connect(number, is_host=False)
        self.stopped = threading.Event()
        # when each process was last heard of; for this process: when the store last answered
        self.heard = dict.fromkeys(range(count), time.monotonic())
        threading.Thread(target=self.talk, daemon=True).start()
        threading.Thread(target=self.watch, daemon=True).start()
        atexit.register(self.stop)

    def talk(self) -> None:
        """Give signs of life and look for those of the others, until `stop` or the store's end."""
        others = [rank for rank in range(self.count) if rank != self.rank]
        last_sign = dict.fromkeys(others)
        number = 0
        while not self.stopped.wait(BEAT):
            number += 1
            try:
                self.store.set(f"life/{self.rank}", str(number))
                for rank in others:
                    key = f"life/{rank}"
                    sign = self.store.get(key) if self.store.check([key]) else None
                    if sign != last_sign[rank]:
                        last_sign[rank] = sign
                        self.heard[rank] = time.monotonic()
            except RuntimeError:  # `watch` ends the process, unless its work is done before
                return
            self.heard[self.rank] = time.monotonic()

    def watch(self) -> None:
        """End this process if another process or the store was silent for SILENCE seconds."""
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
        """Print the reason and end this process with status 2.

        Its main thread waits for the other process in a call that can't be interrupted.
        """
        program = Path(sys.argv[0]).name
        process = f"process {self.rank} of {self.count}"
        line = f"{program} ({process}): error: {reason}; the same command resumes\n"
        os.write(2, line.encode())
        os._exit(2)

    def has_left(self, rank: int) -> bool:
        """Return whether another process has ended, in order or by an exception."""
        return self.store.check([f"left/{rank}"])

    def stop(self) -> None:
        """Tell the others that this process gives no more signs of life."""
        if not self.stopped.is_set():
            self.stopped.set()
            with suppress(RuntimeError):  # the store is gone already
                self.store.set(f"left/{self.rank}", "")


class Processes:
    """All processes that torchrun started; this one is `rank` of `count`.

    On this machine it is `local_rank` of `local_count`, and the machine is `node` of `nodes`.
    device: this process's own GPU if "cuda" was asked for, else what was asked for.

    Joins the group that torchrun's variables name: gloo exchanges what is on CPUs, nccl what is on
    GPUs. Raises OSError if another process has not started after START seconds, and in `all_gather`
    if one has ended; see also `Heartbeat`. After `close` another object may be made, in the same
    order in every process. A method that exchanges something has to be called by all processes.
    """

    made = (
        itertools.count()
    )  # objects of this process: each has keys of its own in torchrun's store

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.rank = read_variable("RANK", 0)
        self.count = read_variable("WORLD_SIZE", 1)
        self.local_rank = read_variable("LOCAL_RANK", 0)
        self.local_count = read_variable("LOCAL_WORLD_SIZE", 1)
        self.node = read_variable("GROUP_RANK", 0)
        self.nodes = read_variable("GROUP_WORLD_SIZE", 1)
        self.device = torch.device(device)
        if self.count > 1 and self.device == torch.device("cuda"):
            self.device = torch.device("cuda", self.local_rank)
            torch.cuda.set_device(self.device)
        self.num_gathered = 0  # values that `all_gather` has exchanged: each has a key of its own
        self.numbers = {}  # {name: the last number that `next` gave}, without torchrun
        self.machine_group = None  # the processes on this machine
        if self.count > 1:
            self.join()

    def join(self) -> None:
        """Wait for the other processes, and make torch's process groups."""
        # torchrun itself may run the store; else the first process does
        is_hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        number = next(Processes.made)
        self.store = connect(number, is_host=self.rank == 0 and not is_hosted)
        self.wait_for_all()
        self.heartbeat = Heartbeat(number, self.rank, self.count)
        self.store.set_timeout(FOREVER)
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=self.store, rank=self.rank, world_size=self.count, timeout=FOREVER
        )
        node_of = self.all_gather(self.node)
        for node in sorted(set(node_of)):  # every process has to make every group
            ranks = [rank for rank in range(self.count) if node_of[rank] == node]
            group = dist.new_group(ranks, FOREVER, "gloo")
            if node == self.node:
                self.machine_group = group

    def wait_for_all(self) -> None:
        """Return when every process has come this far.

        Raises OSError, which names one that has not, after START seconds.
        """
        began = time.monotonic()
        noted = began
        self.store.set(f"here/{self.rank}", "")
        for rank in range(self.count):
            while not self.store.check([f"here/{rank}"]):
                now = time.monotonic()
                waited = now - began
                if waited > START:
                    raise OSError(
                        f"process {rank} of {self.count} did not start within {START:.0f} s; "
                        "see what it says"
                    )
                if now - noted > NOTE and self.local_rank == 0:
                    noted = now
                    print(
                        f"waiting for process {rank} of {self.count}; {waited:.0f} s so far",
                        file=sys.stderr,
                    )
                time.sleep(0.05)

    def receive(self, key: str, rank: int) -> bytes:
        """Return what process `rank` has set, or will set, under a key of the store.

        Raises OSError if the process ends before.
        """
        pause = 0.001
        while not self.store.check([key]):  # `store.wait` with a limit prints warnings
            if self.heartbeat.has_left(rank) and not self.store.check([key]):
                raise OSError(
                    f"process {rank} of {self.count} has ended; "
                    "see what it says, the same command resumes"
                )
            time.sleep(pause)
            pause = min(2 * pause, 0.2)
        return self.store.get(key)

    def all_gather(self, value: object) -> list:
        """Return the value of every process, in the order of their ranks.

        In both of two processes, `all_gather(rank + 10)` gives [10, 11]. A value is anything that
        JSON can hold.
        """
        if self.count == 1:
            return [value]
        self.num_gathered += 1
        self.store.set(f"{self.num_gathered}/{self.rank}", json.dumps(value))
        values = []
        for rank in range(self.count):
            values.append(json.loads(self.receive(f"{self.num_gathered}/{rank}", rank)))
        return values

    def any(self, value: object) -> bool:
        """Return whether the value is true in any process."""
        if self.count == 1:
            return bool(value)
        total = torch.tensor([float(bool(value))])
        dist.all_reduce(total)
        return bool(total)

    def next(self, name: str) -> int:
        """Return 0, 1, 2, ...: under one name, no two processes get the same number.

        A process need not wait for the others to get its number.
        """
        if self.count > 1:
            return self.store.add(f"next/{name}", 1) - 1
        self.numbers[name] = self.numbers.get(name, -1) + 1
        return self.numbers[name]

    def barrier(self, local: bool = False) -> None:
        """Return when every process has called this; with `local`, every one on this machine."""
        if self.count > 1:
            group = self.machine_group if local else None
            dist.all_reduce(torch.zeros(1), group=group)

    def close(self) -> None:
        """Leave the group; the others are told that there will be no more signs of life."""
        if self.count > 1:
            self.heartbeat.stop()
            dist.destroy_process_group()


def read_variable(name: str, default: int) -> int:
    """Return the whole number in an environment variable, which torchrun sets."""
    return int(os.environ.get(name, default))
