"""An SAE whose latents are split over neighbouring processes.

    torchrun --nproc_per_node 4 train.py --shard_latents 2       # 2 x 2: vectors and latents

Each process holds the rows of its own latents, of both matrices. `grid` gives a process the two
`distributed.Group`s that it is in: `vectors` and `latents`.

`ShardedSae` and `ShardedUpdate` return what `Sae` and `SparseUpdate` return, as if each process
held all latents. For the selection, each process finds the largest among its own latents, and then
they are merged; x_hat is the sum over the processes. An index counts all latents where it is given
or returned, and the process's own rows within an update. `save_rows` writes one file with all rows,
as if one process had written it, and `load_rows` reads a process's rows from such a file.
"""

import errno
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from distributed import ALONE, FOREVER, Group, Processes
from errors import UsageError
from kernels import merge, topk
from kernels.decode import gather_dot, gather_sum
from kernels.update import Gradients, Reconstruction, SparseUpdate
from sae import Sae, random_rows
from store.disk import rename

# the names that the safetensors format gives to dtypes
DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.bool: "BOOL",
}


def grid(processes: Processes, shards: int) -> tuple[Group, Group]:
    """Return the groups `vectors` and `latents` that this process is in.

    `shards` neighbours split the latents. For 4 processes and 2 shards, process 0 gets the groups
    (0, 2) for vectors and (0, 1) for latents. All processes have to call it. Raises UsageError if
    they can't be arranged so.
    """
    if shards < 1 or processes.count % shards:
        raise UsageError(
            f"--shard_latents {shards}: expected a divisor of {processes.count}, the processes "
            "that torchrun started"
        )
    if processes.count == 1:
        return ALONE, ALONE

    rows = []  # processes that split the latents
    for start in range(0, processes.count, shards):
        rows.append(tuple(range(start, start + shards)))
    columns = list(zip(*rows))  # processes that split the vectors

    mine = []
    for ranks in columns + rows:
        group = dist.new_group(ranks, FOREVER)  # every process has to make every group
        if processes.rank in ranks:
            mine.append(Group(ranks, processes.rank, group, processes.device))
    vectors, latents = mine
    return vectors, latents


class ShardedSae(Sae):
    """The part of an SAE with the latents of the slice `own`.

    All processes of the group `latents` have to call its methods together. It has no gradients.
    """

    def __init__(
        self,
        d_in: int,
        num_latents: int,
        k: int,
        cfg: dict[str, Any] | None = None,
        seed: int = 0,
        latents: Group = ALONE,
    ) -> None:
        self.latents = latents
        self.own = latents.slice_of(num_latents)
        super().__init__(d_in, num_latents, k, cfg, seed)

    def random_rows(self, seed: int) -> Tensor:
        """Return the normal numbers that the own rows of W_dec start from."""
        return random_rows(self.num_latents, self.d_in, self.own, seed)

    def largest(self, x: Tensor, k: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Return the k largest pre_acts of each vector x (N, d), and their latents: (N, k) each."""
        acts, indices = super().largest(x, min(k, len(self.W_dec)), dtype)
        return self.merge_over_processes(acts, indices, k)

    def merge_over_processes(self, acts: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return the k largest of what each process found among its own latents: (N, k) each.

        acts, indices: (N, up to k); these indices count this process's own rows from 0. The
        indices that are returned count all latents.
        """
        # All processes must send the same shape. Padding has activation 0, so it is never active
        padding = (0, k - acts.shape[1])
        acts = F.pad(acts, padding)
        indices = F.pad(indices + self.own.start, padding)
        return merge(self.latents.all_gather(acts), self.latents.all_gather(indices), k)

    def of_own(self, acts: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return acts and indices (N, K), chosen from all latents, for this process's rows.

        The indices that are returned count this process's own rows from 0. A latent of another
        process gets activation 0 and index 0. For the own latents 10 to 19, acts 5, 6 and indices
        12, 3 it gives 5, 0 and 2, 0.
        """
        is_own = (indices >= self.own.start) & (indices < self.own.stop)
        return acts * is_own, torch.where(is_own, indices - self.own.start, 0)

    def add_up(self, top_acts: Tensor, top_indices: Tensor) -> Tensor:
        """Return top_acts @ W_dec[top_indices] + b_dec: (N, K), (N, K) -> (N, d)."""
        acts, indices = self.of_own(top_acts, top_indices)
        return self.latents.sum(gather_sum(acts, indices, self.W_dec)) + self.b_dec

    def save_to_disk(self, path: str | Path) -> None:
        """Write the folder of the whole SAE. Raises OSError in every process if one can't."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        save_rows(path / "sae.safetensors", self.state_dict(), {"format": "pt"}, self.latents)
        if self.latents.index == 0:
            self.save_description(path)


class ShardedUpdate(SparseUpdate):
    """Updates a `ShardedSae`; see the methods of `SparseUpdate`.

    Every process has all vectors of its group `vectors`. Matrices hold the own latents only.
    """

    def num_dead(self) -> int:
        return self.sum_over_latents(super().num_dead())

    def make_dead_indices(self) -> None:
        super().make_dead_indices()
        self.num_listed = self.sum_over_latents(self.num_listed)

    def sum_over_latents(self, count: int) -> int:
        """Return the sum of a count over the processes that split the latents."""
        return int(self.sae.latents.sum(self.dead_indices.new_tensor([count])))

    def largest(self, centred: Tensor, width: int, num_chunks: int) -> tuple[Tensor, Tensor]:
        acts, indices = super().largest(centred, min(width, len(self.W_dec)), num_chunks)
        return self.sae.merge_over_processes(acts, indices, width)

    def reconstruct(
        self, x: Tensor, loss_weight: float, top_acts: Tensor, top_indices: Tensor
    ) -> Reconstruction:
        acts, indices = self.sae.of_own(top_acts, top_indices)
        x_hat = self.sae.latents.sum(gather_sum(acts, indices, self.W_dec)).add_(self.b_dec)
        e = x_hat.sub_(x)
        d_acts = gather_dot(e, indices, self.W_dec).mul_(acts > 0)
        return Reconstruction(loss_weight, acts, indices, e, d_acts)

    def least_of_largest_dead(self, acts: Tensor, k: int) -> Tensor | None:
        # acts (n, C) has the listed latents of this process; `num_listed` counts all processes'
        if self.num_listed <= k:
            return None
        largest = acts
        if acts.shape[1]:
            largest, _ = topk(acts, min(k, acts.shape[1]))
        padded = F.pad(largest, (0, k - largest.shape[1]))
        largest, _ = topk(self.sae.latents.all_gather(padded), k)
        return largest.amin(1, keepdim=True)

    def add_reconstruction(self, e: Tensor, acts: Tensor, W_dec: Tensor) -> Tensor:
        return e + self.sae.latents.sum(acts @ W_dec)

    def times_W_enc(self, b_enc: Tensor) -> Tensor:
        return self.sae.latents.sum(super().times_W_enc(b_enc))

    def squared_norm(self, gradients: Gradients) -> Tensor:
        return self.sae.latents.sum(super().squared_norm(gradients))


def is_split(name: str, ndim: int) -> bool:
    """Return whether a tensor of an SAE or its training has a row for each latent.

    All have but b_dec, its moments, and single numbers.
    """
    return ndim > 0 and not name.startswith("b_dec")


def save_rows(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], latents: Group
) -> None:
    """Write one safetensors file; each process of the group writes the rows that it holds.

    It is `disk.save_tensors` for all processes of the group `latents`, which have to call it
    together. tensors: the own rows of those that are split (`is_split`), and the whole others.
    metadata: that of the first process is written. Raises OSError in every process if one can't
    write.

    The format is https://huggingface.co/docs/safetensors: eight bytes with the length of a JSON
    header, the header, the numbers. The package `safetensors` writes only what lies in one
    process's memory.
    """
    text, offsets, num_bytes = plan_file(tensors, metadata, latents)
    # the first process's header is written, and another's can have another length
    header_size = torch.tensor(len(text), device=latents.device)
    data_start = int(latents.broadcast(header_size))

    partial = path.with_name(path.name + ".partial")
    with shared_errors(path, partial, latents):
        if latents.index == 0:
            with open(partial, "wb") as file:
                file.write(text)
                file.truncate(data_start + num_bytes)
    with shared_errors(path, partial, latents), open(partial, "rb+") as file:
        for name, offset in offsets.items():
            numbers = tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8)
            file.seek(data_start + offset)
            file.write(numbers.numpy())
        file.flush()
        os.fsync(file.fileno())
    if latents.index == 0:
        rename(partial, path)


def plan_file(
    tensors: dict[str, Tensor], metadata: dict[str, str], latents: Group
) -> tuple[bytes, dict[str, int], int]:
    """Return (the beginning of a safetensors file, {tensor: where its own rows go}, the data's
    size).

    The beginning is the header's length and the header, of the whole tensors. Where rows go is
    counted in bytes from the start of the data, and so is its size.
    """
    num_own = next(len(tensor) for name, tensor in tensors.items() if is_split(name, tensor.ndim))
    num_latents = int(latents.sum(torch.tensor(num_own, device=latents.device)))

    header: dict[str, Any] = {"__metadata__": metadata}
    offsets = {}
    end = 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].itemsize, name)):
        # the widest numbers come first, so that each tensor is aligned
        tensor = tensors[name]
        shape = list(tensor.shape)
        start = end
        offsets[name] = start
        if is_split(name, tensor.ndim):
            shape[0] = num_latents
            bytes_per_row = math.prod(shape[1:]) * tensor.itemsize
            offsets[name] += latents.slice_of(num_latents).start * bytes_per_row
        end += math.prod(shape) * tensor.itemsize
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": shape,
            "data_offsets": [start, end],
        }

    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the data begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text, offsets, end


@contextmanager
def shared_errors(path: Path, partial: Path, latents: Group) -> Iterator[None]:
    """Wait for every process at the end of the context, and raise an OSError of one in all.

    When it is raised, no process has the file `partial` open any more, and it is removed.
    """
    number = 0
    try:
        yield
    except OSError as error:
        number = error.errno or errno.EIO
    mine = torch.tensor([[number]], device=latents.device)
    number = int(latents.all_gather(mine).max())
    if number:
        if latents.index == 0:
            partial.unlink(missing_ok=True)
        raise OSError(f"{path} can't be written: {os.strerror(number)}")


def load_rows(path: Path, latents: Group) -> dict[str, Tensor]:
    """Return the tensors of a file as `disk.load_tensors` does, but only the own rows of split
    ones."""
    tensors = {}
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 - the file is not a dict
            rows = file.get_slice(name)
            shape = rows.get_shape()
            if is_split(name, len(shape)):
                tensors[name] = rows[latents.slice_of(shape[0])]
            else:
                tensors[name] = file.get_tensor(name)
    return tensors
