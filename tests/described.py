"""Activation files that say what they hold, and files whose vectors are numbered."""

import json

import numpy as np
import torch

from store.disk import checksum


def describe(path, **meta):
    """Write the .json of an activation file, and a prompts.jsonl, if there is none, in which no
    prompt has a text.

    So a prompt is known by its place in its file.
    """
    path.with_suffix(".json").write_text(json.dumps(meta | {"checksum": checksum(meta)}))
    listing = path.with_name("prompts.jsonl")
    if not listing.exists():
        listing.write_text('{"prompt": ""}\n' * 128)


def describe_mid_block(path, **meta):
    """`describe` a file of the hook point that `mid_block` has by default; meta may change it."""
    defaults = {
        "format": 1,
        "hook_name": "mid_block",
        "side": "output",
        "rows": "cond",
        "stream": "image",
    }
    describe(path, **(defaults | meta))


def numbered_file(path, shape=(20, 3, 8), dtype=np.float32, first=0):
    """Save vectors (number, number), counted through the file from `first`; returns the path."""
    numbers = first + np.arange(np.prod(shape), dtype=np.float64).reshape(shape)
    np.save(path, np.stack([numbers, numbers], -1).astype(dtype))
    return path


def vector_numbers(batches):
    """The numbers of the vectors of a `numbered_file`, (n,) int64.

    batches: tensors (n, 2), or pairs of such a tensor and the steps of its vectors.
    """
    tensors = []
    for batch in batches:
        tensors.append(batch[0] if isinstance(batch, tuple) else batch)
    return torch.cat(tensors)[:, 0].long()
