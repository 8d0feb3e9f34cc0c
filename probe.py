"""A probe: a denoiser is run again on the arguments of a call, to see which tokens depend on what.

Attention is made local for it: a token gets its own query back, so that what it holds depends on that token of the input and
on no other. Once as it is, then with noise on the sample of half of the rows, then of the other half: tokens that change are
the image's. With noise on the text embeddings, those that change besides are the text's. Where one half changes the other's
rows, the first axis is no batch axis. Which axis is the width is known from the layers that made a tensor of its shape.
"""

import math
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from errors import UsageError
from sampling import same_random_numbers
from signatures import forward_signature, sample_name, tensors, time_parameter
from tokens import Layout, by_token, sample_grid, spatial_shape

NEVER_RAN = "never ran in a forward of the denoiser; is it compiled, or are its projections fused?"
CHANNELS_FIRST = (nn.modules.conv._ConvNd, nn.GroupNorm, nn.modules.batchnorm._NormBase)


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
            return F.linear(argument("query", 0), argument("out_proj_weight", 11), argument("out_proj_bias", 12)), None
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

    forward: the call, see sampling.py, and args, kwargs its arguments. places: {(side, hook_name, stream): module} inside the
    denoiser `root`. `layouts` has for each place a Layout, or a str that says why there is none.
    """

    def __init__(self, root, forward, args, kwargs, places):
        self.root, self.forward, self.rows, self.places = root, forward, forward.rows, places
        self.args, self.kwargs, self.attention = args, kwargs, LocalAttention()
        self.paths = {module: name for name, module in root.named_modules()}
        sample, time = sample_name(root), time_parameter(root)
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
        self.inputs, self.width_last = {}, {}  # {path: shapes}; {shape: whether its last axis is the width, not its second}

        def look(side, name, module):
            def hook(module, args, kwargs, output=None):
                found = []
                for x in tensors(output if side == "output" else (args, kwargs)):
                    form = self._form(x, module, side)
                    found.append((x.shape, form, form and fingerprint(by_token(x, self.rows, form))))
                seen[side, name] = None if (side, name) in seen else found

            return hook

        def look_above(path):
            def hook(module, args, kwargs):
                self.inputs[path] = [x.shape for x in tensors((args, kwargs)) if x.ndim > 2 and len(x) % self.rows == 0]

            return hook

        def learn(module, args, output):
            for x in tensors(output):
                if (last := width_is_last(module, x)) is not None:
                    self.width_last[x.shape] = last

        for module in self.root.modules():
            if next(module.parameters(recurse=False), None) is not None:
                handles.append(module.register_forward_hook(learn))
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
        except Exception as error:  # of a model that attends in a way of its own
            raise UsageError(
                f"{self.forward.denoiser} can't be probed for its tokens: {type(error).__name__}: {error}"
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def _above(self, module):
        """Paths of a module and of those around it, nearest first."""
        parts = self.paths[module].split(".")
        return [".".join(parts[:i]) for i in range(len(parts), -1, -1)]

    def _maps(self, paths):
        """Spatial shapes of the first feature maps that modules got."""
        maps = (next((s for s in self.inputs.get(path, ()) if len(s) > 3), None) for path in paths)
        return [spatial_shape(shape, self.rows, self.width_last.get(shape, False)) for shape in maps if shape]

    def _form(self, x, module, side):
        """See `row_view`; None for a tensor without the rows of the batch."""
        if x.ndim < 2 or len(x) % self.rows or not x.numel():
            return None
        above = self._above(module)
        if x.ndim == 4 and len(x) == self.rows:  # inside attention, heads are split off the width of the sequences around
            around = next((shapes for path in above[1:] if (shapes := self.inputs.get(path))), [(0,) * 4])
            lengths = [shape[1] for shape in around if len(shape) == 3]
            if len(around[0]) == 3 and (fits := [n in lengths or n == sum(lengths) for n in x.shape[1:3]]) != [False, False]:
                return "heads" if fits[0] else "heads first"
        last = width_is_last(module, x) if side == "input" else None
        last = self.width_last.get(x.shape, x.ndim < 4) if last is None else last
        if x.ndim == 3 and last:
            k = len(x) // self.rows
            sizes = [s for s in self._maps(above) if len(s) == 3 and (x.shape[1], k) == (s[0], s[1] * s[2]) and k != s[0]]
            return "frames" if sizes else "tokens"
        return "tokens" if last or x.ndim < 3 else "map"

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
                above = self._above(self.places[side, name, stream])
                grids = self._maps(above[form.startswith("heads") :])
                if len(shape) > 3 and form in ("map", "tokens"):
                    grids = [spatial_shape(shape, self.rows, form == "tokens")]
                grid = next((g for g in grids if math.prod(g) == counts[0]), None)
                grid = grid or sample_grid(counts[0], self.forward, getattr(self.root, "config", None))
            doubtful = counts != mask.sum(1).tolist() or (self.has_text and not self.attention.calls)
            if doubtful and grid is None:
                return "image and text tokens can't be told apart; use the attention of PyTorch (scaled_dot_product_attention)"
            grid = (max(counts),) if grid is None else grid[1:] if len(grid) == 3 and grid[0] == 1 else grid
            if stream == "text":
                counts = self._unmasked(starts, counts)
            d = {"map": shape[1], "heads": math.prod(shape[2:]), "heads first": shape[1] * shape[-1]}.get(form, shape[-1])
            return Layout(index, form, starts, counts, tuple(grid), d)
        return reason

    def _unmasked(self, starts, counts):
        """How many text tokens of each row a mask among the arguments leaves, where one has their number and cuts off the end."""
        for mask in tensors(list(self.forward.arguments.values())):
            mask = mask.float()
            if (
                tuple(mask.shape) == (self.rows, max(counts))
                and min(counts) == max(counts)
                and set(mask.unique().tolist()) <= {0, 1}
            ):
                left = mask.sum(1).int().tolist()
                if all(row[:n].all() and n for row, n in zip(mask, left)):
                    return left
        return counts


def width_is_last(module, x):
    """Whether the last axis of what a layer returns or takes is its width, or else the second; None if it does not say."""
    if isinstance(module, CHANNELS_FIRST):
        return False
    sizes = {n for p in module.parameters(recurse=False) for n in p.shape}
    return (x.shape[-1] in sizes) if x.ndim > 1 and {x.shape[-1], x.shape[1]} & sizes else None


def describe(value):
    """A nested argument as something hashable: shapes of tensors, and the numbers too of integers and of what has only two."""
    if torch.is_tensor(value):
        numbers = value.numel() and value.numel() <= 1 << 18 and (not value.is_floating_point() or two_valued(value))
        return tuple(value.shape), value.cpu().double().numpy().tobytes() if numbers and not value.is_complex() else None
    if isinstance(value, dict):
        return tuple((key, describe(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(describe, value))
    return value if isinstance(value, (int, str)) else None


def two_valued(x):
    """Whether a tensor holds no more than two different numbers, as masks do."""
    return bool(((x == x.min()) | (x == x.max())).all())


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
