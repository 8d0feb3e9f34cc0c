"""A dry step: a generation is begun to find something out, stopped, and leaves no trace.

    sampling = DryStep(model, prompt, options).run()
    sampling.num_steps                            # of the whole generation

Which rows are conditional, how many steps there are and where the image's tokens lie is known only
when the model runs. So its pipeline is called with the user's own arguments and stopped inside the
scheduler's first step. Then everything is put back: random states, what the pipeline and its
schedulers note of themselves, attention processors. The user's hooks do not see it.

`ask_which_rows` runs a dry step with other prompts, and returns what labels rows by the difference.

`model` is a `hook.HookedDiffusionModel` in all of these.
"""

import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from diffusion.guidance import Memory, OtherForward, RoleFinder
from diffusion.locate import has_more_than_sample, note_sampled
from diffusion.signatures import Prompt, count_prompts, other_prompts, outline
from diffusion.trace import DryRunOver, Forward, Sampling, Step, undisturbed
from diffusion.unnoticed import processors_put_back, without_hooks
from errors import UsageError

OUR_MODULES = ("hook", "diffusion", "store", "errors")  # whatever runs while a model generates


@dataclass(eq=False)
class DryStep:
    """One dry step, or a few where several denoisers take turns."""

    model: Any
    """A `hook.HookedDiffusionModel`."""

    prompt: Prompt

    options: dict
    """The pipeline's other arguments."""

    denoisers: set[str] | None = field(default_factory=set)
    """Names of the denoisers that must have run in a step before it stops. If None, `on_forward` or
    `on_step` stops it by raising `DryRunOver`."""

    on_forward: Callable | None = None
    """on_forward(forward, module) is called before a denoiser runs."""

    on_step: Callable | None = None
    """on_step(step) is called in the first steps of each denoiser only."""

    listen: Callable | None = None
    """listen(stack, sampling) registers further hooks, which `stack` removes."""

    finder: RoleFinder | None = None
    """Labels the rows of these steps; it knows their roles afterwards."""

    must_tell: bool = True
    """Whether the finder must have told the rows of a step of each denoiser before it stops."""

    must_repeat: bool = True
    """Whether a scheduler whose random numbers no seed reaches is refused. A scheduler is tried
    once for all generations with such options."""

    ran: set[str] = field(default_factory=set, init=False)  # denoisers that need not run again
    sampling: Sampling | None = field(default=None, init=False)

    def run(self) -> Sampling:
        """Return the `Sampling` that watched: `P` prompts, `R` rows per chunk, `num_steps` steps.

        Raises UsageError where the pipeline refuses its arguments, where the rows can't be told,
        and where the scheduler never makes a step.
        """
        denoisers = self.model.denoisers.values()
        try:
            with without_hooks(denoisers):
                self._generate()
        except Exception:
            if self.sampling is None or self.sampling.called:
                raise
            self._generate()  # a denoiser may need a hook, such as one that fills in an argument

        if self.finder is not None and self.must_tell:
            self.finder.label_or_refuse_the_rest()
        if not self.sampling.called:
            raise UsageError(
                "the scheduler never made a step after the denoiser ran, or the denoiser never "
                "ran: check that the pipeline calls both, and hook again what was replaced"
            )
        return self.sampling

    def _generate(self) -> None:
        """Call the pipeline until `_on_step` stops it, and put everything back."""
        model = self.model
        repeatable = None
        if self.must_repeat:
            kind = outline_with_prompt(self.prompt, self.options)
            repeatable = model.repeatable.setdefault(kind, [])
        num_prompts, num_images = count_prompts(self.prompt, self.options)

        with ExitStack() as stack:
            stack.enter_context(processors_put_back(model.denoisers.values()))
            stack.enter_context(
                undisturbed(model.pipe, model.schedulers, model.denoisers, self.options)
            )
            watching = model.watch(
                num_prompts,
                num_images,
                self.on_forward,
                self._on_step,
                roles=self.finder,
                rehearsal=True,
                repeatable=repeatable,
            )
            self.sampling = stack.enter_context(watching)
            if self.listen is not None:
                self.listen(stack, self.sampling)
            try:
                model(self.prompt, **self.options)
            except DryRunOver:
                pass
            except ValueError as error:  # such as an argument that the pipeline refuses
                raise UsageError(f"{error}{place_of_user(error)}") from error
            self.sampling.tell_others()

    def _on_step(self, step: Step) -> None:
        """Give the step to `on_step`, and stop the generation once every denoiser has run."""
        sampling = self.sampling
        # a pipeline says how many steps it makes, which may be fewer than its scheduler lists
        announced = getattr(self.model.pipe, "_num_timesteps", None)
        if isinstance(announced, int):
            listed = sampling.num_steps
            sampling.num_steps = announced if listed is None else min(announced, listed)

        if self.on_step is not None and sampling.called - self.ran:
            self.on_step(step)
        if self.finder is None or not self.must_tell or not self.finder.undecided:
            self.ran |= sampling.called
        if self.denoisers is not None and self.denoisers <= self.ran:
            raise DryRunOver


def place_of_user(error: Exception) -> str:
    """Return the innermost line of the user's own code at which an error arose, " (my_model.py,
    line 7)"; "" if it arose in a package or in this project."""
    place = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = Path(frame.f_code.co_filename)
        module = frame.f_globals.get("__name__", "").partition(".")[0]
        if module not in OUR_MODULES and "site-packages" not in file.parts:
            place = f" ({file.name}, line {line})"
    return place


def ask_which_rows(
    model: Any, prompt: Prompt, options: dict, order: tuple[str, ...] | None = None
) -> RoleFinder:
    """Return a `RoleFinder`, which labels the rows of the generation that follows.

    Once for all generations with such options, a dry step is run with other prompts: the rows that
    it changes are conditional. Where a denoiser gets more than the sample, such as a picture to
    edit, it also shows which numbers of its input are sampled.
    """
    key = (outline_with_prompt(prompt, options), order and tuple(order))
    memory = model.role_memories.setdefault(key, Memory())
    other_forwards = None
    if not memory.asked:
        other_forwards = run_with_other_prompts(model, prompt, options)
    if other_forwards is None:
        memory.asked = True
    return RoleFinder(order, other_forwards, memory)


def outline_with_prompt(prompt: Prompt, options: dict) -> tuple:
    """Return `signatures.outline` of all arguments of a generation."""
    return outline(options | {"prompt": prompt})


def run_with_other_prompts(model: Any, prompt: Prompt, options: dict) -> list[OtherForward] | None:
    """Return the forwards of a first step with other prompts.

    None where there are no prompts to change, or the pipeline refuses the changed ones.
    """
    changed = other_prompts(prompt, options)
    if changed is not None:
        prompt, options = changed
    options = {name: value for name, value in options.items() if not name.startswith("callback")}
    if options.get("num_inference_steps") == 1:
        options["num_inference_steps"] = 2  # the second shows what of the input is sampled

    first = FirstStep(model.known_layouts)
    dry_step = DryStep(
        model,
        prompt,
        options,
        denoisers=None,
        on_forward=first.on_forward,
        on_step=first.on_step,
        must_repeat=False,
    )
    try:
        dry_step.run()
    except Exception:  # noqa: BLE001  other prompts may be unknown; all else will show again
        return None
    return None if changed is None else first.forwards


class FirstStep:
    """Keeps the forwards of a first step with other prompts, and finds out which numbers of a
    denoiser's input are sampled.

    known: where `locate.note_sampled` writes the answer.
    """

    def __init__(self, known: dict):
        self.known = known
        self.forwards: list[OtherForward] = []
        # {denoiser: its input in the first step}, of those that get more than the sample
        self.inputs: dict[str, Tensor] = {}

    def on_forward(self, forward: Forward, module) -> None:
        """In the second step, compare the input with that of the first."""
        if forward.denoiser in self.inputs:
            note_sampled(self.known, forward, self.inputs[forward.denoiser])
            raise DryRunOver

    def on_step(self, step: Step) -> None:
        if self.forwards:
            raise DryRunOver
        for forward in step.forwards:
            self.forwards.append(
                OtherForward(forward.denoiser, forward.rows, forward.conditioning, forward.output)
            )
            if has_more_than_sample(forward, step.sample):
                self.inputs[forward.denoiser] = forward.sample
        if not self.inputs:
            raise DryRunOver
