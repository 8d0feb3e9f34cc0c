"""The processes that torchrun started together: which one this is, and what they tell each other.

    torchrun --nproc_per_node 4 collect.py ...
    torchrun --nnodes 2 --nproc_per_node 4 --rdzv_backend c10d --rdzv_endpoint first-machine:29500 train.py ...

Without torchrun there is one process, and everything here is free. Messages are JSON, never pickles.
"""

import json
import os
from datetime import timedelta

import torch
import torch.distributed as dist

FOREVER = timedelta(days=30)


class Group:
    """Some of the processes, of which this is number `index` of `count`. Alone, every method gives back what it gets."""

    def __init__(self, ranks=(0,), rank=0, group=None, device="cpu"):
        self.index, self.count, self.ranks, self.group, self.device = ranks.index(rank), len(ranks), ranks, group, device

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
        sums = self.sum(torch.cat([x.flatten() for x in tensors])).split([x.numel() for x in tensors])
        return tuple(total.view(x.shape) for total, x in zip(sums, tensors))

    def side_by_side(self, x):
        """Every process's x (n, k), of one shape: (n, count k)."""
        if self.count == 1:
            return x
        every = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.count)]
        dist.all_gather(every, x.contiguous(), group=self.group)
        return torch.cat(every, dim=1)

    def share(self, x):
        """The first process's x, in place."""
        if self.count > 1:
            dist.broadcast(x, self.ranks[0], self.group)
        return x


ALONE = Group()


class Processes:
    """Who is there: process `rank` of `count`; of them `local_rank` of `local_count` on this machine, `node` of `nodes`.

    device: this process's own GPU, where "cuda" was asked for.

    Joins the group that torchrun's variables name: gloo for what is on CPUs, nccl for what is on GPUs. A process that dies takes
    the others with it (torchrun ends them), so nothing here times out.
    """

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
        self.store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(minutes=10)))
        self.store.set_timeout(FOREVER)
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=self.store, rank=self.rank, world_size=self.count, timeout=FOREVER)
        machines = self.tell(self.node)
        for node in sorted(set(machines)):  # every process has to make every group
            group = dist.new_group([r for r, n in enumerate(machines) if n == node], FOREVER, "gloo")
            self.here = group if node == self.node else self.here

    def tell(self, value):
        """Every process's value, by rank; all have to call it. Values are what JSON can hold."""
        if self.count == 1:
            return [value]
        self.said += 1
        self.store.set(f"{self.said}/{self.rank}", json.dumps(value))
        return [json.loads(self.store.get(f"{self.said}/{rank}")) for rank in range(self.count)]

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
            dist.destroy_process_group()
