"""Which numbers of what a module takes or returns are image tokens, which are text tokens, and on
which grid they lie.

No table of architectures says so: `diffusion/locate.py` finds it out, once for each set of shapes
and masks, not once a step.
"""

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from diffusion.signatures import tensors, with_tensor


def row_view(x, rows, form):
    """A view of x whose first axis is the rows of the batch and whose last are d; between them are
    the tokens.

    form, and what x is (k things of a row, such as frames, may be folded into the batch):
    "tokens"  (rows k, T, d) -> (rows, k, T, d); (rows k, d) and (rows k, H, W, ..., d) likewise
    "frames"  (rows T, k, d) -> (rows, k, T, d)
    "map"     (rows k, d, T), or (rows k, d, H, W, ...) -> (rows, k, H, W, ..., d)
    "heads"   (rows, T, heads, d) -> itself; "heads first"  (rows, heads, T, d) -> (rows, T, heads, d)
    """
    if form == "heads":
        return x
    if form == "heads first":
        return x.transpose(1, 2)
    x = x.unflatten(0, (rows, -1))
    return {"tokens": x, "frames": x.transpose(1, 2), "map": x.movedim(2, -1)}[form]


def by_token(x, rows, form="tokens"):
    """As `row_view`, flattened to (rows, tokens, d), the tokens in raster order."""
    x = row_view(x, rows, form)
    return x.flatten(2) if form.startswith("heads") else x.flatten(1, -2)


@dataclass(frozen=True)
class NotHookable:
    """Stands in a layout's place where a module has no such tokens."""

    reason: str  # a predicate, such as "never ran": messages put the module's name before it


class Layout(NamedTuple):
    """Where one stream's tokens are in what a module takes or returns."""

    index: int  # of the tensor among `tensors(value)`
    form: str  # see row_view
    starts: list  # of each row of the batch: the first token
    counts: list  # and how many there are
    grid: tuple  # of a row's tokens, the product being `max(counts)`
    d: int

    def take(self, value, rows):
        """(rows, tokens, d), padded with zeros where rows have different numbers of tokens. May be
        a view."""
        x = by_token(tensors(value)[self.index], rows, self.form)
        first, n = self.starts[0], max(self.counts)
        if min(self.counts) == n and set(self.starts) == {first}:
            return x[:, first : first + n]
        out = x.new_zeros(rows, n, self.d)
        for r, (start, count) in enumerate(zip(self.starts, self.counts)):
            out[r, :count] = x[r, start : start + count]
        return out

    def put(self, value, rows, first, tokens):
        """`value` with the tokens (R, tokens, d) of rows `first`, `first` + 1, ... in place of its
        own; it is left alone."""
        x = tensors(value)[self.index]
        new = by_token(x, rows, self.form).clone()
        for r, row in enumerate(tokens, first):
            new[r, self.starts[r] : self.starts[r] + self.counts[r]] = row[: self.counts[r]]
        shaped = torch.empty_like(
            x
        )  # of the same strides, since the next layer's last bits may depend on them
        view = row_view(shaped, rows, self.form)
        view.copy_(new.view(view.shape))
        return with_tensor(value, self.index, shaped)


def spatial_shape(shape, rows, width_last=False):
    """(rows k, d, H, W, ...), or (rows k, H, W, ..., d) -> (k, H, W, ...), without k if it is 1."""
    k, sizes = shape[0] // rows, tuple(shape[1:-1] if width_last else shape[2:])
    return (k, *sizes) if k > 1 else sizes


def sample_grid(count, forward, config):
    """The grid of `count` tokens that are patches of the denoiser's sample, or the sample itself if
    it is packed, or None.

    Patches are square, and of one to all frames; of several ways the one that the model's `config`
    speaks of is taken, and channels are sooner first or last than in between. A packed sample's
    grid is found among the other arguments: a table of positions, a tuple of sizes, or sizes in a
    row.
    """
    shape = tuple(
        (forward.sample if torch.is_tensor(forward.sample) else forward.sample[0][None]).shape[1:]
    )
    channels = getattr(config, "in_channels", None)
    chosen = None  # which rows of a table of positions are those of the sample
    if forward.sampled is not None:
        sizes = [
            int(forward.sampled.movedim(axis, 0).flatten(1).any(1).sum())
            for axis in range(len(shape))
        ]
        if [m for m, n in zip(shape, sizes) if m != n] != [
            channels
        ]:  # else a picture has channels of its own
            shape, chosen = tuple(sizes), forward.sampled.flatten(1).any(1)
    if len(shape) > 2:
        known = {1}
        for name in config if config is not None and hasattr(config, "keys") else ():
            known |= set(integers(config[name])) if "patch_size" in name else set()
        patches = range(1, min(64, max(shape)) + 1)
        ways = itertools.product(range(len(shape)), patches if len(shape) > 3 else [1], patches)
        inside = range(1, len(shape) - 1)
        unlikely = lambda way: (
            len({*way[1:]} - known),
            shape[way[0]] != channels,
            way[0] in inside,
            way,
        )
        for axis, f, p in sorted(
            ways, key=unlikely
        ):  # the axis of the channels, frames and pixels a side of a patch
            *frames, H, W = (n for i, n in enumerate(shape) if i != axis)
            grid = (*(-(-n // f) for n in frames), -(-H // p), -(-W // p))
            if math.prod(grid) == count:
                return grid
    return next(
        (
            g
            for g in packed_grids(list(forward.arguments.values()), chosen)
            if math.prod(g) == count
        ),
        None,
    )


def packed_grids(value, chosen=None):
    """Every grid of 2 or 3 sizes that a nested argument may speak of; of a table of positions,
    those of `chosen` tokens."""
    if torch.is_tensor(value):
        table = value[0] if value.ndim == 3 else value
        if value.ndim in (2, 3) and table.shape[1] <= 4:
            if chosen is not None and len(chosen) == len(table):
                table = table[chosen.to(table.device)]
            sizes = [len(column.unique()) for column in table.T]
            yield tuple(n for n in sizes if n > 1)
    elif isinstance(value, (list, tuple)):
        numbers = [v if isinstance(v, int) and not isinstance(v, bool) else None for v in value]
        for n in (3, 2):
            yield from (tuple(w) for w in zip(*(numbers[i:] for i in range(n))) if None not in w)
        for item in value:
            yield from packed_grids(item, chosen)


def integers(value):
    """The integers in a nested list."""
    if isinstance(value, (list, tuple)):
        return [n for v in value for n in integers(v)]
    return [value] if isinstance(value, int) else []
