"""What hooks on modules keep while a denoiser runs: the tokens of some rows."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields

import torch

from diffusion.guidance import RoleFinder, check_order
from diffusion.locate import (
    NEVER_RAN,
    SEVERAL_TIMES,
    find_layouts,
    has_more_than_sample,
    note_sampled,
    sampled_key,
)
from diffusion.repeated import RunWatch
from diffusion.token_layout import NotHookable
from diffusion.unnoticed import processors_put_back
from errors import UsageError, check_choice
from store.hook_point import STREAMS

# What `rows` asks for: the role of the rows under each suffix of the cache's keys.
ROLES = {"cond": {"": "cond"}, "uncond": {"": "uncond"}, "both": {"": "cond", "_uncond": "uncond"}}


@dataclass(frozen=True)
class CacheOptions:
    """What of a sampling is kept: the options of `HookedDiffusionModel.cache`, where what comes of
    them is described."""

    save_input: bool = False  # what the modules take
    save_output: bool = True  # what they return
    rows: str = "cond"  # of classifier-free guidance: cond, uncond or both
    stream: str = "image"  # which tokens of a joint block: image or text
    cache_every_n_timesteps: int = 1  # steps 0, n, 2n, ...
    dtype: torch.dtype | None = None  # of what is kept; None is the model's own
    choose: Callable | None = (
        None  # choose(step, tokens) -> the image tokens to keep of each prompt; None is all
    )
    order: tuple | None = (
        None  # of the passes in a step, such as ("uncond", "cond"), where they can't be told; None asks
    )

    def __post_init__(self):
        check_choice("rows", self.rows, ROLES)
        check_order(self.order)
        check_choice("stream", self.stream, STREAMS)
        if not self.sides:
            raise UsageError("nothing to keep: save_input and save_output are both off")
        if self.cache_every_n_timesteps < 1:
            raise UsageError(
                f"cache_every_n_timesteps: expected at least 1, got {self.cache_every_n_timesteps}"
            )
        if self.choose and self.stream != "image":
            raise UsageError("choose: of image tokens only; texts differ in length")

    @property
    def sides(self):
        return ["input"] * self.save_input + ["output"] * self.save_output

    @classmethod
    def take_from(cls, kwargs):
        """(options, the other keyword arguments), of keyword arguments that hold both."""
        own = {f.name: kwargs[f.name] for f in fields(cls) if f.name in kwargs}
        return cls(**own), {name: value for name, value in kwargs.items() if name not in own}


@dataclass(eq=False)
class Recording:
    """What one side of a module gave for the rows of one role, an entry a step."""

    tokens: list = field(default_factory=list)  # (prompts, tokens, d) on the CPU
    times: list = field(default_factory=list)  # (timestep, sigma)
    chosen: list = field(
        default_factory=list
    )  # (prompts, n), which image tokens are kept, if not all


class Recorder:
    """Gathers, step by step, the wanted stream's tokens of the wanted rows from what the target
    modules saw.

    targets: {hook_name: (denoiser, module)}; denoisers: {name: module}; known: layouts found so
    far, see `locate.find_layouts`; finder: the `RoleFinder` of the sampling, by default one that
    has only the guidance to go by.
    """

    def __init__(self, targets, denoisers, known, options, finder=None):
        self.targets, self.known, self.options = targets, known, options
        self.roles, self.sides, self.stream = ROLES[options.rows], options.sides, options.stream
        self.finder = finder or RoleFinder(options.order)
        self.runs = RunWatch(targets, denoisers, known)
        self.waiting = []  # (step, its time) whose rows only a later step will tell, and all after them
        self.places = {
            (side, name, self.stream): target
            for side in self.sides
            for name, target in targets.items()
        }
        self.recordings = {}  # {(side + suffix, hook_name): Recording}
        self.lengths = {}  # {(suffix, hook_name): text tokens of each prompt}
        self.grids = {}  # {(side, hook_name): grid of the image}
        self.failed = {}  # {hook_name: why}
        self.called, self.stepped = (
            set(),
            set(),
        )  # denoisers that ran, and those whose output reached the scheduler
        self.mixed = {}  # {sampled_key: what a denoiser got in the last step, of which not all is known to be sampled}
        self.copied = {}  # {GPU: the event of its last copy}

    def listen(self, stack, sampling):
        """Register the hooks; `stack` removes them."""
        self.sampling = sampling
        self.runs.listen(stack, sampling)

        def capture(name, side):
            def hook(module, args, kwargs, output=None):
                forward = sampling.current
                layout = None if forward is None else forward.layouts.get((side, name, self.stream))
                if layout is None or isinstance(layout, NotHookable):
                    return
                if (side, name) in forward.captured:
                    forward.captured[side, name] = None
                else:
                    x = layout.take(output if side == "output" else (args, kwargs), forward.rows)
                    forward.captured[side, name] = (
                        x.detach().clone()
                    )  # the model may go on in place

            return hook

        for (side, name, _), (_, module) in self.places.items():
            register = (
                module.register_forward_pre_hook
                if side == "input"
                else module.register_forward_hook
            )
            stack.callback(register(capture(name, side), with_kwargs=True).remove)

    def on_forward(self, forward, module):
        self.called.add(forward.denoiser)
        if (key := sampled_key(forward)) in self.mixed:
            note_sampled(self.known, forward, self.mixed.pop(key))
        if self.sampling.index % self.options.cache_every_n_timesteps == 0:
            with processors_put_back([module]):
                find_layouts(forward, module, self.places, self.known)

    def on_step(self, step):
        for f in step.forwards:
            if has_more_than_sample(f, step.sample) and sampled_key(f) not in self.known:
                self.mixed[sampled_key(f)] = f.sample
        if step.index % self.options.cache_every_n_timesteps:
            return
        self.waiting.append((step, (step.time(), step.sigma())))
        self._keep_labelled()

    def _keep_labelled(self):
        """Of the steps that wait, those whose rows are told by now, in their order."""
        while self.waiting and all(f.roles is not None for f in self.waiting[0][0].forwards):
            self._keep_step(*self.waiting.pop(0))

    def _keep_step(self, step, time):
        running = {f.denoiser for f in step.forwards}
        if again := running & self.stepped if step.index == 0 else None:
            raise UsageError(
                f"a second sampling by {again.pop()} began inside one cache: give each its own"
            )
        self.stepped |= running
        chunks = {}  # {(denoiser, role): (forward, rows)}; of several, the first
        for forward in step.forwards:
            for chunk, role in enumerate(forward.roles):
                chunks.setdefault(
                    (forward.denoiser, role), (forward, slice(chunk * step.R, (chunk + 1) * step.R))
                )
        for name, (denoiser, _) in self.targets.items():
            for suffix, role in self.roles.items():
                if (denoiser, role) not in chunks:
                    continue
                if reason := self.runs.check(name, chunks[denoiser, role][0], f"step {step.index}"):
                    self.failed[name] = reason
                if name not in self.failed:
                    for side in self.sides:
                        self._keep(name, side, suffix, *chunks[denoiser, role], step.index, time)

    def _keep(self, name, side, suffix, forward, rows, index, time):
        layout = forward.layouts[side, name, self.stream]
        if reason := self._problem(name, side, layout, forward):
            self.failed[name] = reason
            return
        self.lengths[suffix, name] = layout.counts[rows]
        recording = self.recordings.setdefault((side + suffix, name), Recording())
        recording.times.append(time)
        x = forward.captured[side, name][rows]
        choose = self.options.choose
        if choose and (chosen := choose(index, x.shape[1])) is not None:
            x = x.take_along_dim(chosen[:, :, None].to(x.device), 1)
            recording.chosen.append(chosen)
        recording.tokens.append(self._to_cpu(x, self.options.dtype or x.dtype))

    def _problem(self, name, side, layout, forward):
        if isinstance(layout, NotHookable):
            return layout.reason
        if (side, name) not in forward.captured:
            return NEVER_RAN.reason
        if forward.captured[side, name] is None:
            return SEVERAL_TIMES.reason
        grid = self.grids.setdefault((side, name), layout.grid)
        if self.stream == "image" and grid != layout.grid:
            return f"has tokens on the grid {grid}, then on {layout.grid}"
        return None

    def _to_cpu(self, x, dtype):
        """A copy, since a view would keep the other chunks alive. From a GPU it is under way, into
        pinned memory."""
        if not x.is_cuda:
            return x.to("cpu", dtype, copy=True)
        copy = x.to(dtype).contiguous().to("cpu", non_blocking=True)
        self.copied[x.device] = torch.cuda.current_stream(x.device).record_event()
        return copy

    def result(self, explicit):
        """The cache, on any thread; raises UsageError for modules that failed, unless a glob found
        them among others."""
        self.finder.check_decided()
        self._keep_labelled()
        for event in self.copied.values():
            event.synchronize()
        for name, (denoiser, _) in self.targets.items():
            if name not in self.failed and (reason := self._missing(name, denoiser)):
                self.failed[name] = reason
        for name, why in self.failed.items():
            if name in explicit or len(self.failed) == len(self.targets):
                raise UsageError(f"{name}: {why}")
        cache = {"timesteps": {}, "sigmas": {}, "grid": {}}
        for (key, name), recording in self.recordings.items():
            if name not in self.failed:
                self._add(cache, key, name, recording)
        if self.stream == "text":
            for (suffix, name), lengths in self.lengths.items():
                if name not in self.failed:
                    cache.setdefault("lengths" + suffix, {})[name] = torch.tensor(lengths)
        return cache

    def _missing(self, name, denoiser):
        """Why there are no tokens of a module that did not fail, or not in every step; None if
        there are."""
        if denoiser not in self.stepped:
            unused = f"is part of {denoiser}, whose output does not reach the scheduler"
            return unused if denoiser in self.called else NEVER_RAN.reason
        kept = {
            (side, role): self.recordings.get((side + s, name))
            for side in self.sides
            for s, role in self.roles.items()
        }
        for (_, role), recording in kept.items():
            if recording is None:
                return f"has no {role}itional rows in this generation; is guidance off?"
        if len({tuple(recording.times) for recording in kept.values()}) > 1:
            return "has unconditional rows in part of the steps; ask for cond and uncond one after the other"
        return None

    def _add(self, cache, key, name, recording):
        n = max(x.shape[1] for x in recording.tokens)  # of text, tokens may come and go
        padded = [torch.nn.functional.pad(x, (0, 0, 0, n - x.shape[1])) for x in recording.tokens]
        cache.setdefault(key, {})[name] = torch.stack(padded, 1)  # (prompts, steps, tokens, d)
        timesteps, sigmas = zip(*recording.times)
        cache["timesteps"][name] = torch.tensor(timesteps, dtype=torch.float64)
        cache["grid"][name] = self.grids[self.sides[-1], name] if self.stream == "image" else (n,)
        if None not in sigmas:
            cache["sigmas"][name] = torch.tensor(sigmas, dtype=torch.float64)
        if recording.chosen:
            cache.setdefault("tokens", {})[name] = torch.stack(
                recording.chosen, 1
            )  # the same for cond and uncond
