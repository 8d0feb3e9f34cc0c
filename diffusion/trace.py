"""Watch a sampling as it happens: which forward of a denoiser belongs to which step of the
scheduler.

A *step* is one call of the scheduler's `step`. Every denoiser forward since the last call belongs
to it. Of a denoiser only two things are assumed: its `forward` has a parameter for the time, and
the first axis of its sample is the batch. Of a scheduler only `step(model_output, timestep,
sample)`.

Example: two prompts with guidance, three steps at the timesteps 667, 334 and 1. A chunk, which is
the conditional or the unconditional rows, has R = 2 rows, so the denoiser gets 4.

    set_timesteps(3)             Nothing is recorded but that the next forward begins a loop.
    unet(x, 667, text) begins    `index` is 0. `current` is a new Forward(denoiser="unet", rows=4,
                                 time=667, index=0), and `on_forward(current, unet)` is called.
      modules of the unet run    Hooks of a `Recorder` put their tokens into `current.captured`.
    unet returns                 The prediction becomes `output` of the forward. The forward is
                                 *open*: it waits for its step. `current` is None again.
    step(output, 667, x)         The open forwards are those of step 0. `roles`, a `RoleFinder`,
                                 sets their roles to ["uncond", "cond"]. `on_step` is called with
                                 Step(index=0, timestep=667, forwards=[that one], R=2, sample=x).
                                 `index` becomes 1. Then the scheduler's own `step` runs, and
                                 `sample` is its result.
    unet(x, 334, text)           A Forward with index 1.
    step(output, 334, x)         Step(index=1, timestep=334); `index` becomes 2.
    unet, step at timestep 1     A Forward and a Step with index 2; `index` becomes 3.
    set_timesteps(3)             The next forward begins a loop, with index 0.

All of this is in `Sampling`. Two of its parts have a class of their own: `LoopPosition` knows which
step comes next, and `Clock` tells its timestep while the denoiser still runs.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.class_patches import patched
from diffusion.forward import Forward, Step, prediction, row_wise
from diffusion.guidance import Pattern, RoleFinder, Roles, pattern_of, role_of_context
from diffusion.randomness import RowByRow, check_repeatable, same_random_numbers
from diffusion.schedulers import (
    StepArguments,
    listed_timesteps,
    number,
    own_position,
    position_of,
    step_arguments,
    timesteps_of,
)
from diffusion.signatures import (
    forward_signature,
    result_tensor,
    sample_name,
    time_parameter,
    unwrap,
    with_result,
)
from errors import UsageError

LIVE: list["Sampling"] = []  # the samplings that are being watched


class DryRunOver(Exception):
    """Raised inside a scheduler's step to end a generation whose result nobody needs."""


@dataclass(eq=False)
class LoopPosition:
    """Which step of a loop comes next, and where its timestep stands in the scheduler's list.

    A loop begins with the first forward or step after `set_timesteps`. One sampling may hold
    several loops, as that of a pipeline with two denoisers in a row does.
    """

    schedulers: list[Any]

    index: int = 0
    """The index in its loop of the step that is being computed."""

    num_steps: int | None = None
    """The number of steps from the loop's first timestep to the last one listed. None if not
    known."""

    listed_at: int | None = None
    """Where the scheduler lists the timestep of the last step. It differs from the index if a loop
    begins in the middle of the list, as that of an image with a `strength` does."""

    stepped: Any = None
    """The scheduler of the last step."""

    fresh: dict[int, Any] = field(default_factory=dict)
    """{id: scheduler} of those whose timesteps were set and that have made no step since."""

    begins: bool = False
    """Whether the next forward begins a loop."""

    def timesteps_are_set(self, scheduler: Any) -> None:
        """Note that a loop of this scheduler begins with its next step.

        If the scheduler made the last step, or is one of the pipeline's, its loop begins with the
        next forward already. Any other scheduler's timesteps may be set while a loop of the
        pipeline's is running.
        """
        self.fresh[id(scheduler)] = scheduler
        if self.is_current(scheduler) or scheduler in self.schedulers:
            self.begins = True

    def is_current(self, scheduler: Any) -> bool:
        """Return whether the scheduler made the last step, or no scheduler stepped so far."""
        return self.stepped in (None, scheduler)

    def before_first_forward(self) -> None:
        """Begin a loop, if one is due, before the first forward of a step.

        It is due if timesteps were just set, see `begins`, or if they were set while another loop
        ran, and that loop has now made all of its steps.
        """
        is_waiting = any(scheduler in self.schedulers for scheduler in self.fresh.values())
        is_over = self.num_steps is not None and self.index >= self.num_steps
        if self.begins or (is_waiting and is_over):
            self.index = 0
            self.listed_at = None
            self.begins = False

    def before_step(self, scheduler: Any) -> None:
        """Note which scheduler steps; its first step after `set_timesteps` has the index 0."""
        self.stepped = scheduler
        if self.fresh.pop(id(scheduler), None) is not None:
            self.index = 0
            self.listed_at = None
        self.begins = False

    def find(self, scheduler: Any, timestep: Any, is_needed: bool) -> Any:
        """Set `listed_at`, and in the first step `num_steps`; return the scheduler's own list.

        The list is [] if the scheduler has none. Unless the position `is_needed`, it is counted on
        from the step before, since reading a timestep waits for a GPU.
        """
        timesteps = timesteps_of(scheduler)
        expected = None if self.listed_at is None else self.listed_at + 1
        if self.index and not is_needed:
            self.listed_at = expected
            return timesteps

        stated = own_position(scheduler)
        if stated is not None:
            expected = stated
        self.listed_at = position_of(timesteps, number(timestep), expected)
        if self.index == 0:
            self.num_steps = None
            if len(timesteps):
                self.num_steps = len(timesteps) - (self.listed_at or 0)
        return timesteps

    def following(self) -> list[float]:
        """Return the listed timesteps after the last step's; [] if that is not known."""
        if self.index == 0 or self.listed_at is None:
            return []
        return listed_timesteps(self.stepped)[self.listed_at + 1 :]


@dataclass(eq=False)
class Clock:
    """Tells the timestep of a step before the scheduler says it, while the denoiser runs.

    The denoiser is given a time of its own, which may be another number: a flow model gets 0.667
    for the timestep 667. A dry step shows which number means which timestep.
    """

    times: dict[float, float] = field(default_factory=dict)
    """{the time that a denoiser was given: the scheduler's timestep}, as far as they were met."""

    told: float | None = None
    """What was told in the step that is being computed; None if nobody asked."""

    def timestep(self, given: float | None, loop: LoopPosition) -> float:
        """Return the scheduler's timestep when the denoiser is given the time `given`, a number or
        None; NaN if it can't be told. The first of these that fits decides."""
        # 1. the same time was given before
        if given in self.times:
            return self.times[given]

        # 2. so far the denoiser was given the scheduler's timesteps themselves, up to rounding
        following = loop.following()
        is_scheduler_time = self.times and all(a == b for a, b in self.times.items())
        if given is not None and is_scheduler_time:
            is_next = following and math.isclose(following[0], given, rel_tol=0.01)
            return following[0] if is_next else given

        # 3. the timestep that the list has after the last step's
        if following:
            return following[0]

        # 4. at the beginning of a loop: the time is a listed timestep, or a listed sigma
        for scheduler in (*loop.fresh.values(), *loop.schedulers):
            listed = listed_timesteps(scheduler)
            if given in listed:
                return given
            sigmas = getattr(scheduler, "sigmas", None)
            position = position_of(sigmas, given) if torch.is_tensor(sigmas) else None
            if position is not None and position < len(listed):
                return listed[position]
        return math.nan

    def check(self, index: int, forwards: list[Forward], timestep: Any, is_dry: bool) -> None:
        """Compare what was told in step `index` with the scheduler's timestep, and learn from it.

        Raises UsageError if they differ by more than 1 %. Nothing happens if nobody asked and this
        is no dry run, since reading a timestep waits for a GPU.
        """
        told = self.told
        self.told = None
        if told is None and not is_dry:
            return
        actual = number(timestep)
        if actual is None:
            return
        for forward in forwards:
            given = number(forward.time)
            if given is not None:
                self.times[given] = actual
        is_told = told is not None and not math.isnan(told)
        if is_told and not math.isclose(told, actual, rel_tol=0.01, abs_tol=1e-6):
            raise UsageError(
                f"an edit of step {index} was told the timestep {told:g}, and the scheduler is at "
                f"{actual:g}"
            )


@dataclass(eq=False)
class Sampling:
    """Watches a sampling of P prompts with n images each, and labels the rows of every step.

    The page's first lines show on an example what it records when.
    """

    denoisers: dict[str, nn.Module]
    """The components that may be denoisers, by name."""

    schedulers: list[Any]
    """Their classes are patched while the sampling is watched, since some pipelines step a copy."""

    P: int | None = 1
    """The number of prompts. If None, the scheduler's sample tells it."""

    n: int = 1
    """The number of images per prompt."""

    on_forward: Callable[[Forward, nn.Module], None] | None = None
    """Called before a denoiser runs."""

    on_step: Callable[[Step], None] | None = None
    """Called when the scheduler is stepped, before it computes."""

    plan: dict[Pattern, Roles] | None = None
    """The `roles.known` of a dry run. Then forwards have their roles already while they run, as an
    edit needs, and each step is checked against the plan."""

    replace: Callable[[float | None, Any], Tensor] | None = None
    """replace(next timestep or None, scheduler) -> (rows, ...), which takes the place of the
    sample that a step returns. Real images are put in this way."""

    row_seeds: list[int] | None = None
    """One seed per row. Noise that the scheduler draws without a generator follows from them."""

    rehearsal: bool = False
    """Whether this is a dry run, whose result is thrown away."""

    roles: RoleFinder | None = None
    """Labels the rows of each step. If None, they get no roles."""

    repeatable: list[Any] | None = None
    """The schedulers that are known to draw no random numbers beyond the seeds. Another one is
    checked at its first step, refused or added. If None, nothing is checked."""

    R: int | None = field(init=False)
    """The rows of one chunk, P n. None until the first step if P is."""

    current: Forward | None = field(default=None, init=False)
    """The forward that is running."""

    sample: Tensor | None = field(default=None, init=False)
    """What the last step returned."""

    called: set[str] = field(default_factory=set, init=False)
    """The names of the denoisers that ran in a step so far."""

    paused: bool = field(default=False, init=False)
    """While this is set, nothing is recorded."""

    loop: LoopPosition = field(init=False)
    clock: Clock = field(default_factory=Clock, init=False)

    _open: list[Forward] = field(default_factory=list, init=False)
    """The forwards since the last step."""

    _contexts: dict[int, str] = field(default_factory=dict, init=False)
    """{id of a denoiser: name of the `cache_context` in which it runs}."""

    def __post_init__(self):
        self.R = None if self.P is None else self.P * self.n
        self.loop = LoopPosition(self.schedulers)
        self._row_by_row = RowByRow(self.row_seeds) if self.row_seeds else None

    @property
    def index(self) -> int:
        """The index in its loop of the step that is being computed."""
        return self.loop.index

    @property
    def num_steps(self) -> int | None:
        """The number of steps of the loop; None if not known."""
        return self.loop.num_steps

    @num_steps.setter
    def num_steps(self, count: int | None) -> None:
        self.loop.num_steps = count

    def timestep(self) -> float:
        """Return the scheduler's timestep of the step that is being computed; NaN if it can't be
        told.

        An edit calls this while a denoiser runs. The scheduler says its timestep only afterwards:
        UsageError is raised then if it is another one.
        """
        given = None if self.current is None else number(self.current.time)
        self.clock.told = self.clock.timestep(given, self.loop)
        return self.clock.told

    def tell_others(self) -> None:
        """Give what a dry run's clock has learned to the samplings that watch the same
        denoisers."""
        for other in watching(self.denoisers):
            if other is not self:
                other.clock.times.update(self.clock.times)

    @contextmanager
    def watch(self) -> Iterator["Sampling"]:
        """Record while the context lasts. The model and the classes are unchanged afterwards."""
        with ExitStack() as stack:
            for name, module in self.denoisers.items():
                before = self._before_forward(name, module)
                handle = module.register_forward_pre_hook(before, with_kwargs=True)
                stack.callback(handle.remove)
                handle = module.register_forward_hook(self._after_forward, always_call=True)
                stack.callback(handle.remove)

            denoiser_classes = {type(unwrap(module)) for module in self.denoisers.values()}
            for cls in denoiser_classes:
                if hasattr(cls, "cache_context"):
                    stack.enter_context(patched(cls, "cache_context", self._note_context))

            LIVE.append(self)
            stack.callback(LIVE.remove, self)

            for cls in {type(scheduler) for scheduler in self.schedulers}:
                stack.enter_context(patched(cls, "step", self._watch_step))
                if hasattr(cls, "set_timesteps"):
                    stack.enter_context(patched(cls, "set_timesteps", self._watch_timesteps))
            yield self

    # ---------------------------------------------------------------------- when a denoiser runs

    def _before_forward(self, name: str, module: nn.Module) -> Callable:
        """Return the hook that makes a `Forward` before the denoiser `name` runs."""
        signature = forward_signature(module)
        first = sample_name(module)
        self_name, *names = signature.parameters
        time = time_parameter(module)
        if time is None:
            time = next((parameter for parameter in names if parameter != first), None)

        def before(module, args, kwargs):
            if self.paused:
                return
            if not self._open:
                self.loop.before_first_forward()

            arguments = dict(signature.bind_partial(module, *args, **kwargs).arguments)
            del arguments[self_name]
            sample = arguments[first]
            others = [value for key, value in arguments.items() if key not in (first, time)]
            forward = Forward(
                denoiser=name,
                rows=len(sample),
                context=self._contexts.get(id(unwrap(module))),
                arguments=arguments,
                sample=sample,
                conditioning=row_wise(others, sample),
                time=arguments.get(time),
                index=self.index,
            )
            if self.plan is not None:
                forward.roles = self._planned_roles(forward)
            if self.on_forward is not None:
                self.on_forward(forward, module)
            self.current = forward

        return before

    def _after_forward(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Give `current` its output, and put it among the forwards of the step that is open.

        PyTorch calls this hook also if the denoiser fails; then the output is None.
        """
        forward = self.current
        self.current = None
        if forward is not None and output is not None:
            forward.output = prediction(output, forward)
            self._open.append(forward)

    def _planned_roles(self, forward: Forward) -> list[str]:
        """Return the roles that the plan has for a forward before it runs.

        The plan is searched for a pattern that begins like the open forwards and this one. A
        pattern of the same denoisers comes before one of others with the same chunks, since a
        second denoiser may take over in a step that the dry run did not reach. `_check_plan`
        compares the roles later with what the complete step tells.
        """
        role = role_of_context(forward, self.R)
        if role is not None:
            return [role]

        so_far = pattern_of([*self._open, forward], self.R)
        count = len(so_far)
        without_names = [call[1:] for call in so_far]
        exact = []
        similar = []
        for pattern, roles in self.plan.items():
            if pattern[:count] == so_far:
                exact.append(roles)
            elif [call[1:] for call in pattern[:count]] == without_names:
                similar.append(roles)
        for roles in exact + similar:
            return roles[count - 1]

        if forward.rows == self.R and not self._open:
            return ["cond"]
        return ["other"] * (forward.rows // self.R)

    def _note_context(self, original: Callable) -> Callable:
        """Return a `cache_context` that also notes its name, such as "cond"."""

        @contextmanager
        def cache_context(module, name, *args, **kwargs):
            before = self._contexts.get(id(module))
            self._contexts[id(module)] = name
            try:
                with original(module, name, *args, **kwargs) as value:
                    yield value
            finally:
                self._contexts[id(module)] = before

        return cache_context

    # ------------------------------------------------------------------- when a scheduler is called

    def _watch_timesteps(self, original: Callable) -> Callable:
        """Return a `set_timesteps` that also notes that a loop begins."""

        def set_timesteps(scheduler, *args, **kwargs):
            if not self.paused:
                if self.loop.is_current(scheduler):
                    self._open = []  # forwards that no step has used belong to none
                self.loop.timesteps_are_set(scheduler)
            return original(scheduler, *args, **kwargs)

        return set_timesteps

    def _watch_step(self, original: Callable) -> Callable:
        """Return a `step` that also completes a step of this sampling."""
        signature = inspect.signature(original)

        def step(scheduler, *args, **kwargs):
            if self.paused or not self._open or self._belongs_to_another(scheduler):
                return original(scheduler, *args, **kwargs)
            return self._take_step(original, signature, scheduler, args, kwargs)

        return step

    def _belongs_to_another(self, scheduler: Any) -> bool:
        """Return whether another sampling that is being watched has this scheduler, and this one
        has not."""
        if scheduler in self.schedulers:
            return False
        return any(scheduler in other.schedulers for other in LIVE if other is not self)

    def _take_step(
        self,
        original: Callable,
        signature: inspect.Signature,
        scheduler: Any,
        args: tuple,
        kwargs: dict,
    ) -> Any:
        """Complete a step with the open forwards, then let the scheduler compute; return its
        result."""
        self.loop.before_step(scheduler)
        forwards = self._open
        self._open = []
        self.called |= {forward.denoiser for forward in forwards}

        arguments = step_arguments(signature, scheduler, *args, **kwargs)
        is_needed = self.replace is not None or self.clock.told is not None
        timesteps = self.loop.find(scheduler, arguments.timestep, is_needed)

        if self.repeatable is not None and self.index == 0 and scheduler not in self.repeatable:
            remaining = [arguments.timestep]
            if self.loop.listed_at is not None:
                remaining = timesteps[self.loop.listed_at :]
            self._check_scheduler(original, scheduler, args, kwargs, arguments, remaining)

        self._check_time(forwards, arguments.timestep)
        self._complete(forwards, scheduler, arguments)
        self.loop.index += 1

        with self._row_by_row or nullcontext():
            result = original(scheduler, *args, **kwargs)
        if self.replace is not None:
            result = self._replaced(result, scheduler, timesteps)
        self.sample = result_tensor(result)
        return result

    def _check_scheduler(
        self,
        original: Callable,
        scheduler: Any,
        args: tuple,
        kwargs: dict,
        arguments: StepArguments,
        remaining: Any,
    ) -> None:
        """Raise UsageError if the scheduler draws random numbers that no seed reaches, see
        `check_repeatable`; otherwise add it to `repeatable`."""
        timestep = arguments.timestep
        self.paused = True  # a scheduler may call the denoiser itself
        try:
            check_repeatable(
                original, scheduler, args, kwargs, timestep, arguments.sample, remaining
            )
        finally:
            self.paused = False
        if scheduler in self.schedulers:  # copies would add up: each generation may make one
            self.repeatable.append(scheduler)

    def _replaced(self, result: Any, scheduler: Any, timesteps: Any) -> Any:
        """Return a scheduler's result with the sample that `replace` gives in place of its own."""
        next_timestep = None
        if self.loop.listed_at is not None:
            following = timesteps[self.loop.listed_at + 1 :]
            next_timestep = following[0] if len(following) else None
        new = self.replace(next_timestep, scheduler)
        repeats = len(result_tensor(result)) // len(new)  # 2 if a pipeline steps both chunks
        return with_result(result, torch.cat([new] * repeats))

    def _check_time(self, forwards: list[Forward], timestep: Any) -> None:
        """Raise UsageError if the index or the timestep that held while the denoiser ran turns out
        to be wrong."""
        if any(forward.index != self.index for forward in forwards):
            raise UsageError(
                f"what was step {forwards[0].index} while the denoiser ran is step {self.index} of "
                "another loop: give each loop of the pipeline a sampling of its own"
            )
        self.clock.check(self.index, forwards, timestep, is_dry=self.rehearsal)

    def _complete(self, forwards: list[Forward], scheduler: Any, arguments: StepArguments) -> None:
        """Label the forwards of a step, compare them with the plan, and call `on_step`.

        Raises UsageError if the scheduler's sample has another number of rows than R.
        """
        sample = arguments.sample
        rows = len(sample) if torch.is_tensor(sample) else self.R
        self._correct_rows(rows, forwards)
        if self.on_step is None and self.plan is None:
            return

        # some pipelines step both chunks of the guidance, which are equal then
        is_doubled = rows == 2 * self.R and torch.equal(*sample.chunk(2))
        if rows != self.R and not is_doubled:
            raise UsageError(
                f"{rows} rows are sampled, not {self.R}: say how many prompts there are, and "
                "images of each"
            )

        planned = [forward.roles for forward in forwards]
        if self.roles is not None:
            self.roles.label(forwards, arguments.model_output, self.R, sample)
        if self.plan is not None:
            self._check_plan(forwards, planned)
        if self.on_step is not None:
            used = [forward for forward in forwards if forward.roles != []]
            step = Step(self.index, arguments.timestep, used, scheduler, self.R, sample)
            self.on_step(step)

    def _check_plan(self, forwards: list[Forward], planned: list[list[str]]) -> None:
        """Raise UsageError if a forward of a complete step has other roles than were planned."""
        for forward, roles in zip(forwards, planned):
            if forward.roles != [] and forward.roles != roles:
                raise UsageError(
                    f"the passes of step {self.index} are not those of the first step, so an edit "
                    "may have met the wrong rows: limit it to earlier steps (steer.py --steps), or "
                    "in Python use rows='all'"
                )

    def _correct_rows(self, rows: int, forwards: list[Forward]) -> None:
        """Correct P and R by the number of rows that are stepped.

        A pipeline may ignore the number of images per prompt, or add to it. It has added to it if a
        forward has several chunks of `rows` rows. For P = R = 2, 4 stepped rows and a forward of 8,
        R becomes 4; with a forward of 4 rows, two chunks of 2 are stepped and R stays.
        """
        if self.R is None:
            self.P = rows
            self.R = rows
        if rows < self.R and rows % self.P == 0:
            self.R = rows
        elif rows > self.R:
            chunked = [f for f in forwards if f.rows > rows and f.rows % rows == 0]
            if chunked:
                self.R = rows


def watching(denoisers: dict[str, nn.Module]) -> list[Sampling]:
    """Return the samplings that watch at least one of these denoisers at present."""
    modules = set(denoisers.values())
    return [other for other in LIVE if not modules.isdisjoint(other.denoisers.values())]


@contextmanager
def undisturbed(
    pipe: Any, schedulers: list[Any], denoisers: dict[str, nn.Module], kwargs: dict
) -> Iterator[None]:
    """Undo, when the context ends, all that a generation changes.

    These are the random states, the generators in `kwargs`, the attributes of the pipeline and its
    schedulers, and the attention processors that the pipeline sets. Meanwhile no progress bar is
    shown, and the samplings that watch the denoisers are paused.
    """
    processors = attention_processors(denoisers)
    generator_states = [(generator, generator.get_state()) for generator in generators_of(kwargs)]
    attributes = [(owner, copied_attributes(owner)) for owner in (pipe, *schedulers)]
    paused = [(other, other.paused) for other in watching(denoisers)]

    with same_random_numbers(*schedulers):
        try:
            for other, _ in paused:
                other.paused = True
            bar_options = vars(pipe).get("_progress_bar_config", {})
            vars(pipe)["_progress_bar_config"] = bar_options | {"disable": True}
            yield
        finally:
            for other, was_paused in paused:
                other.paused = was_paused
            for owner, values in attributes:
                vars(owner).clear()
                vars(owner).update(values)
            for module, values in processors.items():
                module.set_attn_processor(values)
            for generator, state in generator_states:
                generator.set_state(state)


def attention_processors(denoisers: dict[str, nn.Module]) -> dict[nn.Module, dict[str, Any]]:
    """Return {denoiser: {name of an attention: its processor}} for those that let them be set."""
    processors = {}
    for denoiser in denoisers.values():
        module = unwrap(denoiser)
        if hasattr(module, "set_attn_processor"):
            processors[module] = dict(module.attn_processors)
    return processors


def generators_of(kwargs: dict) -> list[torch.Generator]:
    """Return the generators among a pipeline's arguments, also those within lists."""
    generators = []
    for value in kwargs.values():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, torch.Generator):
                generators.append(item)
    return generators


def copied_attributes(owner: Any) -> dict[str, Any]:
    """Return an object's attributes; lists are copied, since a scheduler appends to its own."""
    values = {}
    for name, value in vars(owner).items():
        values[name] = list(value) if isinstance(value, list) else value
    return values
