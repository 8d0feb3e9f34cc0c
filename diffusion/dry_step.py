"""A dry step: a generation is begun to find something out, stopped, and leaves no trace.

    sampling = DryStep(model, prompt, options).run()
    sampling.num_steps                            # of the whole generation

Which rows are conditional, how many steps there are and where the image's tokens lie is known only
when the model runs. So its pipeline is called with the user's own arguments and stopped inside the
scheduler's first step. Then everything is put back: random states, what the pipeline and its
schedulers note of themselves, attention processors. The user's hooks do not see it.

`ask_which_rows` runs a dry step with other prompts, and returns what labels rows by the difference.
Where each prompt has images, `check_images_by_row` changes one, and sees which rows that changes.

`model` is a `hook.HookedDiffusionModel` in all of these.
"""

import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffusion.guidance import Memory, OtherForward, Pattern, RoleFinder, Roles
from diffusion.locate import has_more_than_sample, note_sampled
from diffusion.signatures import (
    Prompt,
    count_prompts,
    image_arguments,
    images_in,
    other_image,
    other_prompts,
    outline,
    prompt_arguments,
    takes_prompts,
    tensors,
)
from diffusion.trace import DryRunOver, Forward, Sampling, Step, undisturbed
from diffusion.unnoticed import processors_put_back, without_hooks
from errors import UsageError

OUR_MODULES = ("hook", "diffusion", "store", "errors")  # whatever runs while a model generates
TRIAL_SIZE = 256  # pixels along a side of an image that is only tried, if no size is given
MANY_STEPS = 500  # of which a `strength` of 0.01 leaves several; schedules have 1,000 or more
LEAST_CHANGE = 0.01  # of a row, by which it counts as another one; bfloat16 rounds by 0.004
MOST_IMAGES = 3  # a pipeline that needs more images at once is not told apart from a broken one


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

    plan: dict[Pattern, Roles] | None = None
    """The roles of the rows in each kind of step, where they are known before."""

    must_tell: bool = True
    """Whether the finder must have told the rows of a step of each denoiser before it stops."""

    must_repeat: bool = True
    """Whether a scheduler whose random numbers no seed reaches is refused. A scheduler is tried
    once for all generations with such options."""

    count_steps: bool = False
    """Whether to find out in which steps each denoiser runs, where several take turns, see
    `steps_of`. Then the dry step continues to the last step of the loop, and denoisers that have
    run return what they returned before, without computing."""

    ran: set[str] = field(default_factory=set, init=False)  # denoisers that need not run again
    steps: dict[str, list[int]] = field(default_factory=dict, init=False)  # {denoiser: its steps}
    take_turns: bool = field(default=False, init=False)  # whether one did not run in the first step
    sampling: Sampling | None = field(default=None, init=False)
    was_stopped: bool = field(default=False, init=False)  # by `on_forward` or `on_step`

    def run(self) -> Sampling:
        """Return the `Sampling` that watched: `P` prompts, `R` rows per chunk, `num_steps` steps.

        Raises UsageError where the pipeline refuses its arguments, where it needs an image that it
        is not given, where the rows can't be told, and where the scheduler never makes a step.
        """
        denoisers = self.model.denoisers.values()
        try:
            with without_hooks(denoisers):
                self._generate()
        except Exception as error:
            if self.sampling is None or self.sampling.called:
                raise
            names = missing_images(self.model, self.prompt, self.options)
            if names:
                raise UsageError(needs_images(self.model.pipe, names)) from error
            self._generate()  # a denoiser may need a hook, such as one that fills in an argument

        if self.finder is not None and self.must_tell:
            self.finder.label_or_refuse_the_rest()
        if not self.sampling.called and not self.was_stopped:
            raise UsageError(
                "the scheduler never made a step after the denoiser ran, or the denoiser never "
                "ran: check that the pipeline calls both, and hook again what was replaced"
            )
        return self.sampling

    def steps_of(self, denoiser: str) -> list[int] | None:
        """Return the indices of the steps in which a denoiser runs: [2, 3] for one that takes over
        in the third of four steps. None if the scheduler does not list its steps."""
        num_steps = self.sampling.num_steps
        if num_steps is None:
            return None
        if not self.take_turns:
            return list(range(num_steps))
        return self.steps.get(denoiser, [])

    def _generate(self) -> None:
        """Call the pipeline until `_on_step` stops it, and put everything back."""
        model = self.model
        self.steps.clear()
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
                self._on_forward,
                self._on_step,
                plan=self.plan,
                roles=self.finder,
                rehearsal=True,
                repeatable=repeatable,
            )
            self.sampling = stack.enter_context(watching)
            if self.listen is not None:
                self.listen(stack, self.sampling)
            self.replays = stack.enter_context(Replays(model.denoisers))
            try:
                model(self.prompt, **self.options)
            except DryRunOver:
                self.was_stopped = True
            except ValueError as error:  # such as an argument that the pipeline refuses
                raise UsageError(f"{error}{place_of_user(error)}") from error
            except KeyError as error:  # such as a prompt that is no class of a model of one's own
                place = place_of_user(error)
                if not place:
                    raise
                raise UsageError(f"KeyError: {error}{place}") from error
            self.sampling.tell_others()

    def _on_forward(self, forward: Forward, module) -> None:
        """Give the forward to `on_forward`, unless the denoiser computes nothing in it."""
        if self.on_forward is not None and forward.denoiser not in self.replays.names:
            self.on_forward(forward, module)

    def _on_step(self, step: Step) -> None:
        """Give the step to `on_step`, and stop the generation once every denoiser has run."""
        sampling = self.sampling
        if not self.steps:
            self.take_turns = sampling.called < self.model.denoisers.keys()
        for denoiser in {forward.denoiser for forward in step.forwards}:
            self.steps.setdefault(denoiser, []).append(step.index)
        # a pipeline says how many steps it makes, which may be fewer than its scheduler lists
        announced = getattr(self.model.pipe, "_num_timesteps", None)
        if isinstance(announced, int):
            listed = sampling.num_steps
            sampling.num_steps = announced if listed is None else min(announced, listed)

        if self.on_step is not None and sampling.called - self.ran:
            self.on_step(step)
        if self.finder is None or not self.must_tell or not self.finder.undecided:
            self.ran |= sampling.called
        if self.denoisers is None:
            return
        is_last = sampling.num_steps is None or step.index + 1 >= sampling.num_steps
        is_counted = not self.count_steps or is_last or not self.take_turns
        if self.denoisers <= self.ran and is_counted:
            raise DryRunOver
        if self.count_steps:
            self.replays.replay(self.ran)


class Replays:
    """A context in which denoisers can be made to return what they returned last, and to compute
    nothing.

    So a dry step can follow a whole sampling, to see which denoiser runs when, at the price of one
    step.
    """

    def __init__(self, denoisers: dict[str, Any]):
        self.denoisers = denoisers
        self.names: set[str] = set()
        """The denoisers that compute nothing."""

        self.outputs: dict[str, Any] = {}
        self.stack = ExitStack()

    def __enter__(self) -> "Replays":
        if len(self.denoisers) > 1:  # a single one takes no turns
            for name, module in self.denoisers.items():
                handle = module.register_forward_hook(self._keep_output(name))
                self.stack.callback(handle.remove)
        return self

    def __exit__(self, *_) -> None:
        self.outputs.clear()
        self.stack.close()

    def _keep_output(self, name: str) -> Callable:
        """Return a hook that keeps what the denoiser returns."""

        def hook(module, args, output) -> None:
            self.outputs[name] = output

        return hook

    def replay(self, names: set[str]) -> None:
        """Let these denoisers compute nothing from now on."""
        for name in (names & self.outputs.keys()) - self.names:
            self.names.add(name)
            # on the instance, as offloading does; the hooks that watch the denoiser still run
            attributes = vars(self.denoisers[name])
            if "forward" in attributes:
                self.stack.callback(attributes.__setitem__, "forward", attributes["forward"])
            else:
                self.stack.callback(attributes.pop, "forward")
            attributes["forward"] = lambda *args, name=name, **kwargs: self.outputs[name]


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
    memory = memory_of(model, prompt, options, order)
    other_forwards = None
    if not memory.asked:
        other_forwards = run_with_other_prompts(model, prompt, options)
    if other_forwards is None:
        memory.asked = True
    return RoleFinder(order, other_forwards, memory)


def memory_of(
    model: Any, prompt: Prompt, options: dict, order: tuple[str, ...] | None = None
) -> Memory:
    """Return what the samplings with such options have learned so far."""
    key = (outline_with_prompt(prompt, options), order and tuple(order))
    return model.role_memories.setdefault(key, Memory())


def outline_with_prompt(prompt: Prompt, options: dict) -> tuple:
    """Return `signatures.outline` of all arguments of a generation."""
    return outline(options | {"prompt": prompt})


def run_with_other_prompts(model: Any, prompt: Prompt, options: dict) -> list[OtherForward] | None:
    """Return the forwards of a first step with other prompts.

    None where there are no prompts to change, or the pipeline refuses the changed ones.
    """
    given = prompt_arguments(model.pipe, prompt)
    if "class_labels" in given:  # of the name of a class, the words can't be reversed
        prompt = None
        options = options | given
    changed = other_prompts(prompt if takes_prompts(model.pipe) else None, options)
    if changed is not None:
        other_prompt, options = changed
        prompt = prompt if other_prompt is None else other_prompt
    options = {name: value for name, value in options.items() if not name.startswith("callback")}
    if options.get("num_inference_steps") == 1:
        options["num_inference_steps"] = 2  # the second shows what of the input is sampled

    first = FirstStep(model.known_layouts)
    fails = not first.run(model, prompt, options)
    if first.inputs and not first.is_noted:
        # a `strength` may have left a single step of several; more of them cost nothing here
        more_steps = {"num_inference_steps": MANY_STEPS}
        FirstStep(model.known_layouts).run(model, prompt, options | more_steps)
    return None if changed is None or fails else first.forwards


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
        self.is_noted = False  # whether there was a second step

    def run(self, model: Any, prompt: Prompt, options: dict) -> bool:
        """Run the step, and return whether the pipeline did not fail."""
        dry_step = DryStep(
            model,
            prompt,
            options,
            denoisers=None,
            on_forward=self.on_forward,
            on_step=self.on_step,
            must_repeat=False,
        )
        try:
            dry_step.run()
        except Exception:  # noqa: BLE001  other prompts may be unknown; all else will show again
            return False
        return True

    def on_forward(self, forward: Forward, module) -> None:
        """In the second step, compare the input with that of the first."""
        if forward.denoiser in self.inputs:
            note_sampled(self.known, forward, self.inputs[forward.denoiser])
            self.is_noted = True
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


# ------------------------------------------------------------------------- images of the pipeline


def first_forwards(model: Any, prompt: Prompt, options: dict) -> list[Forward]:
    """Return the forwards of a first step, with what the denoisers were given and predicted, and
    what the second step begins with: an image may be put into the sample between the two.

    Raises what the pipeline raises.
    """
    forwards = []

    def on_forward(forward: Forward, module) -> None:
        if forwards:
            forwards.append(forward)
            raise DryRunOver

    def on_step(step: Step) -> None:
        forwards.extend(step.forwards)

    DryStep(
        model,
        prompt,
        options,
        denoisers=None,
        on_forward=on_forward,
        on_step=on_step,
        must_repeat=False,
    ).run()
    return forwards


def check_images_by_row(model: Any, prompts: list[str], options: dict) -> None:
    """Raise UsageError if the images of one prompt reach the rows of another one, or not its own,
    or if the pipeline fails with several prompts and not with the first alone.

    A pipeline may take a list of images otherwise than as one for each prompt: as several reference
    images of every prompt, or as the frames of a video. So the last images of the lists are changed
    in a first step that is thrown away. With a single prompt, nothing can be tried. It is tried
    once for all generations with such options, which have one image for each of the `prompts`.
    """
    num_prompts = len(prompts)
    memory = memory_of(model, prompts, options)
    if num_prompts == 1 or memory.images_are_checked:
        return
    changed = {}
    alone = dict(options)  # the arguments of the first prompt
    for name, value in options.items():
        if len(images_in(value)) == num_prompts:
            changed[name] = [*value[:-1], other_image(value[-1])]
            alone[name] = value[0]
        elif isinstance(value, list) and len(value) == num_prompts:
            alone[name] = value[:1]
    refused = (
        f"{type(model.pipe).__name__} does not take a list in {', '.join(changed)} as one image "
        "for each prompt: "
    )
    remedy = (
        "; generate one prompt at a time: --batch_size 1 of collect.py and steer.py, "
        "--graft_batch_size 1 of evaluate.py, --max_num_examples 1 of ablate.py"
    )
    try:
        before = first_forwards(model, prompts, options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if not changed or not reaches_denoiser(model, prompts[:1], alone):
            raise
        raise UsageError(f"{refused}it fails with {error}{remedy}") from error
    after = first_forwards(model, prompts, options | changed)
    prompts_that_differ = {row % num_prompts for row in rows_that_differ(before, after)}
    if prompts_that_differ - {num_prompts - 1}:
        raise UsageError(f"{refused}the image of one prompt changes what is made of others{remedy}")
    # at a strength of 1, noise hides nearly all of an image: here any change counts
    if changed and not rows_that_differ(before, after, least_change=0):
        raise UsageError(f"{refused}the last image changes nothing{remedy}")
    sizes = {image.size for name in changed for image in options[name]}
    if len(sizes) > 1 and depends_on_order(model, prompts, options, before):
        raise UsageError(
            f"{refused}the images have different sizes, and the first of a batch decides to which "
            "size the others are scaled; scale the images to one size"
        )
    memory.images_are_checked = True


def depends_on_order(model: Any, prompts: list[str], options: dict, before: list[Forward]) -> bool:
    """Return whether prompts with their images give other rows if they come in reverse order.

    before: the `first_forwards` in their own order.
    """
    num_prompts = len(prompts)
    backwards = {}
    for name, value in options.items():
        is_per_prompt = isinstance(value, list) and len(value) == num_prompts
        backwards[name] = value[::-1] if is_per_prompt else value
    after = first_forwards(model, prompts[::-1], backwards)
    for forward in after:
        forward.sample = flip_rows(forward.sample, num_prompts)
        forward.output = flip_rows(forward.output, num_prompts)
        forward.conditioning = [flip_rows(x, num_prompts) for x in forward.conditioning]
    have_other_shapes = [shapes_in(f) for f in before] != [shapes_in(f) for f in after]
    return have_other_shapes or bool(rows_that_differ(before, after))


def flip_rows(x: Any, num_prompts: int) -> Any:
    """Return a tensor with the rows of the prompts of each chunk in reverse order, and anything
    else as it is.

    For two prompts, and so chunks of two rows, [a, b, c, d] becomes [b, a, d, c].
    """
    if not torch.is_tensor(x) or not x.ndim or len(x) % num_prompts:
        return x
    return x.unflatten(0, (-1, num_prompts)).flip(1).flatten(0, 1)


def shapes_in(forward: Forward) -> list[tuple[int, ...]]:
    """Return the shapes of what a denoiser was given and predicted."""
    values = tensors([forward.sample, *forward.conditioning, forward.output])
    return [tuple(x.shape) for x in values]


def rows_that_differ(
    before: list[Forward], after: list[Forward], least_change: float = LEAST_CHANGE
) -> set[int]:
    """Return in which rows of the batch two lists of forwards differ: in what the denoisers were
    given or in what they predicted.

    A row differs if it has changed by more than `least_change` of itself; on a GPU, numbers may
    change by rounding. Tensors of different shapes are not compared.
    """
    rows = set()
    for first, second in zip(before, after):
        mine = [first.sample, *first.conditioning, first.output]
        theirs = [second.sample, *second.conditioning, second.output]
        for x, y in zip(mine, theirs):
            if torch.is_tensor(x) and torch.is_tensor(y) and x.shape == y.shape:
                change = (x.double() - y.double()).reshape(len(x), -1).norm(dim=1)
                size = x.double().reshape(len(x), -1).norm(dim=1)
                rows.update((change > least_change * size).nonzero()[:, 0].tolist())
    return rows


def missing_images(model: Any, prompt: Prompt, options: dict) -> list[str]:
    """Return the arguments without whose images a pipeline fails before its denoiser runs; [] if it
    fails for another reason.

    Grey images are tried in the arguments that are not given: in none, in each one, in each two of
    them, and so on. The first with which the denoiser is called are those that are missing.
    """
    missing = [name for name in image_arguments(model.pipe) if options.get(name) is None]
    size = (options.get("width") or TRIAL_SIZE, options.get("height") or TRIAL_SIZE)
    grey = Image.new("RGB", size, "grey")
    num_prompts, _ = count_prompts(prompt, options)
    images = grey if num_prompts in (None, 1) else [grey] * num_prompts
    for count in range(MOST_IMAGES + 1):
        for names in combinations(missing, count):
            if reaches_denoiser(model, prompt, options | dict.fromkeys(names, images)):
                return list(names)
    return []


def reaches_denoiser(model: Any, prompt: Prompt, options: dict) -> bool:
    """Return whether a pipeline calls a denoiser with these options; nothing is computed there."""
    reached = []

    def on_forward(forward: Forward, module) -> None:
        reached.append(forward)
        raise DryRunOver

    dry_step = DryStep(
        model, prompt, options, denoisers=None, on_forward=on_forward, must_repeat=False
    )
    try:
        dry_step._generate()
    except Exception:  # noqa: BLE001  any error means that these images are not enough
        return False
    return bool(reached)


def needs_images(pipe: Any, names: list[str]) -> str:
    """Return a message: which images a pipeline needs, and how to give them."""
    options = " ".join(f"{name}=..." for name in names)
    what = "an image" if len(names) == 1 else "images"
    return (
        f"{type(pipe).__name__} needs {what} for each prompt, in {' and '.join(names)}: give "
        f"--inputs {options}, which names an image file, a folder or a column of the data set "
        "(in Python it is an argument of the call)"
    )
