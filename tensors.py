"""safetensors files that several processes write and read together, each the rows of its own latents; files swapped in whole.

The format is https://huggingface.co/docs/safetensors: eight bytes with the length of a JSON header, the header, the numbers. The
package `safetensors` writes only what lies in one process's memory, so it is used for reading.
"""

import errno
import json
import math
import os
from contextlib import contextmanager

import torch
from safetensors import safe_open

from processes import ALONE

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64", torch.bool: "BOOL"}


def is_split(name, ndim):
    """Whether a tensor of an SAE or its training has a row for each latent: all but b_dec, its moments and single numbers."""
    return ndim > 0 and not name.startswith("b_dec")


def save_tensors(path, tensors, metadata, num_latents=None, latents=ALONE):
    """Write a safetensors file; `path` has its old content or all of the new. Raises OSError, as on a full disk, in every
    process of the group.

    tensors: {name: tensor}, of a slice of `num_latents` rows where the group `latents` has several processes, which write
    their own each. metadata: {str: str}, the first process's.
    """
    header, places, end = {"__metadata__": metadata}, [], 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])):  # so that each is aligned
        shape, at = list(tensor.shape), end
        if latents.count > 1 and is_split(name, tensor.ndim):
            shape[0] = num_latents
            at += latents.part(num_latents).start * math.prod(shape[1:]) * tensor.itemsize
        places.append((tensor, at))
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": shape}
        header[name]["data_offsets"] = [end, end := end + math.prod(shape) * tensor.itemsize]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    text = len(text).to_bytes(8, "little") + text
    begin = int(latents.share(torch.tensor(len(text), device=latents.device)))  # the first process's metadata are written
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
        swap_in(partial, path)


@contextmanager
def shared_errors(path, partial, latents):
    """The end waits for every process of the group; an OSError of one is raised in all, when none has `partial` open."""
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


def load_tensors(path, latents=ALONE):
    """{name: tensor} of a safetensors file, of split ones the rows of this process's latents."""
    with safe_open(path, "pt") as file:
        found = {}
        for name in file.keys():  # noqa: SIM118
            rows = file.get_slice(name)
            shape = rows.get_shape()
            split = latents.count > 1 and is_split(name, len(shape))
            found[name] = rows[latents.part(shape[0])] if split else file.get_tensor(name)
        return found


def swap_in(partial, path):
    """Give a finished file its final name, in this order also after a power cut."""
    with open(partial, "rb+") as file:
        os.fsync(file.fileno())
    partial.replace(path)
