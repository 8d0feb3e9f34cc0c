"""Which rows of a denoiser's batch belong to which prompt, and which of them are conditional: read off the sampling itself.

A *step* is one call of the scheduler's `step`; every denoiser forward since the last one belongs to it. Where several
chunks of rows (unconditional, conditional, ...) reach one step, guidance has mixed them linearly into the scheduler's
`model_output`, s c + (1 - s) u, so least squares over the denoiser's own output chunks gives the weights back, and
the conditional chunk is the one of the largest weight. Nothing is assumed about a model but a time parameter in the
signature of its `forward`, and nothing about a scheduler but `step(model_output, timestep, sample)`.
"""

import inspect
import math
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

TIME_NAMES = ("timestep", "timesteps", "timestep_ratio", "sigma", "sigmas", "t", "time", "noise_level", "noise_labels")
CONTEXTS = {"cond": "cond", "pred_cond": "cond", "uncond": "uncond", "pred_uncond": "uncond"}  # names of cache_context


def unwrap(module):
    """The module itself, out of torch.compile and (Distributed)DataParallel."""
    while True:
        inner = getattr(module, "_orig_mod", None)
        if inner is None and isinstance(module, (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)):
            inner = module.module
        if inner is None:
            return module
        module = inner


def forward_signature(module):
    """Of the class: offloading and casting hooks replace the instance's `forward` by one that takes anything."""
    return inspect.signature(type(unwrap(module)).forward)


def time_parameter(module):
    """Name of the parameter of `module.forward` that carries the time, or None."""
    names = list(forward_signature(module).parameters)
    return next((name for name in TIME_NAMES if name in names), None)


def first_tensor(value):
    """The first tensor in a (nested) tuple, list or dict, or None."""
    if torch.is_tensor(value):
        return value
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return next((t for t in map(first_tensor, values) if t is not None), None)


def with_first_tensor(value, x):
    """`value` with its first tensor replaced by x, in a structure of the same types."""
    if torch.is_tensor(value):
        return x
    items = list(value.items() if isinstance(value, dict) else enumerate(value))
    at = next(key for key, item in items if first_tensor(item) is not None)
    new = {key: with_first_tensor(item, x) if key == at else item for key, item in items}
    if isinstance(value, dict):
        return type(value)(**new)
    return type(value)(*new.values()) if hasattr(value, "_fields") else type(value)(new.values())


@dataclass
class Forward:
    """One call of a denoiser."""

    denoiser: str  # component name
    rows: int  # of the batch: chunks x prompts
    context: str | None  # name of the `cache_context` it ran in
    conditioning: list = field(default_factory=list)  # tensors with one row a batch row, other than sample and time
    output: torch.Tensor | None = None  # the prediction, (rows, ...)
    captured: dict = field(default_factory=dict)  # what hooks left here
    roles: list = field(default_factory=list)  # "cond", "uncond" or "other", one a chunk


@dataclass
class Step:
    """What one call of `scheduler.step` consumed."""

    index: int
    timestep: Any  # as the scheduler got it
    forwards: list
    scheduler: Any

    def sigma(self):
        """The scheduler's sigma at this step (noise over signal for variance-preserving schedules), or None."""
        timesteps, sigmas = getattr(self.scheduler, "timesteps", None), getattr(self.scheduler, "sigmas", None)
        if torch.is_tensor(timesteps) and torch.is_tensor(sigmas) and len(sigmas) >= len(timesteps):
            at = (timesteps.cpu() == float(self.timestep)).nonzero()
            return float(sigmas[at[0, 0]]) if len(at) else None
        alphas = getattr(self.scheduler, "alphas_cumprod", None)
        if torch.is_tensor(alphas) and float(self.timestep) in range(len(alphas)):
            alpha = float(alphas[int(self.timestep)])
            return math.sqrt((1 - alpha) / alpha) if alpha > 0 else None
        return None


def guidance_weights(chunks, model_output):
    """Weight of each chunk in `model_output ~ sum_i w_i chunk_i`, by least squares in float64.

    chunks: list of (R, ...) tensors, model_output: (R, ...). Returns a list of floats, or None where the chunks are
    linearly dependent (identical predictions) or of another shape. Channels past the shorter one's (a learned variance)
    are left out.
    """
    columns = []
    for chunk in chunks:
        a, b = chunk.detach().cpu().double(), model_output.detach().cpu().double()
        if a.numel() != b.numel():
            if a.ndim != b.ndim:
                return None
            shared = tuple(slice(0, min(m, n)) for m, n in zip(a.shape, b.shape))
            a, b = a[shared], b[shared]
        columns.append(a.flatten())
    if len({c.numel() for c in columns}) > 1:
        return None
    A = torch.stack(columns, 1)
    scale = A.norm(dim=0)
    if (scale == 0).any() or torch.linalg.matrix_rank(A / scale, rtol=1e-6) < A.shape[1]:
        return None
    return torch.linalg.lstsq(A, b.flatten()[:, None], driver="gelsd").solution[:, 0].tolist()


def assign_roles(forwards, model_output, R):
    """Fill `roles` of every forward of one step; `R` rows make a chunk. Raises ValueError where rows can't be told.

    In this order: the name of the context a forward ran in; a single chunk is conditional; a chunk whose conditioning is
    the same for all rows, where another's is not, is unconditional; the chunk of the largest weight is conditional.
    """
    chunks = []
    for f in forwards:
        if f.rows % R:
            raise ValueError(
                f"the denoiser got {f.rows} rows, which is no multiple of {R} (prompts x images per prompt): "
                "say how many prompts there are"
            )
        f.roles = ["other"] * (f.rows // R)
        chunks += [(f, c) for c in range(f.rows // R)]
    if all(f.context in CONTEXTS and len(f.roles) == 1 for f in forwards):
        for f in forwards:
            f.roles = [CONTEXTS[f.context]]
        return
    part = lambda x, c: x[c * R : (c + 1) * R]
    inputs = [[part(x, c) for x in f.conditioning] for f, c in chunks]
    varying = [i for i, tensors in enumerate(inputs) if any((x != x[:1]).any() for x in tensors)]
    candidates = varying or list(range(len(chunks)))
    best = candidates[-1]
    if len(candidates) > 1:
        outputs = [part(f.output, c) for f, c in chunks] if all(f.output is not None for f in forwards) else []
        weights = guidance_weights(outputs, model_output) if outputs else None
        if weights is not None:
            if len(weights) == 2 and min(weights) > 0.01:
                raise ValueError(
                    f"can't tell conditional from unconditional rows at a guidance scale between 0 and 1 ({max(weights):.2f}): "
                    "use two prompts or more"
                )
            best = max(candidates, key=lambda i: abs(weights[i]))
        elif not all(len(i) == len(inputs[0]) and all(map(torch.equal, i, inputs[0])) for i in inputs):
            raise ValueError(  # an empty prompt has the rows of the empty negative prompt, and then any label is right
                "can't tell conditional from unconditional rows: the denoiser predicts the same for both "
                "(is its last layer still zero?)"
            )
    for i, (f, c) in enumerate(chunks):
        f.roles[c] = "cond" if i == best else "uncond" if len(chunks) == 2 else "other"


class Sampling:
    """Watches one sampling of `R` rows a step and calls `on_step(step)` with its forwards labelled.

    denoisers: {name: module}; scheduler_classes: patched for as long as the context lasts, since some pipelines copy
    their scheduler. While a denoiser runs, `current` is its `Forward`: hooks below it leave in `captured` what they see.
    Labels are computed once for each pattern of forwards in a step (which denoisers, how many rows, which context).
    `sample` is what the last step returned.
    """

    def __init__(self, denoisers, scheduler_classes, R, on_step: Callable[[Step], None] | None):
        self.denoisers, self.scheduler_classes, self.R, self.on_step = denoisers, set(scheduler_classes), R, on_step
        self.current, self.open, self.index, self.sample = None, [], 0, None
        self.context, self.known = {}, {}

    @contextmanager
    def watch(self):
        with ExitStack() as stack:
            for name, module in self.denoisers.items():
                before = module.register_forward_pre_hook(self._before(name, module), with_kwargs=True)
                stack.callback(before.remove)
                stack.callback(module.register_forward_hook(self._after, always_call=True).remove)
            for cls in {type(unwrap(m)) for m in self.denoisers.values() if hasattr(unwrap(m), "cache_context")}:
                stack.enter_context(patched(cls, "cache_context", self._cache_context))
            for cls in self.scheduler_classes:
                stack.enter_context(patched(cls, "step", self._step))
                if hasattr(cls, "set_timesteps"):
                    stack.enter_context(patched(cls, "set_timesteps", self._set_timesteps))
            yield self

    def _before(self, name, module):
        signature, time = forward_signature(module), time_parameter(module)
        this, first = list(signature.parameters)[:2]

        def hook(module, args, kwargs):
            bound = signature.bind_partial(module, *args, **kwargs).arguments
            rows = len(bound[first])
            others = [v for k, v in bound.items() if k not in (this, first, time) and torch.is_tensor(v)]
            conditioning = [v for v in others if v.ndim and len(v) == rows]
            self.current = Forward(name, rows, self.context.get(id(unwrap(module))), conditioning)

        return hook

    def _after(self, module, args, output):
        forward, self.current = self.current, None
        if forward is not None and output is not None:
            forward.output = first_tensor(output)
            self.open.append(forward)

    def _cache_context(self, original):
        @contextmanager
        def cache_context(module, name, *args, **kwargs):
            before, self.context[id(module)] = self.context.get(id(module)), name
            try:
                with original(module, name, *args, **kwargs) as value:
                    yield value
            finally:
                self.context[id(module)] = before

        return cache_context

    def _set_timesteps(self, original):
        def set_timesteps(scheduler, *args, **kwargs):
            self.open = []  # forwards that no step has used belong to no step of the loop that begins
            return original(scheduler, *args, **kwargs)

        return set_timesteps

    def _step(self, original):
        signature = inspect.signature(original)

        def step(scheduler, *args, **kwargs):
            bound = signature.bind_partial(scheduler, *args, **kwargs).arguments
            names = list(bound)  # scheduler, model output, timestep: by place, whatever their names
            forwards, self.open = self.open, []
            if forwards and self.on_step is not None:
                self._close(Step(self.index, bound[names[2]], forwards, scheduler), bound[names[1]])
                self.index += 1
            result = original(scheduler, *args, **kwargs)
            self.sample = first_tensor(result)
            return result

        return step

    def _close(self, step, model_output):
        pattern = tuple((f.denoiser, f.rows, f.context) for f in step.forwards)
        if pattern in self.known:
            for f, roles in zip(step.forwards, self.known[pattern]):
                f.roles = roles
        else:
            assign_roles(step.forwards, model_output, self.R)
            self.known[pattern] = [f.roles for f in step.forwards]
        self.on_step(step)


@contextmanager
def patched(cls, name, make):
    """Replace the class attribute by `make(original)`, signature kept, and put things back exactly as they were."""
    own, original = vars(cls).get(name), getattr(cls, name)
    replacement = make(original)
    replacement.__signature__ = inspect.signature(original)
    replacement.__wrapped__ = original
    setattr(cls, name, replacement)
    try:
        yield
    finally:
        if own is not None:
            setattr(cls, name, own)
        else:
            delattr(cls, name)


# What `rows` asks for: the role of the rows under each suffix of the cache's keys.
ROLES = {"cond": {"": "cond"}, "uncond": {"": "uncond"}, "both": {"": "cond", "_uncond": "uncond"}}
NEVER_RAN = "never ran in a forward of the denoiser; is it compiled, or are its projections fused?"


class Recorder:
    """Gathers, step by step, the rows of the wanted roles from what the target modules saw.

    targets: {hook_name: (denoiser, module)}; R: rows a chunk; the rest as in `HookedDiffusionModel.cache`.
    """

    def __init__(self, targets, R, save_input=False, save_output=True, rows="cond", stream="image", every=1, dtype=None):
        if rows not in ROLES:
            raise ValueError(f"rows: expected cond, uncond or both, got {rows!r}")
        if stream != "image":
            raise ValueError(f"stream: expected image, got {stream!r}; text tokens of joint blocks can't be cached yet")
        if not (save_input or save_output):
            raise ValueError("nothing to keep: save_input and save_output are both off")
        self.targets, self.R, self.roles, self.every, self.dtype = targets, R, ROLES[rows], every, dtype
        self.sides = ["input"] * save_input + ["output"] * save_output
        self.kept = {}  # {(side + suffix, hook_name): [(prompts, tokens, d), one a step]}
        self.times = {}  # the same keys: [(timestep, sigma), one a step]
        self.ran, self.grids, self.failed = set(), {}, {}

    def listen(self, stack, sampling, denoisers):
        """Register the hooks; `stack` removes them."""
        spatial = {}  # of each module above a target: the spatial shape of its input in the running forward

        def before(key):
            def hook(module, args, kwargs):
                maps = (x for x in (*args, *kwargs.values()) if torch.is_tensor(x) and x.ndim in (4, 5))
                spatial[key] = next((x.shape[2:] for x in maps), None)

            return hook

        def capture(name, side, above):
            def hook(module, args, kwargs, output=None):
                if sampling.current is None or sampling.index % self.every:
                    return
                seen = sampling.current.captured
                x = None if (side, name) in seen else first_tensor(output if side == "output" else (args, kwargs))
                seen[side, name] = None if x is None else x.detach().clone()  # some models go on in place
                seen["grids", name] = [s for key in above if (s := spatial.get(key)) is not None]

            return hook

        for name, (denoiser, module) in self.targets.items():
            root = unwrap(denoisers[denoiser])
            path = next(n for n, m in root.named_modules() if m is module).split(".")
            above = [(denoiser, ".".join(path[:i])) for i in range(len(path), -1, -1)]  # itself, then its ancestors
            for key in above:
                if key not in spatial:
                    spatial[key] = None
                    handle = root.get_submodule(key[1]).register_forward_pre_hook(before(key), with_kwargs=True)
                    stack.callback(handle.remove)
            if "input" in self.sides:
                stack.callback(module.register_forward_pre_hook(capture(name, "input", above), with_kwargs=True).remove)
            if "output" in self.sides:
                stack.callback(module.register_forward_hook(capture(name, "output", above), with_kwargs=True).remove)

    def on_step(self, step):
        if step.index % self.every:
            return
        at = (float(step.timestep), step.sigma())
        for name, (denoiser, _) in self.targets.items():
            forwards = [f for f in step.forwards if f.denoiser == denoiser]
            for suffix, role in self.roles.items():
                place = next(((f, c) for f in forwards for c, r in enumerate(f.roles) if r == role), None)
                for side in self.sides if place and name not in self.failed else ():
                    if (x := self._rows(*place, side, name)) is not None:
                        self.kept.setdefault((side + suffix, name), []).append(x)
                        self.times.setdefault((side + suffix, name), []).append(at)
            if forwards:
                self.ran.add(name)

    def _rows(self, forward, chunk, side, name):
        """(R, tokens, d) on the CPU, or None and an entry in `failed`."""
        if (side, name) not in forward.captured:
            self.failed[name] = NEVER_RAN
            return None
        x = forward.captured[side, name]
        if x is None:
            self.failed[name] = "ran several times in one forward of the denoiser, or returned no tensor"
            return None
        if x.ndim < 2 or len(x) != forward.rows:
            self.failed[name] = f"{side} has shape {tuple(x.shape)}, with no batch axis of {forward.rows} rows"
            return None
        x, self.grids[name] = to_tokens(x[chunk * self.R : (chunk + 1) * self.R], forward.captured["grids", name])
        return x.to("cpu", self.dtype or x.dtype, copy=True)  # a view would keep the other chunks alive

    def result(self, explicit):
        """The cache; raises ValueError for modules that failed, unless a glob found them among others."""
        for name in self.targets:
            times = [self.times.get((side + suffix, name)) for side in self.sides for suffix in self.roles]
            if name not in self.ran:
                self.failed[name] = NEVER_RAN
            elif name not in self.failed and None in times:
                role = list(self.roles.values())[times.index(None) % len(self.roles)]
                self.failed[name] = f"has no {role}itional rows in this generation; is guidance off?"
            elif name not in self.failed and times.count(times[0]) < len(times):
                self.failed[name] = "has unconditional rows in part of the steps; ask for cond and uncond one after the other"
        for name, why in self.failed.items():
            if name in explicit or len(self.failed) == len(self.targets):
                raise ValueError(f"{name}: {why}")
        cache = {"timesteps": {}, "sigmas": {}, "grid": {}}
        for (side, name), steps in self.kept.items():
            if name not in self.failed:
                cache.setdefault(side, {})[name] = torch.stack(steps, 1)  # (prompts, steps, tokens, d)
                timesteps, sigmas = zip(*self.times[side, name])
                cache["timesteps"][name] = torch.tensor(timesteps, dtype=torch.float64)
                cache["grid"][name] = self.grids[name]
                if None not in sigmas:
                    cache["sigmas"][name] = torch.tensor(sigmas, dtype=torch.float64)
        return cache


def to_tokens(x, spatial):
    """(R, d), (R, tokens, d), (R, d, H, W) or (R, d, F, H, W) -> (R, tokens, d) in raster order, and the token grid.

    spatial: shapes of the feature maps that the modules above got, nearest first; a token axis takes the first that fits.
    """
    if x.ndim == 2:
        return x[:, None], (1,)
    if x.ndim >= 4:
        return x.flatten(2).transpose(1, 2), tuple(x.shape[2:])
    return x, next((tuple(s) for s in spatial if math.prod(s) == x.shape[1]), (x.shape[1],))
