"""An SAE whose latents are split over neighbouring processes: each holds the rows of its own
latents, of both matrices.

    torchrun --nproc_per_node 4 train.py --shard_latents 2             # 2 x 2: vectors and latents are split

`vectors` and `latents` are the two `distributed.Group`s that a process is in. What `ShardedSae` and
`ShardedUpdate` give is what `Sae` and `SparseUpdate` give, as if each process held all latents:
these are chosen among all (each process finds the largest among its own, then they are merged), and
x_hat is the sum over the processes. Indices count all latents where they are given or returned, and
own rows within an update. A file holds all rows, as if one process had written it.
"""

import errno
import json
import math
import os
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open

from distributed import ALONE, FOREVER, Group
from errors import UsageError
from kernels import merge, topk
from kernels.decode import gather_dot, gather_sum
from kernels.update import Reconstruction, SparseUpdate
from sae import Sae, random_rows
from store.disk import rename

DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.bool: "BOOL",
}


def grid(processes, shards):
    """Two groups that this process is in: those that split the vectors, and `shards` neighbours
    that split the latents.

    Raises UsageError where the processes can't be arranged so. All processes have to call it.
    """
    if shards < 1 or processes.count % shards:
        raise UsageError(
            f"--shard_latents {shards}: expected a divisor of {processes.count}, the processes that torchrun started"
        )
    if processes.count == 1:
        return ALONE, ALONE
    rows = [tuple(range(start, start + shards)) for start in range(0, processes.count, shards)]
    found = []
    for ranks in [*zip(*rows), *rows]:
        group = dist.new_group(ranks, FOREVER)  # which every process has to make
        if processes.rank in ranks:
            found.append(Group(ranks, processes.rank, group, processes.device))
    return tuple(found)


def parts_of(latents):
    """What takes the place of Sae, SparseUpdate, save_tensors and load_tensors, with the same
    arguments."""
    group = dict(latents=latents)
    return (
        partial(ShardedSae, **group),
        ShardedUpdate,
        partial(save_rows, **group),
        partial(load_rows, **group),
    )


class ShardedSae(Sae):
    """The latents of the slice `own`. All processes of the group `latents` call everything
    together; no gradients."""

    def __init__(self, d_in, num_latents, k, cfg=None, seed=0, latents=ALONE):
        self.latents, self.own = latents, latents.part(num_latents)
        super().__init__(d_in, num_latents, k, cfg, seed)

    def random_rows(self, seed):
        return random_rows(self.num_latents, self.d_in, self.own, seed)

    def largest(self, x, k, dtype=None):
        acts, indices = super().largest(x, min(k, len(self.W_dec)), dtype)
        return self.merge(acts, indices, k)

    def merge(self, acts, indices, k):
        """The k largest of what the processes found each among its own latents: (N, up to k),
        indices among all latents."""
        missing = (0, k - acts.shape[1])
        acts, indices = F.pad(acts, missing), F.pad(indices + self.own.start, missing)
        return merge(self.latents.side_by_side(acts), self.latents.side_by_side(indices), k)

    def of_own(self, acts, indices):
        """Of (N, K) chosen from all latents those that are this process's; the others are zeros of
        its first latent."""
        own = (indices >= self.own.start) & (indices < self.own.stop)
        return acts * own, torch.where(own, indices - self.own.start, 0)

    def add_up(self, top_acts, top_indices):
        acts, indices = self.of_own(top_acts, top_indices)
        return self.latents.sum(gather_sum(acts, indices, self.W_dec)) + self.b_dec

    def save_to_disk(self, path):
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        save_rows(path / "sae.safetensors", self.state_dict(), {"format": "pt"}, self.latents)
        if self.latents.index == 0:
            self.save_description(path)


class ShardedUpdate(SparseUpdate):
    """Updates a `ShardedSae`. Every process has all vectors of its group `vectors`; matrices are of
    its own latents."""

    def num_dead(self):
        return self.over_latents(super().num_dead())

    def index_dead(self):
        super().index_dead()
        self.num_listed = self.over_latents(self.num_listed)

    def over_latents(self, count):
        """The sum of a count over the processes."""
        return int(self.sae.latents.sum(self.dead_indices.new_tensor([count])))

    def largest(self, centred, width, parts):
        acts, indices = super().largest(centred, min(width, len(self.W_dec)), parts)
        return self.sae.merge(acts, indices, width)

    def reconstruct(self, x, share, top_acts, top_indices):
        acts, indices = self.sae.of_own(top_acts, top_indices)
        e = self.sae.latents.sum(gather_sum(acts, indices, self.W_dec)).add_(self.b_dec).sub_(x)
        return Reconstruction(
            share, acts, indices, e, gather_dot(e, indices, self.W_dec).mul_(acts > 0)
        )

    def least_of_largest_dead(self, acts, k):
        if self.num_listed <= k:
            return None
        largest = topk(acts, min(k, acts.shape[1]))[0] if acts.shape[1] else acts
        largest = self.sae.latents.side_by_side(F.pad(largest, (0, k - largest.shape[1])))
        return topk(largest, k)[0].amin(1, keepdim=True)

    def add_reconstruction(self, e, acts, W_dec):
        return e + self.sae.latents.sum(acts @ W_dec)

    def times_W_enc(self, b_enc):
        return self.sae.latents.sum(super().times_W_enc(b_enc))

    def squared_norm(self, gradients):
        return self.sae.latents.sum(super().squared_norm(gradients))


def is_split(name, ndim):
    """Whether a tensor of an SAE or its training has a row for each latent: all but b_dec, its
    moments and single numbers."""
    return ndim > 0 and not name.startswith("b_dec")


def save_rows(path, tensors, metadata, latents):
    """`disk.save_tensors` by all processes of the group `latents` together. They write each its own
    rows into one file.

    metadata: the first process's is written. Raises OSError in every process.

    The format is https://huggingface.co/docs/safetensors: eight bytes with the length of a JSON
    header, the header, the numbers. The package `safetensors` writes only what lies in one
    process's memory.
    """
    num_rows = next(len(tensor) for name, tensor in tensors.items() if is_split(name, tensor.ndim))
    num_latents = int(latents.sum(torch.tensor(num_rows, device=latents.device)))
    header, places, end = {"__metadata__": metadata}, [], 0
    for name, tensor in sorted(
        tensors.items(), key=lambda item: (-item[1].itemsize, item[0])
    ):  # so that each is aligned
        shape, at = list(tensor.shape), end
        if is_split(name, tensor.ndim):
            shape[0] = num_latents
            at += latents.part(num_latents).start * math.prod(shape[1:]) * tensor.itemsize
        places.append((tensor, at))
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": shape}
        header[name]["data_offsets"] = [end, end := end + math.prod(shape) * tensor.itemsize]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    text = len(text).to_bytes(8, "little") + text
    begin = int(
        latents.share(torch.tensor(len(text), device=latents.device))
    )  # the first process's header is written

    partial = path.with_name(path.name + ".partial")
    with shared_errors(path, partial, latents):
        if latents.index == 0:
            with open(partial, "wb") as file:
                file.write(text)
                file.truncate(begin + end)
    with shared_errors(path, partial, latents), open(partial, "rb+") as file:
        for tensor, at in places:
            file.seek(begin + at)
            file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        file.flush()
        os.fsync(file.fileno())
    if latents.index == 0:
        rename(partial, path)


@contextmanager
def shared_errors(path, partial, latents):
    """The end waits for every process of the group; an OSError of one is raised in all, when none
    has `partial` open."""
    number = 0
    try:
        yield
    except OSError as error:
        number = error.errno or errno.EIO
    number = int(latents.side_by_side(torch.tensor([[number]], device=latents.device)).max())
    if number:
        if latents.index == 0:
            partial.unlink(missing_ok=True)
        raise OSError(f"{path} can't be written: {os.strerror(number)}")


def load_rows(path, latents):
    """`disk.load_tensors`, of split tensors the rows of this process's latents."""
    tensors = {}
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            rows = file.get_slice(name)
            shape = rows.get_shape()
            split = is_split(name, len(shape))
            tensors[name] = rows[latents.part(shape[0])] if split else file.get_tensor(name)
    return tensors
