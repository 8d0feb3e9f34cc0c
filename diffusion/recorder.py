"""What is kept of a sampling: the tokens of some rows, step by step, from hooks on modules.

    recorder = Recorder(targets, denoisers, known, CacheOptions(rows="both"))
    with sampling.watch():              # calls recorder.on_forward and recorder.on_step
        recorder.listen(stack, sampling)
        ...
    cache = recorder.result(explicit)   # {"output": {hook_name: (prompts, steps, tokens, d)}}

`CacheOptions` says what to keep. A hook leaves the tokens of all rows in the `trace.Forward` that
is running (`Recorder.listen`). When the scheduler steps, it is known which rows are conditional,
and their tokens move to a `Recording`, one for each side of a module and each role.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffusion.guidance import RoleFinder, check_order
from diffusion.locate import (
    NEVER_RAN,
    SEVERAL_TIMES,
    find_layouts,
    has_more_than_sample,
    not_stepped,
    note_sampled,
    sampled_key,
)
from diffusion.repeated import RunWatch
from diffusion.text_padding import RealTokens, without_padding
from diffusion.token_layout import Layout, NotHookable
from diffusion.trace import Forward, Sampling, Step
from diffusion.unnoticed import processors_put_back
from errors import UsageError, check_choice
from store.hook_point import STREAMS

# {value of `rows`: {suffix of the cache's keys: role of the rows under it}}
ROLES = {"cond": {"": "cond"}, "uncond": {"": "uncond"}, "both": {"": "cond", "_uncond": "uncond"}}


@dataclass(frozen=True)
class CacheOptions:
    """What to keep of a sampling: the options of `HookedDiffusionModel.cache`.

    Raises UsageError for values that can't be used.
    """

    save_input: bool = False
    """Keep what the modules take."""

    save_output: bool = True
    """Keep what the modules return."""

    rows: str = "cond"
    """cond, uncond or both: which rows of classifier-free guidance."""

    stream: str = "image"
    """image or text: which tokens of a joint block."""

    keep_padding: bool = False
    """With stream="text": also keep the tokens that only fill up a prompt."""

    cache_every_n_timesteps: int = 1
    """Keep steps 0, n, 2n, ..."""

    dtype: torch.dtype | None = None
    """Dtype of what is kept. If None, the model's own."""

    choose: Callable | None = None
    """choose(step, tokens) -> (prompts, n) int64: which image tokens of each prompt to keep in a
    step; None for all."""

    order: tuple[str, ...] | None = None
    """The passes in a step, such as ("uncond", "cond"), where they can't be told."""

    def __post_init__(self) -> None:
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
            raise UsageError(
                'choose: tokens can only be chosen in stream="image", since texts differ in length'
            )

    @property
    def sides(self) -> list[str]:
        """The sides of a module that are kept: input, output or both, in this order."""
        sides = []
        if self.save_input:
            sides.append("input")
        if self.save_output:
            sides.append("output")
        return sides

    def is_kept(self, step: int) -> bool:
        """Return whether the step with this index is kept."""
        return step % self.cache_every_n_timesteps == 0

    @classmethod
    def take_from(cls, kwargs: dict) -> tuple["CacheOptions", dict]:
        """Split keyword arguments: (those that are options of the cache, the others).

        >>> CacheOptions.take_from({"rows": "both", "height": 512})
        (CacheOptions(..., rows='both', ...), {'height': 512})
        """
        names = {option.name for option in fields(cls)}
        options = {name: value for name, value in kwargs.items() if name in names}
        others = {name: value for name, value in kwargs.items() if name not in names}
        return cls(**options), others


@dataclass(eq=False)
class Recording:
    """What one side of a module gave for the rows of one role. Each list has an entry per step."""

    tokens: list[Tensor] = field(default_factory=list)
    """(prompts, tokens, d), on the CPU."""

    times: list[tuple[float, float | None]] = field(default_factory=list)
    """(timestep, sigma), where sigma is None if it is not known."""

    chosen: list[Tensor] = field(default_factory=list)
    """(prompts, n) int64, the indices of the image tokens that are kept. Empty if all are."""


class WaitingStep(NamedTuple):
    """A step whose rows are not told yet."""

    step: Step
    time: tuple[float, float | None]
    """(timestep, sigma), which must be read before the scheduler computes its step."""


class Recorder:
    """Gathers the wanted tokens of the wanted rows, step by step.

    targets: {hook_name: (denoiser's name, module)}. denoisers: {name: module}. known: layouts found
    so far, see `locate.find_layouts`. finder: labels the rows; if None, a `RoleFinder` that has
    only the guidance to go by. real: which text tokens are no padding; if None, all are kept.
    """

    def __init__(
        self,
        targets: dict[str, tuple[str, nn.Module]],
        denoisers: dict[str, nn.Module],
        known: dict,
        options: CacheOptions,
        finder: RoleFinder | None = None,
        real: RealTokens | None = None,
    ):
        self.targets = targets
        self.known = known
        self.real = real
        self.options = options
        self.finder = finder or RoleFinder(options.order)
        self.runs = RunWatch(targets, denoisers, known)

        self.roles = ROLES[options.rows]
        self.sides = options.sides
        self.stream = options.stream
        self.wanted = {}  # {(side, hook_name, stream): (denoiser's name, module)}
        for side in self.sides:
            for name, target in targets.items():
                self.wanted[side, name, self.stream] = target

        # The first of these has rows that only a later step tells; the others follow it in order
        self.waiting: list[WaitingStep] = []
        self.recordings: dict[tuple[str, str], Recording] = {}  # by (side + suffix, hook_name)
        self.lengths: dict[tuple[str, str], list[int]] = {}  # text tokens, by (suffix, hook_name)
        self.num_padding: dict[tuple[str, str], list[int]] = {}  # left out, by (suffix, hook_name)
        # why padding of text is kept, "" if it is left out; by (suffix, hook_name)
        self.padding: dict[tuple[str, str], str] = {}
        self.grids: dict[tuple[str, str], tuple[int, ...]] = {}  # by (side, hook_name)
        self.failed: dict[str, str] = {}  # {hook_name: why}
        self.called: set[str] = set()  # denoisers that ran
        self.stepped: set[str] = set()  # denoisers whose output reached the scheduler
        # {sampled_key: a denoiser's input in the last step}, if it is not known what is sampled
        self.mixed: dict[tuple, Tensor] = {}
        self.copied: dict[torch.device, torch.cuda.Event] = {}  # {GPU: its last copy}

    # ------------------------------------------------------------------- while the model runs

    def listen(self, stack: ExitStack, sampling: Sampling) -> None:
        """Register the hooks; `stack` removes them."""
        self.sampling = sampling
        self.runs.listen(stack, sampling)
        for (side, name, _), (_, module) in self.wanted.items():
            hook = self._capture_hook(side, name)
            if side == "input":
                handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            else:
                handle = module.register_forward_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)

    def _capture_hook(self, side: str, name: str) -> Callable:
        """Return a hook that leaves the module's tokens in the forward that is running.

        `captured` gets None where the module runs a second time in one forward.
        """

        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any = None) -> None:
            forward = self.sampling.current
            if forward is None:
                return
            layout = forward.layouts.get((side, name, self.stream))
            if layout is None or isinstance(layout, NotHookable):
                return
            if (side, name) in forward.captured:
                forward.captured[side, name] = None
                return
            value = output if side == "output" else (args, kwargs)
            x = layout.take(value, forward.rows)
            # a copy, since the model may change its tensor in place
            forward.captured[side, name] = x.detach().clone()

        return hook

    def on_forward(self, forward: Forward, module: nn.Module) -> None:
        """Before a denoiser runs: find where the tokens are."""
        self.called.add(forward.denoiser)
        key = sampled_key(forward)
        if key in self.mixed:
            note_sampled(self.known, forward, self.mixed.pop(key))
        if self.options.is_kept(self.sampling.index):
            with processors_put_back([module]):
                find_layouts(forward, module, self.wanted, self.known)

    # ------------------------------------------------------------------- when a step is complete

    def on_step(self, step: Step) -> None:
        """Keep the step if it is wanted, as soon as its rows are told."""
        for forward in step.forwards:
            key = sampled_key(forward)
            if has_more_than_sample(forward, step.sample) and key not in self.known:
                self.mixed[key] = forward.sample
        if self.options.is_kept(step.index):
            self.waiting.append(WaitingStep(step, (step.time(), step.sigma())))
            self._keep_told_steps()

    def _keep_told_steps(self) -> None:
        """Keep the steps that wait, in their order, up to the first whose rows are not told."""
        while self.waiting:
            step, time = self.waiting[0]
            if any(forward.roles is None for forward in step.forwards):
                return
            self.waiting.pop(0)
            self._keep_step(step, time)

    def _keep_step(self, step: Step, time: tuple[float, float | None]) -> None:
        """Keep what all modules computed in a step."""
        running = {forward.denoiser for forward in step.forwards}
        again = running & self.stepped
        if step.index == 0 and again:
            raise UsageError(
                f"a second sampling by {again.pop()} began inside one cache: give each its own"
            )
        self.stepped |= running

        chunks = chunks_by_role(step)
        for name, (denoiser, _) in self.targets.items():
            for suffix, role in self.roles.items():
                if (denoiser, role) not in chunks:
                    continue
                forward, rows = chunks[denoiser, role]
                reason = self.runs.check(name, forward, f"step {step.index}")
                if reason:
                    self.failed[name] = reason
                if name in self.failed:
                    continue
                for side in self.sides:
                    self._keep(name, side, suffix, forward, rows, step.index, time)

    def _keep(
        self,
        name: str,
        side: str,
        suffix: str,
        forward: Forward,
        rows: slice,
        step: int,
        time: tuple[float, float | None],
    ) -> None:
        """Keep the tokens of some rows of one side of a module, or note why that fails."""
        layout = forward.layouts[side, name, self.stream]
        reason = self._problem(name, side, layout, forward)
        if reason is not None:
            self.failed[name] = reason
            return
        x = forward.captured[side, name][rows]
        if self.stream == "text":
            x, self.lengths[suffix, name] = self._text(x, layout.counts[rows], name, suffix)
        recording = self.recordings.setdefault((side + suffix, name), Recording())
        recording.times.append(time)

        chosen = None
        if self.options.choose is not None:
            chosen = self.options.choose(step, x.shape[1])
        if chosen is not None:
            x = x.take_along_dim(chosen[:, :, None].to(x.device), 1)
            recording.chosen.append(chosen)
        recording.tokens.append(self._to_cpu(x, self.options.dtype or x.dtype))

    def _text(
        self, x: Tensor, counts: list[int], name: str, suffix: str
    ) -> tuple[Tensor, list[int]]:
        """Return (text tokens (R, n, d), how many each row has), without padding if it is known.

        x: (R, T, d). counts: how many of its tokens each row has.
        """
        self.num_padding[suffix, name] = [0] * len(counts)
        if self.real is None:
            self.padding[suffix, name] = "it is to be kept"
            return x, counts
        masks = self.real.mask(self.roles[suffix], counts)
        if masks is None:
            self.padding[suffix, name] = self.real.why_not
            return x, counts
        self.padding[suffix, name] = ""
        lengths = [int(mask.sum()) for mask in masks]
        self.num_padding[suffix, name] = [count - length for count, length in zip(counts, lengths)]
        return without_padding(x, masks), lengths

    def _problem(
        self, name: str, side: str, layout: Layout | NotHookable, forward: Forward
    ) -> str | None:
        """Return why there are no tokens to keep, or tokens on another grid than before."""
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

    def _to_cpu(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a copy on the CPU; a view would keep the batch's other rows in memory.

        From a GPU the copy goes to pinned memory and is still under way.
        """
        if not x.is_cuda:
            return x.to("cpu", dtype, copy=True)
        copy = x.to(dtype).contiguous().to("cpu", non_blocking=True)
        self.copied[x.device] = torch.cuda.current_stream(x.device).record_event()
        return copy

    # ------------------------------------------------------------------- when all is over

    def result(self, explicit: set[str]) -> dict:
        """Return the cache, as `HookedDiffusionModel.cache` describes it. Any thread may call this.

        Raises UsageError where nothing told which rows are conditional, for a module in `explicit`
        that failed, and where all modules failed. Other modules that failed, which a glob found,
        are left out.
        """
        self.finder.label_or_refuse_the_rest()
        self._keep_told_steps()
        for event in self.copied.values():
            event.synchronize()

        for name, (denoiser, _) in self.targets.items():
            if name not in self.failed:
                reason = self._missing(name, denoiser)
                if reason is not None:
                    self.failed[name] = reason
        for name, reason in self.failed.items():
            if name in explicit or len(self.failed) == len(self.targets):
                raise UsageError(f"{name}: {reason}")

        cache = {"timesteps": {}, "sigmas": {}, "grid": {}}
        for (key, name), recording in self.recordings.items():
            if name not in self.failed:
                self._add(cache, key, name, recording)
        if self.stream == "text":
            for (suffix, name), lengths in self.lengths.items():
                if name not in self.failed:
                    cache.setdefault("lengths" + suffix, {})[name] = torch.tensor(lengths)
                    reason = self.padding[suffix, name]
                    cache.setdefault("padding" + suffix, {})[name] = reason
                    left_out = torch.tensor(self.num_padding[suffix, name])
                    cache.setdefault("num_padding" + suffix, {})[name] = left_out
        return cache

    def _missing(self, name: str, denoiser: str) -> str | None:
        """Return why there are no tokens of a module that did not fail, or not of every step."""
        if denoiser not in self.stepped:
            if denoiser in self.called:
                return not_stepped(denoiser).reason
            return NEVER_RAN.reason

        times = set()
        for side in self.sides:
            for suffix, role in self.roles.items():
                recording = self.recordings.get((side + suffix, name))
                if recording is None:
                    return f"has no {role}itional rows in this generation; is guidance off?"
                times.add(tuple(recording.times))
        if len(times) > 1:
            return (
                "has unconditional rows in part of the steps; ask for cond and uncond one after "
                "the other"
            )
        return None

    def _add(self, cache: dict, key: str, name: str, recording: Recording) -> None:
        """Add one recording to the cache, with all steps in one tensor."""
        # of a text, steps may have different numbers of tokens
        n = max(x.shape[1] for x in recording.tokens)
        padded = [nn.functional.pad(x, (0, 0, 0, n - x.shape[1])) for x in recording.tokens]
        cache.setdefault(key, {})[name] = torch.stack(padded, 1)  # (prompts, steps, tokens, d)

        timesteps = [timestep for timestep, _ in recording.times]
        sigmas = [sigma for _, sigma in recording.times]
        cache["timesteps"][name] = torch.tensor(timesteps, dtype=torch.float64)
        if None not in sigmas:
            cache["sigmas"][name] = torch.tensor(sigmas, dtype=torch.float64)
        if self.stream == "image":
            cache["grid"][name] = self.grids[self.sides[-1], name]
        else:
            cache["grid"][name] = (n,)
        if recording.chosen:  # the same for cond and uncond
            cache.setdefault("tokens", {})[name] = torch.stack(recording.chosen, 1)


def chunks_by_role(step: Step) -> dict[tuple[str, str], tuple[Forward, slice]]:
    """Return where the rows of each role are in a step: {(denoiser, role): (forward, rows)}.

    Where several chunks of a denoiser have one role, the first counts.
    """
    chunks = {}
    for forward in step.forwards:
        for chunk, role in enumerate(forward.roles):
            rows = slice(chunk * step.R, (chunk + 1) * step.R)
            chunks.setdefault((forward.denoiser, role), (forward, rows))
    return chunks
