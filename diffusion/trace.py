"""A sampling as it happens: the forwards of the denoiser, and the scheduler's steps that they
belong to.

A *step* is one call of the scheduler's `step`; every denoiser forward since the last one belongs to
it. Nothing is assumed about a model but a time parameter in the signature of its `forward` and a
batch-first sample, and nothing about a scheduler but `step(model_output, timestep, sample)`.
"""

import copy
import inspect
import math
import threading
from collections.abc import Callable, Sized
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from diffusion.guidance import CONTEXTS, RoleFinder, pattern_of
from diffusion.randomness import RowByRow, check_repeatable, same_random_numbers
from diffusion.signatures import (
    forward_signature,
    sample_name,
    tensors,
    time_parameter,
    unwrap,
    with_tensor,
)
from errors import UsageError

LIVE = []  # the samplings that are being watched


@dataclass(eq=False)
class Forward:
    """One call of a denoiser."""

    denoiser: str  # component name
    rows: int  # of the batch: chunks x prompts
    context: str | None  # name of the `cache_context` it ran in
    arguments: dict  # by name, all but `self`
    sample: Any  # its first argument: a tensor, or a list with one a row
    conditioning: (
        list  # what else has one entry a row, other than the time: tensors, or lists of tensors
    )
    roles: list | None = (
        None  # "cond", "uncond" or "other", one a chunk; while it runs, those of the plan if there is one
    )
    time: Any = None  # as it was given
    index: int = 0  # of the step that it belongs to
    output: torch.Tensor | None = None  # the prediction, (rows, ...)
    sampled: torch.Tensor | None = (
        None  # which numbers of a row of `sample` are sampled, bool; None: all
    )
    layouts: dict = field(
        default_factory=dict
    )  # where the wanted tokens are, see diffusion/token_layout.py
    captured: dict = field(default_factory=dict)  # what hooks left here
    ran: set = field(
        default_factory=set
    )  # names of the modules that were called, see diffusion/repeated.py
    skipped: str | None = None  # a module that was called without being run


@dataclass(eq=False)
class Step:
    """What one call of `scheduler.step` consumed."""

    index: int  # in its loop
    timestep: Any  # as the scheduler got it
    forwards: list
    scheduler: Any
    R: int  # rows a chunk: prompts x images per prompt
    sample: Any  # what is stepped, (R, ...)

    def time(self):
        """The timestep as a number; UsageError where rows have their own."""
        values = torch.as_tensor(self.timestep).flatten()
        if len(values) > 1 and not (values == values[0]).all():
            raise UsageError("each row has a timestep of its own, and a step has one")
        return float(values[0])

    def sigma(self):
        """The sigma that the denoiser was called at (noise over signal for variance-preserving
        schedules), or None.

        That of the scheduler's list at this step, or, where a scheduler of second order is between
        two of them, the one by which it scales the denoiser's input. To be asked before the
        scheduler goes on.
        """
        timesteps, sigmas = (
            getattr(self.scheduler, "timesteps", None),
            getattr(self.scheduler, "sigmas", None),
        )
        if torch.is_tensor(timesteps) and torch.is_tensor(sigmas) and len(sigmas) >= len(timesteps):
            position = position_of(timesteps, self.time(), own_position(self.scheduler))
            return None if position is None else self._sigma_of_input(float(sigmas[position]))
        alphas = getattr(self.scheduler, "alphas_cumprod", None)
        if torch.is_tensor(alphas) and self.time() in range(len(alphas)):
            alpha = float(alphas[int(self.time())])
            return math.sqrt((1 - alpha) / alpha) if alpha > 0 else None
        return None

    def _sigma_of_input(self, listed):
        """`listed`, or the sigma of which the input's scale 1 / sqrt(sigma^2 + sigma_data^2) tells
        that it was another."""
        if getattr(self.scheduler, "order", 1) == 1 or not hasattr(
            self.scheduler, "scale_model_input"
        ):
            return listed
        twin, one = (
            copy.copy(self.scheduler),
            torch.ones(1, dtype=torch.float64, device=self.sample.device),
        )
        scale = float(twin.scale_model_input(one, self.timestep))
        data = getattr(getattr(self.scheduler, "config", None), "sigma_data", 1.0)
        if scale == 1 or math.isclose(scale, 1 / math.hypot(listed, data), rel_tol=1e-4):
            return listed
        return math.sqrt(max(0.0, 1 / scale**2 - data**2))


class DryRunOver(Exception):
    """Raised inside a scheduler's step to end a generation whose result nobody wants."""


@dataclass(eq=False)
class Sampling:
    """Watches a sampling of P prompts with n images each, and labels the forwards of every step.

    While a denoiser runs, `current` is its `Forward`: hooks below it leave in `captured` what they
    see.
    """

    denoisers: dict  # {name: module}, or what may be one
    schedulers: list  # their classes are patched for as long as the context lasts, since some pipelines step a copy
    P: int | None = 1  # None where nothing tells it: then the scheduler's sample does
    n: int = 1
    on_forward: Callable | None = None  # on_forward(forward, module), before a denoiser runs
    on_step: Callable | None = None  # on_step(step), when the scheduler is called
    plan: dict | None = (
        None  # another sampling's `roles.known`: forwards have their roles from it while they run
    )
    replace: Callable | None = (
        None  # replace(next timestep or None, scheduler) -> what takes the place of its result
    )
    row_seeds: list | None = (
        None  # one per row: noise that the scheduler draws without a generator is each row's own
    )
    rehearsal: bool = False  # a dry run
    roles: RoleFinder | None = None  # labels the rows of each step; None where nobody asks
    repeatable: list | None = (
        None  # schedulers that draw no random numbers beyond seeds; others are refused. None: nobody asks
    )

    R: int | None = field(init=False)  # rows a chunk: prompts x images per prompt
    current: Forward | None = field(default=None, init=False)
    index: int = field(default=0, init=False)  # of the step that is being computed, in its loop
    num_steps: int | None = field(
        default=None, init=False
    )  # of the loop, from its first to the last that is listed
    sample: Any = field(default=None, init=False)  # what the last step returned
    called: set = field(
        default_factory=set, init=False
    )  # names of the denoisers that ran in a step so far
    paused: bool = field(default=False, init=False)  # nothing is noticed then
    times: dict = field(
        default_factory=dict, init=False
    )  # {what a denoiser was given: the scheduler's timestep}, as far as met
    _told: float | None = field(default=None, init=False)  # what `timestep` said in this step
    _position: int | None = field(
        default=None, init=False
    )  # of the last step's timestep in the scheduler's list
    _begins: bool = field(default=False, init=False)  # the next forward is the first of a loop
    _open: list = field(default_factory=list, init=False)  # forwards since the last step
    _stepped: Any = field(default=None, init=False)  # the scheduler of that step
    _fresh: dict = field(
        default_factory=dict, init=False
    )  # {id: scheduler} whose next step begins a loop
    _contexts: dict = field(
        default_factory=dict, init=False
    )  # {id of a module: name of the context that it runs in}

    def __post_init__(self):
        self.R = self.P and self.P * self.n
        self._row_by_row = self.row_seeds and RowByRow(self.row_seeds)

    @contextmanager
    def watch(self):
        with ExitStack() as stack:
            for name, module in self.denoisers.items():
                before = module.register_forward_pre_hook(
                    self._before(name, module), with_kwargs=True
                )
                stack.callback(before.remove)
                stack.callback(module.register_forward_hook(self._after, always_call=True).remove)
            for cls in {
                type(unwrap(m))
                for m in self.denoisers.values()
                if hasattr(unwrap(m), "cache_context")
            }:
                stack.enter_context(patched(cls, "cache_context", self._cache_context))
            LIVE.append(self)
            stack.callback(LIVE.remove, self)
            for cls in {type(scheduler) for scheduler in self.schedulers}:
                stack.enter_context(patched(cls, "step", self._step))
                if hasattr(cls, "set_timesteps"):
                    stack.enter_context(patched(cls, "set_timesteps", self._set_timesteps))
            yield self

    def _before(self, name, module):
        signature, first = forward_signature(module), sample_name(module)
        this, *names = signature.parameters
        time = time_parameter(module) or next((n for n in names if n != first), None)

        def hook(module, args, kwargs):
            if self.paused:
                return
            self._maybe_begin_loop()
            arguments = dict(signature.bind_partial(module, *args, **kwargs).arguments)
            del arguments[this]
            sample = arguments[first]
            others = [v for k, v in arguments.items() if k not in (first, time)]
            context = self._contexts.get(id(unwrap(module)))
            forward = Forward(
                name, len(sample), context, arguments, sample, row_wise(others, sample)
            )
            forward.time, forward.index = arguments.get(time), self.index
            if self.plan is not None:
                forward.roles = self._planned(forward)
            if self.on_forward is not None:
                self.on_forward(forward, module)
            self.current = forward

        return hook

    def _after(self, module, args, output):
        forward, self.current = self.current, None
        if forward is not None and output is not None:
            forward.output = prediction(output, forward)
            self._open.append(forward)

    def _planned(self, forward):
        """Roles of a forward that has not run, from the plan; `_close` compares them with what they
        turn out to be."""
        if forward.context in CONTEXTS and forward.rows == self.R:
            return [CONTEXTS[forward.context]]
        so_far = pattern_of([*self._open, forward], self.R)

        def nameless(pattern):
            return [f[1:] for f in pattern[: len(so_far)]]

        for pattern, roles in sorted(
            self.plan.items(), key=lambda item: item[0][: len(so_far)] != so_far
        ):  # its own first
            if nameless(pattern) == nameless(so_far):
                return roles[len(so_far) - 1]
        return (
            ["cond"]
            if forward.rows == self.R and not self._open
            else ["other"] * (forward.rows // self.R)
        )

    def _cache_context(self, original):
        @contextmanager
        def cache_context(module, name, *args, **kwargs):
            before, self._contexts[id(module)] = self._contexts.get(id(module)), name
            try:
                with original(module, name, *args, **kwargs) as value:
                    yield value
            finally:
                self._contexts[id(module)] = before

        return cache_context

    def _set_timesteps(self, original):
        def set_timesteps(scheduler, *args, **kwargs):
            if not self.paused:
                self._fresh[id(scheduler)] = scheduler
                self._begins |= self._stepped in (None, scheduler) or scheduler in self.schedulers
                if self._stepped in (None, scheduler):
                    self._open = []  # forwards that no step has used belong to none
            return original(scheduler, *args, **kwargs)

        return set_timesteps

    def _maybe_begin_loop(self):
        """Before a forward: the index restarts where timesteps were set since the last step, or
        where a list is at its end."""
        if self._open:
            return
        waiting = any(scheduler in self.schedulers for scheduler in self._fresh.values())
        over = waiting and self.num_steps is not None and self.index >= self.num_steps
        if self._begins or over:
            self.index, self._position, self._begins = 0, None, False

    def _step(self, original):
        signature = inspect.signature(original)

        def step(scheduler, *args, **kwargs):
            anothers = any(scheduler in other.schedulers for other in LIVE if other is not self)
            if self.paused or not self._open or (anothers and scheduler not in self.schedulers):
                return original(scheduler, *args, **kwargs)
            self._stepped = scheduler
            if self._fresh.pop(id(scheduler), None) is not None:
                self.index, self._position = 0, None
            self._begins = False
            forwards, self._open = self._open, []
            self.called |= {f.denoiser for f in forwards}
            model_output, timestep, sample = values_of_step(signature, scheduler, *args, **kwargs)
            timesteps = self._find_position(scheduler, timestep)
            if self.repeatable is not None and self.index == 0 and scheduler not in self.repeatable:
                rest = timesteps[self._position :] if self._position is not None else [timestep]
                self.paused = True  # should it call the denoiser
                try:
                    check_repeatable(original, scheduler, args, kwargs, timestep, sample, rest)
                finally:
                    self.paused = False
                if (
                    scheduler in self.schedulers
                ):  # no copy, of which each generation may make another
                    self.repeatable.append(scheduler)
            self._check_time(forwards, timestep)
            self._close(forwards, scheduler, model_output, timestep, sample)
            self.index += 1
            with self._row_by_row or nullcontext():
                result = original(scheduler, *args, **kwargs)
            if self.replace is not None:
                following = timesteps[self._position + 1 :] if self._position is not None else []
                new = self.replace(following[0] if len(following) else None, scheduler)
                n = len(tensors(result)[0]) // len(
                    new
                )  # some pipelines step the chunks of the guidance too
                result = with_tensor(result, 0, torch.cat([new] * n))
            self.sample = (tensors(result) or [None])[0]
            return result

        return step

    def _find_position(self, scheduler, timestep):
        """Note where the scheduler's list has this timestep, and how long the loop is; returns the
        list, [] without one.

        A loop may begin in the middle of the list, as that of an image with a `strength` does.
        """
        timesteps = getattr(scheduler, "timesteps", None)
        timesteps = timesteps if isinstance(timesteps, Sized) else []
        expected = None if self._position is None else self._position + 1
        if self.index and self.replace is None and self._told is None:
            self._position = expected  # nobody asks, and a GPU need not be waited for
            return timesteps
        own = own_position(scheduler)
        self._position = position_of(timesteps, number(timestep), expected if own is None else own)
        if self.index == 0:
            self.num_steps = len(timesteps) - (self._position or 0) if len(timesteps) else None
        return timesteps

    def _check_time(self, forwards, timestep):
        """A step is complete: what was taken for its index and its timestep must be true."""
        if any(f.index != self.index for f in forwards):
            raise UsageError(
                f"what was step {forwards[0].index} while the denoiser ran is step {self.index} of another loop: give each loop "
                "of the pipeline a sampling of its own"
            )
        told, self._told = self._told, None
        timestep = number(timestep) if told is not None or self.rehearsal else None
        if timestep is None:
            return
        for given in {number(f.time) for f in forwards} - {None}:
            self.times[given] = timestep
        known = told is not None and not math.isnan(told)
        if known and not math.isclose(told, timestep, rel_tol=0.01, abs_tol=1e-6):
            raise UsageError(
                f"an edit of step {self.index} was told the timestep {told:g}, and the scheduler is at {timestep:g}"
            )

    def tell_others(self):
        """What the times of a dry run are called is known to the samplings that will watch the run
        itself."""
        for other in LIVE:
            if other is not self and not set(other.denoisers.values()).isdisjoint(
                self.denoisers.values()
            ):
                other.times |= self.times

    def timestep(self):
        """The scheduler's timestep of the step that is being computed, while a denoiser runs; NaN
        where it can't be told.

        Told by the time that the denoiser is given, of which a dry step says what the scheduler
        calls it, and by the step before; an error when the scheduler is stepped, should it be
        another.
        """
        given = None if self.current is None else number(self.current.time)
        self._told = self._timestep_of(given)
        return self._told

    def _timestep_of(self, given):
        if given in self.times:
            return self.times[given]
        listed = listed_timesteps(self._stepped) if self.index else []
        following = listed[self._position + 1 :] if self._position is not None else []
        if (
            given is not None and self.times and all(a == b for a, b in self.times.items())
        ):  # it gets the scheduler's own
            near = following and math.isclose(following[0], given, rel_tol=0.01)  # but for rounding
            return following[0] if near else given
        if following:
            return following[0]
        for scheduler in (*self._fresh.values(), *self.schedulers):
            listed = listed_timesteps(scheduler)
            if given in listed:
                return given
            sigmas = getattr(scheduler, "sigmas", None)
            position = position_of(sigmas if torch.is_tensor(sigmas) else [], given)
            if position is not None and position < len(listed):
                return listed[position]
        return math.nan

    def _close(self, forwards, scheduler, model_output, timestep, sample=None):
        """A step is complete: label its forwards, compare them with the plan, hand it to
        `on_step`."""
        rows = len(sample) if torch.is_tensor(sample) else self.R
        self._count(rows, forwards)
        if self.on_step is None and self.plan is None:
            return
        doubled = rows == 2 * self.R and torch.equal(
            *sample.chunk(2)
        )  # both chunks of the guidance are stepped
        if rows != self.R and not doubled:
            raise UsageError(
                f"{rows} rows are sampled, not {self.R}: say how many prompts there are, and images of each"
            )
        expected = [f.roles for f in forwards]
        if self.roles is not None:
            self.roles.label(forwards, model_output, self.R)
        others = [
            f for f, planned in zip(forwards, expected) if f.roles != [] and f.roles != planned
        ]
        if self.plan is not None and others:
            raise UsageError(
                f"the passes of step {self.index} are not those of the first step, so an edit may have met the wrong rows: "
                "use rows='all', or limit it to earlier steps"
            )
        if self.on_step is not None:
            self.on_step(
                Step(
                    self.index,
                    timestep,
                    [f for f in forwards if f.roles != []],
                    scheduler,
                    self.R,
                    sample,
                )
            )

    def _count(self, rows, forwards):
        """Correct P and R by the rows that are stepped."""
        if self.R is None:
            self.P = self.R = rows
        fewer = (
            rows < self.R and rows % self.P == 0
        )  # some pipelines ignore the number of images per prompt
        more = rows > self.R and any(
            f.rows % rows == 0 and f.rows > rows for f in forwards
        )  # and some add to it
        if fewer or more:
            self.R = rows


def values_of_step(signature, *args, **kwargs):
    """(model output, timestep, sample or None) of a call of a scheduler's `step`: by name, or else
    by place."""
    call = signature.bind_partial(*args, **kwargs)
    given, by_place = {}, []
    for name, value in call.arguments.items():
        kind = signature.parameters[name].kind
        given |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
        by_place += value if kind is inspect.Parameter.VAR_POSITIONAL else [value]
    if "timestep" in given and "sample" in given:  # they may stand in another order
        return given.get("model_output", by_place[1]), given["timestep"], given["sample"]
    return tuple([*by_place, None][1:4])


def position_of(values, value, expected=None):
    """Index of a number in a list or tensor of numbers: `expected` if it is there, else the first;
    None without one."""
    numbers = torch.as_tensor(values).detach().flatten().cpu()
    if value is None or not len(numbers):
        return None
    if isinstance(expected, int) and expected < len(numbers) and numbers[expected] == value:
        return expected
    found = (numbers == value).nonzero()
    return int(found[0]) if len(found) else None


def own_position(scheduler):
    """Where a scheduler says that it is in its list, before it steps; None where it does not
    say."""
    for name in ("step_index", "begin_index"):
        if isinstance(position := getattr(scheduler, name, None), int):
            return position
    return None


def listed_timesteps(scheduler):
    """The timesteps that a scheduler lists, as floats; [] where it lists none."""
    timesteps = getattr(scheduler, "timesteps", None)
    return torch.as_tensor(timesteps).flatten().tolist() if isinstance(timesteps, Sized) else []


def number(time):
    """A time as a float; None where rows or tokens have times of their own, or it is no number."""
    values = (
        torch.as_tensor(time).flatten()
        if torch.is_tensor(time) or isinstance(time, (int, float))
        else torch.empty(0)
    )
    return float(values[0]) if len(values) and bool((values == values[0]).all()) else None


def row_wise(values, sample):
    """Of (nested) arguments, those with an entry a row: tensors (rows, ...), or lists of as many if
    the sample is one.

    Also (rows k, T, d) where the sample has k frames: text is repeated for each.
    """
    found, rows = [], len(sample)
    listed, frames = (
        isinstance(sample, (list, tuple)),
        sample.shape[1:3] if torch.is_tensor(sample) and sample.ndim == 5 else (),
    )
    for value in values:
        if torch.is_tensor(value):
            if value.ndim and len(value) == rows:
                found.append(value)
            elif value.ndim == 3 and len(value) in [rows * k for k in frames]:
                found.append(value.unflatten(0, (rows, -1)))
        elif (
            listed
            and isinstance(value, (list, tuple))
            and len(value) == rows
            and all(map(torch.is_tensor, value))
        ):
            found.append(list(value))
        elif isinstance(value, (dict, list, tuple)):
            found += row_wise(value.values() if isinstance(value, dict) else value, sample)
    return found


def prediction(output, forward):
    """The first tensor of what a denoiser returned, or the first `rows` as one if its sample is a
    list; None if there is none."""
    found, rows = tensors(output), forward.rows
    if (
        isinstance(forward.sample, (list, tuple))
        and len(found) >= rows
        and len({x.shape for x in found[:rows]}) == 1
    ):
        return torch.stack(found[:rows]).detach()
    return found[0].detach() if found and found[0].ndim else None


@dataclass
class Patch:
    """What takes the place of a class attribute while anybody asks for it."""

    own: Any
    """What the class itself had, None if it inherits."""

    original: Callable
    makes: list[Callable]
    """make(function) -> what calls it: of each that asked, the first one innermost."""


PATCHES: dict[tuple[type, str], Patch] = {}
PATCHING = threading.Lock()


@contextmanager
def patched(cls, name, make):
    """Replace the class attribute by `make(original)`, signature kept, and put things back exactly
    as they were.

    Others may replace it too meanwhile, in other threads as well, and each may end first.
    """
    key = cls, name
    with PATCHING:
        patch = PATCHES.setdefault(key, Patch(vars(cls).get(name), getattr(cls, name), []))
        patch.makes.append(make)
        apply_patch(cls, name, patch)
    try:
        yield
    finally:
        with PATCHING:
            patch.makes.remove(make)
            if patch.makes:
                apply_patch(cls, name, patch)
            else:
                del PATCHES[key]
                if patch.own is not None:
                    setattr(cls, name, patch.own)
                else:
                    delattr(cls, name)


def apply_patch(cls, name, patch):
    """Let the class attribute be the original as all who asked want it called."""
    function = patch.original
    for make in patch.makes:
        function = make(function)
    function.__signature__ = inspect.signature(patch.original)
    function.__wrapped__ = patch.original
    setattr(cls, name, function)


@contextmanager
def undisturbed(pipe, schedulers, denoisers, kwargs):
    """Leave no trace of a generation: random states, the generators in `kwargs`, what the pipeline
    and its schedulers note of themselves and the attention processors that it sets are put back; no
    progress bar is shown, no watching sampling sees it.
    """
    processors = {
        m: dict(m.attn_processors)
        for m in map(unwrap, denoisers.values())
        if hasattr(m, "set_attn_processor")
    }
    generators = [
        g
        for v in kwargs.values()
        for g in (v if isinstance(v, list) else [v])
        if isinstance(g, torch.Generator)
    ]
    states = [g.get_state() for g in generators]
    notes = [
        (o, {k: list(v) if isinstance(v, list) else v for k, v in vars(o).items()})
        for o in (pipe, *schedulers)
    ]
    watching = [
        (s, s.paused) for s in LIVE if not set(s.denoisers.values()).isdisjoint(denoisers.values())
    ]
    with same_random_numbers(*schedulers):
        try:
            for other, _ in watching:
                other.paused = True
            vars(pipe)["_progress_bar_config"] = vars(pipe).get("_progress_bar_config", {}) | {
                "disable": True
            }
            yield
        finally:
            for other, before in watching:
                other.paused = before
            for o, before in notes:
                vars(o).clear()
                vars(o).update(before)
            for module, before in processors.items():
                module.set_attn_processor(before)
            for g, state in zip(generators, states):
                g.set_state(state)
