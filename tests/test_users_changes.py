"""What the user replaced in a model or attached to it: replaced parts are named, and hooks see the sampling only."""

import functools

import diffusers
import pytest
import torch
from test_hook import HOOK, Denoiser, Euler
from tiny import (
    PROMPTS,
    build,
    generate_options,
    sd15,
)

from hook import Edit, HookedDiffusionModel

pytestmark = pytest.mark.slow


def another_scheduler(pipe):
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    return "scheduler"


def a_scheduler_of_the_same_class(pipe):
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    return "scheduler"


def another_denoiser(pipe):
    pipe.unet = build(sd15).unet
    return "unet"


@pytest.mark.parametrize(
    "replace", [another_scheduler, a_scheduler_of_the_same_class, another_denoiser]
)
def test_a_component_that_was_replaced_after_hooking_is_named(replace):
    pipe = build(sd15)
    hooked = HookedDiffusionModel.from_pipeline(pipe)
    replaced = replace(pipe)
    attempts = (
        lambda: hooked.run_with_cache(HOOK, PROMPTS[:1], **generate_options(1)),
        lambda: hooked.run_with_hooks({HOOK: Edit(torch.neg)}, PROMPTS[:1], **generate_options(1)),
        lambda: hooked.run_with_hooks({HOOK: lambda *_: None}, PROMPTS[:1], **generate_options(1)),
        lambda: hooked.first_sample(PROMPTS[:1], **generate_options(1)),
    )
    for attempt in attempts:
        with pytest.raises(ValueError, match=f"^{replaced} of .* was replaced after hooking"):
            attempt()
    again = HookedDiffusionModel.from_pipeline(pipe)
    again.run_with_cache(HOOK, PROMPTS[:1], **generate_options(1))


def test_a_loop_whose_model_was_replaced_after_hooking_is_named():
    hooked = HookedDiffusionModel(Denoiser(), Euler(), sample_shape=(3, 4, 5))
    hooked.pipe.model = Denoiser()
    with pytest.raises(ValueError, match="^model of Loop was replaced after hooking"):
        hooked.run_with_cache("out", num_inference_steps=2)


class Store(diffusers.models.attention_processor.AttnProcessor):
    """Counts and stores as prompt-to-prompt editing does, in an object that all layers share."""

    def __init__(self, controller):
        self.controller = controller

    def __call__(self, attention, hidden_states, *args, **kwargs):
        self.controller.calls += 1
        self.controller.sizes["all"].append(hidden_states.shape)
        self.controller.total += hidden_states.detach().double().sum()
        return super().__call__(attention, hidden_states, *args, **kwargs)


class Controller:
    def __init__(self):
        self.calls = 0
        self.sizes = {"all": []}
        self.total = torch.zeros((), dtype=torch.float64)


def run_plainly(hooked, options):
    hooked(PROMPTS[:2], **options)


def run_with_cache(hooked, options):
    hooked.run_with_cache(HOOK, PROMPTS[:2], **options)


def run_with_edits(hooked, options):
    edit = Edit(lambda x: None)
    hooked.run_with_hooks({HOOK: edit}, PROMPTS[:2], **options)


def run_after_a_first_step(hooked, options):
    again = options | generate_options(2, num_inference_steps=3)
    hooked.first_step(HOOK, PROMPTS[:2], **again)
    hooked.layouts(HOOK, PROMPTS[:2], **again)
    hooked(PROMPTS[:2], **options)


@pytest.mark.parametrize("run", [run_with_cache, run_with_edits, run_after_a_first_step])
def test_attention_processors_of_the_users_own_see_the_sampling_only(run):
    """Among them the probes that look for the image's tokens, in the middle of the sampling."""
    seen = []
    for how in (run_plainly, run):
        pipe = build(sd15)
        controller = Controller()
        pipe.unet.set_attn_processor(Store(controller))
        how(HookedDiffusionModel.from_pipeline(pipe), generate_options(2, num_inference_steps=3))
        seen.append(controller)
    plain, hooked = seen
    assert plain.calls > 0
    assert (hooked.calls, hooked.sizes) == (plain.calls, plain.sizes)
    assert torch.equal(hooked.total, plain.total)


@pytest.mark.parametrize("run", [run_with_cache, run_with_edits, run_after_a_first_step])
def test_hooks_of_the_users_own_see_the_sampling_only(run):
    pipe = build(sd15)
    seen = []
    pipe.unet.mid_block.register_forward_hook(lambda module, args, output: seen.append(output))
    run(HookedDiffusionModel.from_pipeline(pipe), generate_options(2, num_inference_steps=3))
    assert len(seen) == 3


def test_a_hook_that_the_denoiser_needs_is_called_in_dry_steps_too():
    """As one that fills in an argument; without it there would be no dry step at all."""
    pipe = build(sd15)

    class NeedsSize(type(pipe.unet)):
        @functools.wraps(type(pipe.unet).forward)
        def forward(self, *args, **kwargs):
            assert self.size == (16, 16)
            return super().forward(*args, **kwargs)

    def note_size(module, args):
        module.size = tuple(args[0].shape[2:])

    pipe.unet.__class__ = NeedsSize
    pipe.unet.size = None
    pipe.unet.register_forward_pre_hook(note_size)
    hooked = HookedDiffusionModel.from_pipeline(pipe)
    hooked.run_with_hooks({HOOK: Edit(torch.neg)}, PROMPTS[:1], **generate_options(1))
    assert pipe.unet.size == (16, 16)
