"""A `Layout` says which numbers of a module's tensor are the image's tokens, or the text's.

For example, a block that joins 3 text tokens and an image of 2 x 2 tokens returns (rows, 7, d). The
layout of its image tokens, in a batch of 2 rows, is

    Layout(index=0, form="tokens", starts=[3, 3], counts=[4, 4], grid=(2, 2), d=d)

and `layout.take(output, rows=2)` is (2, 4, d). There is no table of architectures: locate.py finds the
layout, once for each set of shapes and masks. The functions at the end find the grid.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusion.forward import Forward
from diffusion.signatures import tensors, with_tensor

LARGEST_PATCH = 64  # pixels along a side


def row_view(x: Tensor, rows: int, form: str) -> Tensor:
    """Return a view of x whose first axis is the batch and whose last ones are the width d; the axes
    between them are the tokens.

    k things of each row, such as frames, may be folded into the batch. The forms, and what x is:

        "tokens"       (rows k, T, d) -> (rows, k, T, d); (rows k, d), (rows k, H, W, d) likewise
        "frames"       (rows T, k, d) -> (rows, k, T, d)
        "map"          (rows k, d, H, W) -> (rows, k, H, W, d); (rows k, d, T) likewise
        "heads"        (rows, T, heads, d) -> itself
        "heads first"  (rows, heads, T, d) -> (rows, T, heads, d)
    """
    if form == "heads":
        return x
    if form == "heads first":
        return x.transpose(1, 2)
    x = x.unflatten(0, (rows, -1))
    if form == "frames":
        return x.transpose(1, 2)
    if form == "map":
        return x.movedim(2, -1)
    return x


def by_token(x: Tensor, rows: int, form: str = "tokens") -> Tensor:
    """Return x as (rows, tokens, d), the tokens in raster order; see `row_view` for `form`."""
    x = row_view(x, rows, form)
    return x.flatten(2) if form.startswith("heads") else x.flatten(1, -2)


@dataclass(frozen=True)
class NotHookable:
    """Stands in the place of a Layout if a module has no such tokens."""

    reason: str
    """The rest of a sentence that begins with the module's name, such as "never ran"."""


class Layout(NamedTuple):
    """Where the tokens of one stream, image or text, are in what a module takes or returns."""

    index: int
    """The number of the tensor in `tensors(value)`."""

    form: str
    """How the tensor's axes are to be read, see `row_view`."""

    starts: list[int]
    """For each row of the batch its first token."""

    counts: list[int]
    """For each row of the batch its number of tokens."""

    grid: tuple[int, ...]
    """How the tokens of a row lie, such as (height, width). The product is `max(counts)`."""

    d: int
    """The width of a token."""

    def take(self, value: Any, rows: int) -> Tensor:
        """Return the tokens (rows, tokens, d) in what a module took or returned, perhaps as a view.

        A row with fewer tokens than others is padded with zeros.
        """
        x = by_token(tensors(value)[self.index], rows, self.form)
        first = self.starts[0]
        longest = max(self.counts)
        if min(self.counts) == longest and set(self.starts) == {first}:
            return x[:, first : first + longest]
        out = x.new_zeros(rows, longest, self.d)
        for r, (start, count) in enumerate(zip(self.starts, self.counts)):
            out[r, :count] = x[r, start : start + count]
        return out

    def put(self, value: Any, rows: int, first: int, new_tokens: Tensor) -> Any:
        """Return a copy of `value` with other tokens in the rows `first`, `first` + 1, and so on.

        rows: of the batch in `value`. new_tokens: (R, tokens, d), for R of these rows; padding in it
        is left out.
        """
        x = tensors(value)[self.index]
        new = by_token(x, rows, self.form).clone()
        for r, row in enumerate(new_tokens, first):
            start = self.starts[r]
            count = self.counts[r]
            new[r, start : start + count] = row[:count]

        # with the strides of x, since the last bits of the next layer may depend on them
        shaped = torch.empty_like(x)
        view = row_view(shaped, rows, self.form)
        view.copy_(new.view(view.shape))
        return with_tensor(value, self.index, shaped)


# ------------------------------------------------------------------------------- the grid of an image


def spatial_shape(shape: tuple[int, ...], rows: int, width_last: bool = False) -> tuple[int, ...]:
    """Return the sizes of a feature map without batch and width.

    For (rows, d, H, W) it is (H, W), for a video (rows k, d, H, W) with k frames (k, H, W). With
    `width_last` the shape is (rows k, H, W, d).
    """
    k = shape[0] // rows
    sizes = tuple(shape[1:-1] if width_last else shape[2:])
    return (k, *sizes) if k > 1 else sizes


def sample_grid(count: int, forward: Forward, config: Any) -> tuple[int, ...] | None:
    """Return the grid of `count` tokens that are patches of the denoiser's sample; None if none fits.

    For 256 tokens of a sample (rows, 4, 32, 32) it is (16, 16), with patches of 2 x 2. A sample may
    also be packed, (rows, tokens, d), so that its shape does not tell. Then the grid is looked for
    among the other arguments, see `packed_grids`. If none fits, it is (count,) if an axis of the
    sample that is not `in_channels` long has as many patches: a wave (rows, 4, 100) has 100 tokens.
    config: of the model, for its `in_channels` and the sizes of patches.
    """
    sample = forward.sample if torch.is_tensor(forward.sample) else forward.sample[0][None]
    shape = tuple(sample.shape[1:])
    channels = getattr(config, "in_channels", None)

    # The first argument may hold more than the sample, such as a reference image behind its pixels
    # or tokens: then the shape is that of the sampled part. But if only one axis is longer, and it
    # has the config's in_channels, a picture has channels of its own, and the axes of pixels fit.
    chosen = None
    if forward.sampled is not None:
        sizes = []
        for axis in range(len(shape)):
            has_sampled = forward.sampled.movedim(axis, 0).flatten(1).any(1)
            sizes.append(int(has_sampled.sum()))
        longer = [whole for whole, part in zip(shape, sizes) if whole != part]
        if longer != [channels]:
            shape = tuple(sizes)
            chosen = forward.sampled.flatten(1).any(1)

    if len(shape) > 2:
        grid = patch_grid(count, shape, channels, patch_sizes(config))
        if grid is not None:
            return grid
    for grid in packed_grids(list(forward.arguments.values()), chosen):
        if math.prod(grid) == count:
            return grid
    if len(shape) == 2:
        lengths = [n for n in shape if n != channels]
        for size in patch_sizes(config):
            if count in [math.ceil(n / size) for n in lengths]:
                return (count,)
    return None


def patch_grid(
    count: int, shape: tuple[int, ...], channels: int | None, known_sizes: set[int]
) -> tuple[int, ...] | None:
    """Return the grid of `count` patches of one row of a sample, or None.

    shape: (C, H, W) or (C, frames, H, W), whose channels may stand on any axis. Patches are square,
    and one to all frames deep. Several ways may give the same count: the likeliest one is taken. It
    has patch sizes of the model's config, then as many channels as the config says, then the
    channels first or last, and then the smallest numbers.

    For 256 and (4, 32, 32), with 4 channels and the size 2 in the config, it is (16, 16).
    """
    sizes = range(1, min(LARGEST_PATCH, max(shape)) + 1)
    depths = sizes if len(shape) > 3 else [1]
    inner_axes = range(1, len(shape) - 1)

    def unlikeliness(way: tuple[int, int, int]) -> tuple:
        axis, depth, size = way
        num_unknown = len({depth, size} - known_sizes)
        return num_unknown, shape[axis] != channels, axis in inner_axes, way

    ways = itertools.product(range(len(shape)), depths, sizes)
    for axis, depth, size in sorted(ways, key=unlikeliness):
        *frames, height, width = (n for i, n in enumerate(shape) if i != axis)
        grid = [math.ceil(n / depth) for n in frames]
        grid += [math.ceil(height / size), math.ceil(width / size)]
        if math.prod(grid) == count:
            return tuple(grid)
    return None


def patch_sizes(config: Any) -> set[int]:
    """Return the sizes of patches of which a model's config speaks, and 1.

    For {"patch_size": [1, 2], "in_channels": 4} it is {1, 2}.
    """
    sizes = {1}
    if config is not None and hasattr(config, "keys"):
        for name in config:
            if "patch_size" in name:
                sizes.update(integers_in(config[name]))
    return sizes


def packed_grids(value: Any, chosen: Tensor | None = None) -> Iterator[tuple[int, ...]]:
    """Yield every grid of a packed sample of which a nested argument may speak.

    A table of positions (tokens, 2 to 4), or (rows, tokens, 2 to 4), speaks of the number of
    different values in each column, without ones: 6 tokens at [[0, 0], [0, 1], [0, 2], [1, 0], ...]
    lie on (2, 3). A list of integers speaks of each three and each two neighbours in it.

    chosen: bool (tokens,), which tokens of the table belong to the sample; None means all.
    """
    if torch.is_tensor(value):
        table = value[0] if value.ndim == 3 else value
        if value.ndim in (2, 3) and table.shape[1] <= 4:
            if chosen is not None and len(chosen) == len(table):
                table = table[chosen.to(table.device)]
            sizes = [len(column.unique()) for column in table.T]
            yield tuple(n for n in sizes if n > 1)
    elif isinstance(value, (list, tuple)):
        for length in (3, 2):
            for start in range(len(value) - length + 1):
                neighbours = value[start : start + length]
                if all(is_integer(item) for item in neighbours):
                    yield tuple(neighbours)
        for item in value:
            yield from packed_grids(item, chosen)


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def integers_in(value: Any) -> list[int]:
    """Return the integers in a nested list. For [1, [2, "a"]] it is [1, 2]."""
    if isinstance(value, (list, tuple)):
        return [n for item in value for n in integers_in(item)]
    return [value] if isinstance(value, int) else []
