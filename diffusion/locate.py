"""A probe: a denoiser is run again on the arguments of a call, to see which tokens depend on what.

Attention is made local for it: a token gets its own query back, so that what it holds depends on
that token of the input and on no other. Once as it is, then with noise on the sample of half of the
rows, then of the other half: tokens that change are the image's. What a denoiser gets in one tensor
with the sample, such as a picture to edit, stays the same in all steps and gets no noise. With
noise on the text embeddings, those that change besides are the text's. Where one half changes the
other's rows, the first axis is no batch axis. Which axis is the width is known from the layers that
made a tensor of its shape.
"""

import hashlib
import inspect
import itertools
import math
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from diffusion.repeated import RunWatch
from diffusion.signatures import forward_signature, sample_name, tensors, time_parameter, unwrap
from diffusion.token_layout import Layout, NotHookable, by_token, sample_grid, spatial_shape
from diffusion.trace import same_random_numbers
from errors import UsageError

NEVER_RAN = NotHookable(
    "never ran in a forward of the denoiser; is it compiled, or are its projections fused?"
)
SEVERAL_TIMES = NotHookable("runs several times in one forward of the denoiser")
CHANNELS_FIRST = (nn.modules.conv._ConvNd, nn.GroupNorm, nn.modules.batchnorm._NormBase)


class LocalAttention(TorchFunctionMode):
    """While it is on, attention gives each token its own query back; `calls` counts how often."""

    calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}

        def argument(name, place):
            return args[place] if len(args) > place else kwargs[name]

        if func is F.scaled_dot_product_attention:
            self.calls += 1
            query, value = argument("query", 0), argument("value", 2)
            fits = query.shape[-1] == value.shape[-1]
            return query if fits else query[..., :1].expand(*query.shape[:-1], value.shape[-1])
        if func is F.multi_head_attention_forward:
            self.calls += 1
            return F.linear(
                argument("query", 0), argument("out_proj_weight", 11), argument("out_proj_bias", 12)
            ), None
        if func in (torch.softmax, torch.Tensor.softmax, F.softmax):
            scores = argument("input", 0)
            self.calls += scores.ndim > 2
            if (
                scores.ndim > 2 and scores.shape[-1] == scores.shape[-2]
            ):  # else of the image over the text: no other image token
                return torch.eye(
                    scores.shape[-1], dtype=scores.dtype, device=scores.device
                ).expand_as(scores)
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


def hash_tokens(x):
    """A number for each token of (rows, tokens, d), int64 (rows, tokens), that changes if the token
    does: the sum of its bits."""
    x = (torch.view_as_real(x).flatten(-2) if x.is_complex() else x) + 0  # + 0 makes -0.0 a 0.0
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.contiguous().view(bits).sum(-1, dtype=torch.int64)


def disturb(x, rows, part=None):
    """A tensor, or a list with one a row, with noise added to some rows; of these only to the
    numbers in `part`, bool."""
    if not torch.is_tensor(x):
        return [disturb(row[None], [0])[0] if r in rows else row for r, row in enumerate(x)]
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x.device, x.dtype)
    chosen = torch.zeros(len(x), *[1] * (x.ndim - 1), dtype=torch.bool)
    chosen[list(rows)] = True
    if part is not None:
        chosen = chosen & part.cpu()
    return torch.where(
        chosen.to(x.device), x + noise if x.is_floating_point() else (x - 1).abs(), x
    )


def disturb_text(value, rows, listed):
    """A nested argument with noise on each sequence of embeddings in it: tensors (rows, length, d),
    or lists if `listed`."""
    if torch.is_tensor(value):
        return (
            disturb(value, range(rows))
            if value.ndim == 3 and len(value) == rows and value.is_floating_point()
            else value
        )
    if isinstance(value, dict):
        return {key: disturb_text(item, rows, listed) for key, item in value.items()}
    if not isinstance(value, (list, tuple)):
        return value
    if (
        listed
        and len(value) == rows
        and all(torch.is_tensor(v) and v.is_floating_point() for v in value)
    ):
        return disturb(value, range(rows))
    return type(value)(disturb_text(item, rows, listed) for item in value)


class Seen(NamedTuple):
    """A tensor that a module took or returned in a run."""

    shape: torch.Size
    form: str | None  # see `tokens.row_view`; None without the rows of the batch
    tokens: torch.Tensor | None  # a fingerprint of each, int64 (rows, tokens)


class Run:
    """One call of the denoiser `root`, and what it showed.

    modules: {(side, hook_name): module} to look at. seen: {(side, hook_name): [Seen], or None if
    the module ran several times}. inputs: {path: shapes that the module there got}, of the modules
    round those. width_last: {shape: whether its last axis is the width, not its second}, as the
    layers say that made such tensors.
    """

    def __init__(self, root, rows, modules):
        self.root, self.rows, self.modules = root, rows, modules
        self.paths = {module: path for path, module in root.named_modules()}
        self.seen, self.inputs, self.width_last = {}, {}, {}

    def call(self, forward, changes, attention):
        """Call the denoiser as in `forward`, but for the arguments in `changes`, with random
        numbers of a fixed seed."""
        signature = forward_signature(self.root)
        this = next(iter(signature.parameters))
        call = inspect.BoundArguments(signature, {this: self.root} | forward.arguments | changes)
        handles = self._listen()
        try:
            with torch.no_grad(), same_random_numbers(), attention:
                torch.manual_seed(0)
                self.root(*call.args[1:], **call.kwargs)
        except Exception as error:  # of a model that attends in a way of its own
            raise UsageError(
                f"{forward.denoiser} can't be probed for its tokens: {type(error).__name__}: {error}"
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        return self

    def _listen(self):
        def learn(module, args, output):
            for x in tensors(output):
                if (last := width_is_last(module, x)) is not None:
                    self.width_last[x.shape] = last

        def look_around(path):
            def hook(module, args, kwargs):
                self.inputs[path] = [
                    x.shape
                    for x in tensors((args, kwargs))
                    if x.ndim > 2 and len(x) % self.rows == 0
                ]

            return hook

        def look(side, hook_name):
            def hook(module, args, kwargs, output=None):
                value = output if side == "output" else (args, kwargs)
                again = (side, hook_name) in self.seen
                self.seen[side, hook_name] = (
                    None if again else [self._look_at(x, module, side) for x in tensors(value)]
                )

            return hook

        handles = []
        for module in self.root.modules():
            if next(module.parameters(recurse=False), None) is not None:
                handles.append(module.register_forward_hook(learn))
        for path in {path for module in self.modules.values() for path in self.around(module)}:
            handles.append(
                self.root.get_submodule(path).register_forward_pre_hook(
                    look_around(path), with_kwargs=True
                )
            )
        for (side, hook_name), module in self.modules.items():
            register = (
                module.register_forward_pre_hook
                if side == "input"
                else module.register_forward_hook
            )
            handles.append(register(look(side, hook_name), with_kwargs=True))
        return handles

    def around(self, module):
        """Paths of a module and of those around it, nearest first."""
        parts = self.paths[module].split(".")
        return [".".join(parts[:i]) for i in range(len(parts), -1, -1)]

    def maps(self, paths):
        """Spatial shapes of the first feature maps that modules got."""
        maps = (next((s for s in self.inputs.get(path, ()) if len(s) > 3), None) for path in paths)
        return [
            spatial_shape(shape, self.rows, self.width_last.get(shape, False))
            for shape in maps
            if shape
        ]

    def _look_at(self, x, module, side):
        form = self._form(x, module, side)
        return Seen(x.shape, form, form and hash_tokens(by_token(x, self.rows, form)))

    def _form(self, x, module, side):
        """See `row_view`; None for a tensor without the rows of the batch."""
        if x.ndim < 2 or len(x) % self.rows or not x.numel():
            return None
        around = self.around(module)
        if x.ndim == 4 and len(x) == self.rows and (heads := self._heads(x, around[1:])):
            return heads
        last = width_is_last(module, x) if side == "input" else None
        last = self.width_last.get(x.shape, x.ndim < 4) if last is None else last
        if x.ndim == 3 and last:
            k = len(x) // self.rows
            sizes = [
                s
                for s in self.maps(around)
                if len(s) == 3 and (x.shape[1], k) == (s[0], s[1] * s[2]) and k != s[0]
            ]
            return "frames" if sizes else "tokens"
        return "tokens" if last or x.ndim < 3 else "map"

    def _heads(self, x, paths):
        """Inside attention, heads are split off the width of the sequences around: on which axis of
        the 4 they are, or None."""
        shapes = next((shapes for path in paths if (shapes := self.inputs.get(path))), [(0,) * 4])
        if len(shapes[0]) != 3:
            return None
        lengths = [shape[1] for shape in shapes if len(shape) == 3]
        tokens_second, tokens_third = (n in lengths or n == sum(lengths) for n in x.shape[1:3])
        return "heads" if tokens_second else "heads first" if tokens_third else None


class Runs(NamedTuple):
    """Calls of a denoiser that differ in one thing each, with attention that is local."""

    plain: Run
    upper: Run  # noise on the sample of the upper half of the rows
    lower: Run  # and of the lower half
    text: Run  # noise on the text embeddings
    has_text: bool
    attention_is_local: bool  # or the model's attention was never met
    idle: dict  # {hook_name: why it can't be hooked} of modules that ran in some of the calls only


def probe(root, forward, places, known):
    """Call the denoiser `root` on the arguments of `forward`, changed in several ways, and look at
    `places`.

    Raises UsageError where a module is called without being run, since something is kept between
    calls.
    """
    rows, sample, time = forward.rows, sample_name(root), time_parameter(root)
    half, attention = (rows + 1) // 2, LocalAttention()
    others = {
        name: value for name, value in forward.arguments.items() if name not in (sample, time)
    }
    text = {
        name: disturb_text(value, rows, isinstance(forward.sample, (list, tuple)))
        for name, value in others.items()
    }
    has_text = any(a is not b for a, b in zip(tensors(text), tensors(others)))
    modules = {(side, name): module for (side, name, _), module in places.items()}
    targets = {name: (forward.denoiser, module) for (_, name), module in modules.items()}
    runs = RunWatch(targets, {forward.denoiser: root}, known)

    trials, idle = itertools.count(1), {}

    def run(changes):
        trial = SimpleNamespace(ran=set(), skipped=None)
        with ExitStack() as stack:
            runs.listen(stack, SimpleNamespace(current=trial))
            found = Run(root, rows, modules).call(forward, changes, attention)
        when = f"trial run {next(trials)} of the denoiser"
        for name in targets:
            if reason := runs.check(name, trial, when):
                idle.setdefault(name, reason)
        return found

    with bare(root):
        plain = run({})
        upper = run({sample: disturb(forward.sample, range(half), forward.sampled)})
        lower = (
            run({sample: disturb(forward.sample, range(half, rows), forward.sampled)})
            if rows > 1
            else plain
        )
        texts = run(text) if any(stream == "text" for _, _, stream in places) else plain
    return Runs(plain, upper, lower, texts, has_text, attention.calls > 0, idle)


def locate(runs, forward, place):
    """Where the tokens of a place, (side, hook_name, stream), are: a Layout, or NotHookable."""
    side, hook_name, stream = place
    if hook_name in runs.idle:
        return NotHookable(runs.idle[hook_name])
    seen = [run.seen.get((side, hook_name), ()) for run in runs[:4]]
    if seen[0] == ():
        return NEVER_RAN
    if None in seen:
        return SEVERAL_TIMES
    if all(x.form is None for x in seen[0]):
        shapes = " and ".join(str(tuple(x.shape)) for x in seen[0]) or "none"
        return NotHookable(
            f"its {side} has no batch axis of {forward.rows} rows; the shape is {shapes}"
        )
    half = (forward.rows + 1) // 2
    reason = f"its {side} holds no {stream} tokens" + "; try the text stream" * (
        stream == "image" and runs.has_text
    )
    for index, (plain, *changed) in enumerate(zip(*seen)):
        if plain.form is None:
            continue
        upper, lower, text = (plain.tokens != other.tokens for other in changed)
        if upper[half:].any() or lower[:half].any():
            reason = f"its {side} mixes the {forward.rows} rows of the batch; the shape is {tuple(plain.shape)}"
            continue
        image = upper | lower
        mask = text & ~image if stream == "text" else image
        if mask.any(1).all():
            return layout_of(runs, forward, place, index, plain, mask)
    return NotHookable(reason)


def layout_of(runs, forward, place, index, seen, mask):
    """The Layout of the tokens in `mask`, bool (rows, tokens), of a module's tensor number `index`;
    or NotHookable."""
    side, hook_name, stream = place
    starts = mask.int().argmax(1).tolist()
    ends = (mask.shape[1] - mask.flip(1).int().argmax(1)).tolist()
    counts = [end - start for start, end in zip(starts, ends)]
    grid = None
    if stream == "image":
        if len(set(counts)) > 1:
            return NotHookable(
                f"its {side} has different numbers of image tokens in different rows: {min(counts)} to {max(counts)}"
            )
        grid = image_grid(runs.plain, forward, runs.plain.modules[side, hook_name], seen, counts[0])
    doubtful = counts != mask.sum(1).tolist() or (runs.has_text and not runs.attention_is_local)
    if doubtful and grid is None:
        return NotHookable(
            "image and text tokens can't be told apart; use the attention of PyTorch (scaled_dot_product_attention)"
        )
    grid = (max(counts),) if grid is None else tuple(grid)
    if stream == "text":
        counts = unmasked(forward, counts)
    shape = seen.shape
    d = {"map": shape[1], "heads": math.prod(shape[2:]), "heads first": shape[1] * shape[-1]}.get(
        seen.form, shape[-1]
    )
    return Layout(index, seen.form, starts, counts, grid, d)


def image_grid(run, forward, module, seen, count):
    """The grid of `count` image tokens: the tensor's own, one of the maps around, or that of the
    patches; None if none fits."""
    around = run.around(module)
    grids = run.maps(around[seen.form.startswith("heads") :])
    if len(seen.shape) > 3 and seen.form in ("map", "tokens"):
        grids = [spatial_shape(seen.shape, forward.rows, seen.form == "tokens")]
    grid = next((g for g in grids if math.prod(g) == count), None)
    grid = grid or sample_grid(count, forward, getattr(run.root, "config", None))
    return grid[1:] if grid and len(grid) == 3 and grid[0] == 1 else grid


def unmasked(forward, counts):
    """How many text tokens of each row a mask among the arguments leaves, where one has their
    number and cuts off the end."""
    if min(counts) < max(counts):
        return counts
    for mask in tensors(list(forward.arguments.values())):
        mask = mask.float()
        if tuple(mask.shape) == (forward.rows, max(counts)) and set(mask.unique().tolist()) <= {
            0,
            1,
        }:
            left = mask.sum(1).int().tolist()
            if all(row[:n].all() and n for row, n in zip(mask, left)):
                return left
    return counts


def width_is_last(module, x):
    """Whether the last axis of what a layer returns or takes is its width, or else the second; None
    if it does not say."""
    if isinstance(module, CHANNELS_FIRST):
        return False
    sizes = {n for p in module.parameters(recurse=False) for n in p.shape}
    return (x.shape[-1] in sizes) if x.ndim > 1 and {x.shape[-1], x.shape[1]} & sizes else None


def has_more_than_sample(forward, sample):
    """Whether a denoiser's first argument has more numbers in a row than what the scheduler
    steps."""
    both_tensors = torch.is_tensor(forward.sample) and torch.is_tensor(sample)
    return both_tensors and forward.sample[0].numel() > sample[0].numel()


def sampled_key(forward):
    return (
        "sampled",
        forward.denoiser,
        tuple(forward.sample.shape[1:]) if torch.is_tensor(forward.sample) else None,
    )


def note_sampled(known, forward, before):
    """Keep in `known` which numbers of a row of a denoiser's first argument are sampled: those not
    as a step `before`.

    Beside this mask stands its digest, which is the same for an equal mask.
    """
    if forward.sample.shape != before.shape:
        return
    part = (forward.sample != before).any(0)
    if part.any() and not part.all():
        key = sampled_key(forward)
        known[key] = part
        known["digest", key] = hashlib.sha256(part.cpu().numpy().tobytes()).digest()


def describe(value):
    """A nested argument as something hashable: shapes of tensors, and the numbers too of integers
    and of what has only two."""
    if torch.is_tensor(value):
        numbers = (
            value.numel()
            and value.numel() <= 1 << 18
            and (not value.is_floating_point() or two_valued(value))
        )
        return tuple(
            value.shape
        ), value.cpu().double().numpy().tobytes() if numbers and not value.is_complex() else None
    if isinstance(value, dict):
        return tuple((key, describe(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(describe, value))
    return value if isinstance(value, (int, str)) else None


def two_valued(x):
    """Whether a tensor holds no more than two different numbers, as masks do."""
    return bool(((x == x.min()) | (x == x.max())).all())


def find_layouts(forward, module, places, known):
    """Fill `forward.layouts` before it runs, from `known`, or by a probe whose results `known`
    keeps.

    places: {(side, hook_name, stream): (denoiser, module)}; those of other denoisers are passed
    over.
    """
    places = {
        place: module
        for place, (denoiser, module) in places.items()
        if denoiser == forward.denoiser
    }
    if not places:
        return
    root = unwrap(module)
    time = time_parameter(root)
    sampled = sampled_key(forward)
    forward.sampled = known.get(sampled)
    key = (
        forward.denoiser,
        forward.rows,
        describe({k: v for k, v in forward.arguments.items() if k != time}),
        known.get(("digest", sampled)),
    )
    if missing := {place: module for place, module in places.items() if (key, place) not in known}:
        runs = probe(root, forward, missing, known)
        known |= {(key, place): locate(runs, forward, place) for place in missing}
    forward.layouts = {place: known[key, place] for place in places}
