"""The examples at the top of trace.py, guidance.py and class_patches.py, and what a scheduler
says."""

import inspect

import pytest
import torch
from tiny import PROMPTS, build, generate_options, sd15

from diffusion.class_patches import PATCHES, patched
from diffusion.forward import Forward
from diffusion.guidance import OtherForward, RoleFinder, StepRoles, find_roles
from diffusion.schedulers import number, position_of, step_arguments
from errors import UsageError
from hook import HookedDiffusionModel


def test_what_is_recorded_at_each_event():
    """Two prompts, guidance, three steps: as the page of trace.py tells it."""
    pipe = build(sd15)
    hooked = HookedDiffusionModel.from_pipeline(pipe)
    events = []

    def on_forward(forward, module):
        events.append(("forward", forward.index, forward.rows, float(forward.time), sampling.index))

    def on_step(step):
        (forward,) = step.forwards
        assert forward.output is not None
        assert sampling.current is None
        events.append(("step", step.index, step.R, len(step.sample), step.time(), sampling.index))

    with hooked.watch(2, 1, on_forward, on_step) as sampling:
        pipe(PROMPTS[:2], **generate_options(2, num_inference_steps=3))

    expected = []
    for index, timestep in enumerate(pipe.scheduler.timesteps.tolist()):
        expected.append(("forward", index, 4, timestep, index))
        expected.append(("step", index, 2, 2, timestep, index))
    assert events == expected
    assert pipe.scheduler.timesteps.tolist() == [667, 334, 1]
    assert sampling.index == 3
    assert sampling.num_steps == 3
    assert len(sampling.sample) == 2


def test_roles_of_a_step_by_prompts_and_by_guidance():
    pipe = build(sd15)
    hooked = HookedDiffusionModel.from_pipeline(pipe)
    steps = []
    options = generate_options(2, num_inference_steps=3, guidance_scale=5.0)
    with hooked.watch(2, on_step=steps.append):
        pipe(PROMPTS[:2], **options)
        pipe(PROMPTS[1::-1], **options)
    (forward,) = steps[0].forwards
    (other,) = steps[3].forwards
    u, c = forward.output.chunk(2)
    model_output = 5 * c - 4 * u

    assert find_roles([forward], model_output, 2) == StepRoles([["uncond", "cond"]], 1, False)
    passes = [OtherForward(other.denoiser, other.rows, other.conditioning, other.output)]
    by_prompts = find_roles([forward], model_output, 2, other_forwards=passes)
    assert by_prompts == StepRoles([["uncond", "cond"]], 1, True)
    assert find_roles([forward], c, 2, order=("cond", "other")).roles == [["cond", "other"]]


def test_a_step_without_tensors_tells_nothing_by_other_prompts():
    """A denoiser may return no tensor, and its conditioning may not depend on the prompts."""
    x = torch.ones(2, 3)
    forwards = [Forward("unet", 2, None, {}, x, [x]) for _ in range(2)]
    others = [OtherForward("unet", 2, [x], output) for output in (None, x)]
    told = find_roles(forwards, x, 2, other_forwards=others)
    assert told == StepRoles(None, None, is_sure=False)


@pytest.mark.parametrize("with_another_kind", [False, True])
def test_the_error_names_the_kind_of_step_that_tells_nothing(with_another_kind):
    finder = RoleFinder()
    u, c, other = torch.randn(3, 1, 5, generator=torch.Generator().manual_seed(0))
    conditioning = torch.arange(3.0)[:, None]
    if with_another_kind:  # two chunks, guided
        forward = Forward("unet", 2, None, {}, u, [conditioning[:2]], output=torch.cat([u, c]))
        finder.label([forward], 5 * c - 4 * u, 1)
        assert forward.roles == ["uncond", "cond"]
    # three chunks, mixed with positive weights
    outputs = torch.cat([u, c, other])
    forward = Forward("unet", 3, None, {}, u, [conditioning], index=7, output=outputs)
    finder.label([forward], u + c + other, 1)
    kind = "no step of the kind of step 7" if with_another_kind else "no step"
    with pytest.raises(UsageError, match=f"and in {kind} the guidance scale was above 1"):
        finder.label_or_refuse_the_rest()


class Counter:
    def step(self):
        return "original"


class Inheriting(Counter):
    pass


def wrapping(name):
    def make(function):
        return lambda self: f"{name}({function(self)})"

    return make


@pytest.mark.parametrize("cls", [Counter, Inheriting])
def test_who_patches_first_may_end_first(cls):
    original = vars(cls).get("step")
    a = patched(cls, "step", wrapping("A"))
    b = patched(cls, "step", wrapping("B"))
    calls = []
    for action in (
        a.__enter__,
        b.__enter__,
        lambda: a.__exit__(None, None, None),
        lambda: b.__exit__(None, None, None),
    ):
        action()
        calls.append(cls().step())
    assert calls == ["A(original)", "B(A(original))", "B(original)", "original"]
    assert vars(cls).get("step") is original
    assert not PATCHES


def test_positions_and_times():
    """By hand: which step a timestep is, and which values are one number."""
    assert position_of([9, 5, 5, 1], 5) == 1
    assert position_of([9, 5, 5, 1], 5, expected=2) == 2
    assert position_of([9, 5, 5, 1], 7) is None
    assert position_of([], 7) is None
    assert number(torch.tensor([3, 3])) == 3.0
    assert number(torch.tensor([3, 4])) is None
    assert number("3") is None


def test_arguments_of_a_step_by_name_and_by_position():
    def named(self, model_output, old, timestep, sample):
        pass

    def loose(self, *args, **kwargs):
        pass

    assert step_arguments(inspect.signature(named), None, 1, 2, 3, sample=4) == (1, 3, 4)
    assert step_arguments(inspect.signature(loose), None, 1, 3, 4, 5) == (1, 3, 4)
    assert step_arguments(inspect.signature(loose), None, 1, 3) == (1, 3, None)


def test_two_samplings_read_the_arguments_of_a_step_in_any_order():
    """The second to watch sees the scheduler's own parameters, not those of the first one."""

    class Scheduler:
        def step(self, prediction, before, timestep, timestep_before, sample):
            return sample

    read = []

    def noting(original):
        signature = inspect.signature(original)

        def step(scheduler, *args, **kwargs):
            read.append(step_arguments(signature, scheduler, *args, **kwargs))
            return original(scheduler, *args, **kwargs)

        return step

    with patched(Scheduler, "step", noting), patched(Scheduler, "step", noting):
        Scheduler().step("prediction", None, 7, 8, "sample")
    assert [(arguments.timestep, arguments.sample) for arguments in read] == [(7, "sample")] * 2
