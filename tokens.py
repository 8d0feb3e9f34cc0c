"""Which numbers of what a module takes or returns are image tokens, which are text tokens, and on which grid they lie.

No table of architectures says so. The denoiser is run again on the arguments of a call, in a *probe*, with every attention
made local: a token gets its own query back, so that what it holds depends on that token of the input and on no other. Once as
it is, then with noise on the sample of half of the rows, then of the other half: tokens that change are the image's. With noise
on the text embeddings, those that change besides are the text's. Where one half changes the other's rows, the first axis
is no batch axis. A probe is needed once for each set of shapes and masks, not once a step.
"""

import itertools
import math
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from rows import forward_signature, tensors, time_parameter, with_tensor

NEVER_RAN = "never ran in a forward of the denoiser; is it compiled, or are its projections fused?"


def row_view(x, rows, form):
    """A view of x whose first axis is the rows of the batch and whose last are d; between them are the tokens.

    form, and what x is (k things of a row, such as frames, may be folded into the batch):
    "tokens"  (rows k, T, d) -> (rows, k, T, d), and (rows k, d) -> (rows, k, d)
    "frames"  (rows T, k, d) -> (rows, k, T, d)
    "map"     (rows k, d, H, W, ...) -> (rows, k, H, W, ..., d)
    "heads"   (rows, T, heads, d) -> itself; "heads first"  (rows, heads, T, d) -> (rows, T, heads, d)
    """
    if form == "heads":
        return x
    if form == "heads first":
        return x.transpose(1, 2)
    x = x.unflatten(0, (rows, -1))
    return {"tokens": x, "frames": x.transpose(1, 2), "map": x.movedim(2, -1) if x.ndim > 3 else x}[form]


def by_token(x, rows, form="tokens"):
    """As `row_view`, flattened to (rows, tokens, d), the tokens in raster order."""
    x = row_view(x, rows, form)
    return x.flatten(2) if form.startswith("heads") else x.flatten(1, -2)


class Layout(NamedTuple):
    """Where one stream's tokens are in what a module takes or returns."""

    index: int  # of the tensor among `tensors(value)`
    form: str  # see row_view
    starts: list  # of each row of the batch: the first token
    counts: list  # and how many there are
    grid: tuple  # of a row's tokens, the product being `max(counts)`
    d: int

    def take(self, value, rows):
        """(rows, tokens, d), padded with zeros where rows have different numbers of tokens. May be a view."""
        x = by_token(tensors(value)[self.index], rows, self.form)
        first, n = self.starts[0], max(self.counts)
        if min(self.counts) == n and set(self.starts) == {first}:
            return x[:, first : first + n]
        out = x.new_zeros(rows, n, self.d)
        for r, (start, count) in enumerate(zip(self.starts, self.counts)):
            out[r, :count] = x[r, start : start + count]
        return out

    def put(self, value, rows, first, tokens):
        """`value` with the tokens (R, tokens, d) of rows `first`, `first` + 1, ... in place of its own; it is left alone."""
        x = tensors(value)[self.index]
        new = by_token(x, rows, self.form).clone()
        for r, row in enumerate(tokens, first):
            new[r, self.starts[r] : self.starts[r] + self.counts[r]] = row[: self.counts[r]]
        shaped = torch.empty_like(x)  # of the same strides, since the next layer's last bits may depend on them
        view = row_view(shaped, rows, self.form)
        view.copy_(new.view(view.shape))
        return with_tensor(value, self.index, shaped)


class LocalAttention(TorchFunctionMode):
    """While it is on, attention gives each token its own query back; `calls` counts how often."""

    calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        argument = lambda name, place: args[place] if len(args) > place else kwargs[name]
        if func is F.scaled_dot_product_attention:
            self.calls += 1
            query, value = argument("query", 0), argument("value", 2)
            fits = query.shape[-1] == value.shape[-1]
            return query if fits else query[..., :1].expand(*query.shape[:-1], value.shape[-1])
        if func is F.multi_head_attention_forward:
            self.calls += 1
            return argument("query", 0), None
        if func in (torch.softmax, torch.Tensor.softmax, F.softmax):
            scores = argument("input", 0)
            self.calls += scores.ndim > 2
            if scores.ndim > 2 and scores.shape[-1] == scores.shape[-2]:  # else of the image over the text: no other image token
                return torch.eye(scores.shape[-1], dtype=scores.dtype, device=scores.device).expand_as(scores)
        return func(*args, **kwargs)


@contextmanager
def bare(root):
    """The module and all below it without anybody's hooks, for as long as the context lasts."""
    kinds = ("_forward_pre_hooks", "_forward_hooks")
    kept = [(m, kind, getattr(m, kind)) for m in root.modules() for kind in kinds]
    try:
        for module, kind, hooks in kept:
            setattr(module, kind, type(hooks)())
        yield
    finally:
        for module, kind, hooks in kept:
            setattr(module, kind, hooks)


@contextmanager
def same_random_numbers():
    """Random states are those of the beginning again when the context ends."""
    cuda = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    with torch.random.fork_rng(devices=cuda):
        try:
            yield
        finally:
            if mps is not None:
                torch.mps.set_rng_state(mps)


def fingerprint(x):
    """A number for each token of (rows, tokens, d), int64 (rows, tokens), that changes if the token does: the sum of its bits."""
    x = (torch.view_as_real(x).flatten(-2) if x.is_complex() else x) + 0  # + 0 makes -0.0 a 0.0
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.contiguous().view(bits).sum(-1, dtype=torch.int64)


def disturb(x, rows):
    """A tensor, or a list with one a row, with noise added to some rows."""
    if not torch.is_tensor(x):
        return [disturb(row[None], [0])[0] if r in rows else row for r, row in enumerate(x)]
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x.device, x.dtype)
    chosen = torch.zeros(len(x), *[1] * (x.ndim - 1), dtype=torch.bool)
    chosen[list(rows)] = True
    return torch.where(chosen.to(x.device), x + noise if x.is_floating_point() else (x - 1).abs(), x)


def disturb_text(value, rows, listed):
    """A nested argument with noise on each sequence of embeddings in it: tensors (rows, length, d), or lists if `listed`."""
    if torch.is_tensor(value):
        return disturb(value, range(rows)) if value.ndim == 3 and len(value) == rows and value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: disturb_text(item, rows, listed) for key, item in value.items()}
    if not isinstance(value, (list, tuple)):
        return value
    if listed and len(value) == rows and all(torch.is_tensor(v) and v.is_floating_point() for v in value):
        return disturb(value, range(rows))
    return type(value)(disturb_text(item, rows, listed) for item in value)


class Probe:
    """Finds where the tokens of some modules are, in one call of a denoiser.

    forward: the call, see rows.py, and args, kwargs its arguments. places: {(side, hook_name, stream): module} inside the
    denoiser `root`. `layouts` has for each place a Layout, or a str that says why there is none.
    """

    def __init__(self, root, forward, args, kwargs, places):
        self.root, self.forward, self.rows, self.places = root, forward, forward.rows, places
        self.args, self.kwargs, self.inputs, self.attention = args, kwargs, {}, LocalAttention()
        self.paths = {module: name for name, module in root.named_modules()}
        sample, time = next(iter(forward.arguments)), time_parameter(root)
        listed, self.half = isinstance(forward.sample, (list, tuple)), (self.rows + 1) // 2
        others = {name: value for name, value in forward.arguments.items() if name not in (sample, time)}
        text = {name: disturb_text(value, self.rows, listed) for name, value in others.items()}
        self.has_text = any(a is not b for a, b in zip(tensors(text), tensors(others)))
        with bare(root):
            plain = self._run({})
            upper = self._run({sample: disturb(forward.sample, range(self.half))})
            lower = self._run({sample: disturb(forward.sample, range(self.half, self.rows))}) if self.rows > 1 else plain
            texts = self._run(text) if any(stream == "text" for _, _, stream in places) else plain
        runs = (plain, upper, lower, texts)
        self.layouts = {place: self._layout(*place, *(run.get(place[:2], ()) for run in runs)) for place in places}

    def _run(self, changes):
        """{(side, hook_name): [(shape, form or None, fingerprint) of each tensor], or None if it ran several times}."""
        seen, handles = {}, []

        def look(side, name, module):
            def hook(module, args, kwargs, output=None):
                found = []
                for x in tensors(output if side == "output" else (args, kwargs)):
                    form = self._form(x, module)
                    found.append((x.shape, form, form and fingerprint(by_token(x, self.rows, form))))
                seen[side, name] = None if (side, name) in seen else found

            return hook

        def look_above(path):
            def hook(module, args, kwargs):
                self.inputs[path] = [x.shape for x in tensors((args, kwargs)) if x.ndim > 2 and len(x) % self.rows == 0]

            return hook

        for path in {above for module in self.places.values() for above in self._above(module)}:
            handles.append(self.root.get_submodule(path).register_forward_pre_hook(look_above(path), with_kwargs=True))
        for (side, name), module in {(side, name): module for (side, name, _), module in self.places.items()}.items():
            register = module.register_forward_pre_hook if side == "input" else module.register_forward_hook
            handles.append(register(look(side, name, module), with_kwargs=True))
        call = forward_signature(self.root).bind(self.root, *self.args, **self.kwargs)
        call.arguments |= changes
        try:
            with torch.no_grad(), same_random_numbers(), self.attention:
                torch.manual_seed(0)
                self.root(*call.args[1:], **call.kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def _above(self, module):
        """Paths of a module and of those around it, nearest first."""
        parts = self.paths[module].split(".")
        return [".".join(parts[:i]) for i in range(len(parts), -1, -1)]

    def _maps(self, module):
        """Spatial shapes of the first feature maps that a module and those around it got, nearest first."""
        maps = (next((s for s in self.inputs.get(path, ()) if len(s) > 3), None) for path in self._above(module))
        return [spatial_shape(shape, self.rows) for shape in maps if shape]

    def _form(self, x, module):
        """See `row_view`; None for a tensor without the rows of the batch."""
        if x.ndim < 2 or len(x) % self.rows or not x.numel():
            return None
        if x.ndim == 4 and len(x) == self.rows:  # inside attention, heads are split off the width of the sequences around
            around = next((shapes for path in self._above(module)[1:] if (shapes := self.inputs.get(path))), [(0,) * 4])
            lengths = {shape[1] for shape in around if len(shape) == 3}
            if len(around[0]) == 3 and (fits := [n in lengths or n == sum(lengths) for n in x.shape[1:3]]) != [False, False]:
                return "heads" if fits[0] else "heads first"
        if x.ndim == 3:
            k = len(x) // self.rows
            sizes = [s for s in self._maps(module) if len(s) == 3 and (x.shape[1], k) == (s[0], s[1] * s[2]) and k != s[0]]
            return "frames" if sizes else "tokens"
        return "map" if x.ndim > 3 else "tokens"

    def _layout(self, side, name, stream, *runs):
        if runs[0] == ():
            return NEVER_RAN
        if None in runs:
            return "runs several times in one forward of the denoiser"
        reason = f"its {side} holds no {stream} tokens" + "; try the text stream" * (stream == "image" and self.has_text)
        if all(form is None for _, form, _ in runs[0]):
            shapes = " and ".join(str(tuple(shape)) for shape, _, _ in runs[0]) or "none"
            return f"its {side} has no batch axis of {self.rows} rows; the shape is {shapes}"
        for index, ((shape, form, plain), *others) in enumerate(zip(*runs)):
            if form is None:
                continue
            upper, lower, text = (plain != other for *_, other in others)
            if upper[self.half :].any() or lower[: self.half].any():
                reason = f"its {side} mixes the {self.rows} rows of the batch; the shape is {tuple(shape)}"
                continue
            mask = upper | lower
            mask = text & ~mask if stream == "text" else mask
            if not mask.any(1).all():
                continue
            starts = mask.int().argmax(1).tolist()
            ends = (mask.shape[1] - mask.flip(1).int().argmax(1)).tolist()
            counts = [end - start for start, end in zip(starts, ends)]
            if stream == "image" and len(set(counts)) > 1:
                return f"its {side} has different numbers of image tokens in different rows: {min(counts)} to {max(counts)}"
            grid = None
            if stream == "image":
                grids = [spatial_shape(shape, self.rows)] if form == "map" else self._maps(self.places[side, name, stream])
                grid = next((g for g in grids if math.prod(g) == counts[0]), None)
                grid = grid or sample_grid(counts[0], self.forward, getattr(self.root, "config", None))
            doubtful = counts != mask.sum(1).tolist() or (self.has_text and not self.attention.calls)
            if doubtful and grid is None:
                return "image and text tokens can't be told apart; use the attention of PyTorch (scaled_dot_product_attention)"
            grid = (max(counts),) if grid is None else grid[1:] if len(grid) == 3 and grid[0] == 1 else grid
            d = {"map": shape[1], "heads": math.prod(shape[2:]), "heads first": shape[1] * shape[-1]}.get(form, shape[-1])
            return Layout(index, form, starts, counts, tuple(grid), d)
        return reason


def spatial_shape(shape, rows):
    """(rows k, d, H, W, ...) -> (k, H, W, ...), without k if it is 1."""
    k = shape[0] // rows
    return (k, *shape[2:]) if k > 1 else tuple(shape[2:])


def sample_grid(count, forward, config):
    """The grid of `count` tokens that are patches of the denoiser's sample, or the sample itself if it is packed, or None.

    Patches are square, and of one to all frames; of several ways the one that the model's `config` speaks of is taken, and
    channels are sooner first or last than in between. A packed sample's grid is found among the other arguments: a table of
    positions, a tuple of sizes, or sizes in a row.
    """
    shape = tuple((forward.sample if torch.is_tensor(forward.sample) else forward.sample[0][None]).shape[1:])
    if len(shape) > 2:
        known = {1}
        for name in config if config is not None and hasattr(config, "keys") else ():
            known |= set(integers(config[name])) if "patch_size" in name else set()
        patches = range(1, min(64, max(shape)) + 1)
        ways = itertools.product(range(len(shape)), patches if len(shape) > 3 else [1], patches)
        channels, inside = getattr(config, "in_channels", None), range(1, len(shape) - 1)
        unlikely = lambda way: (len({*way[1:]} - known), shape[way[0]] != channels, way[0] in inside, way)
        for axis, f, p in sorted(ways, key=unlikely):  # the axis of the channels, frames and pixels a side of a patch
            *frames, H, W = (n for i, n in enumerate(shape) if i != axis)
            grid = (*(-(-n // f) for n in frames), -(-H // p), -(-W // p))
            if math.prod(grid) == count:
                return grid
    return next((g for g in packed_grids(list(forward.arguments.values())) if math.prod(g) == count), None)


def packed_grids(value):
    """Every grid of 2 or 3 sizes that a nested argument may speak of."""
    if torch.is_tensor(value):
        table = value[0] if value.ndim == 3 else value
        if value.ndim in (2, 3) and table.shape[1] <= 4:
            sizes = [len(column.unique()) for column in table.T]
            yield tuple(n for n in sizes if n > 1)
    elif isinstance(value, (list, tuple)):
        numbers = [v if isinstance(v, int) and not isinstance(v, bool) else None for v in value]
        for n in (3, 2):
            yield from (tuple(w) for w in zip(*(numbers[i:] for i in range(n))) if None not in w)
        for item in value:
            yield from packed_grids(item)


def integers(value):
    """The integers in a nested list."""
    if isinstance(value, (list, tuple)):
        return [n for v in value for n in integers(v)]
    return [value] if isinstance(value, int) else []


def describe(value):
    """A nested argument as something hashable: shapes of tensors, and the numbers too of masks and of integers."""
    if torch.is_tensor(value):
        mask = not value.is_floating_point() or (value.ndim <= 2 and bool(((value == 0) | (value == 1)).all()))
        return tuple(value.shape), value.cpu().numpy().tobytes() if mask and value.dtype != torch.bfloat16 else None
    if isinstance(value, dict):
        return tuple((key, describe(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(describe, value))
    return value if isinstance(value, (int, str)) else None


def find_layouts(forward, root, args, kwargs, places, known):
    """Fill `forward.layouts` before it runs, from `known`, or by a probe whose results `known` keeps.

    places: {(side, hook_name, stream): (denoiser, module)}; those of other denoisers are passed over.
    """
    places = {place: module for place, (denoiser, module) in places.items() if denoiser == forward.denoiser}
    if not places:
        return
    time = time_parameter(root)
    key = (forward.denoiser, forward.rows, describe({k: v for k, v in forward.arguments.items() if k != time}))
    if missing := {place: module for place, module in places.items() if (key, place) not in known}:
        found = Probe(root, forward, args, kwargs, missing).layouts
        known |= {(key, place): layout for place, layout in found.items()}
    forward.layouts = {place: known[key, place] for place in places}
