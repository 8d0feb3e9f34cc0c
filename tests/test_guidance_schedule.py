"""Which rows are conditional where guidance begins late, ends early or changes its sign."""

import functools

import diffusers
import pytest
import torch
from families import sd15_parts
from hooks_by_hand import map_tokens, watch_by_hand
from test_hook import HOOK
from tiny import (
    PROMPTS,
    build,
    called_with,
    generate_options,
    sd15,
)

from hook import Edit, HookedDiffusionModel

pytestmark = pytest.mark.slow


class Ramp(diffusers.StableDiffusionPipeline):
    """Guidance grows with the steps; `scales` are those of the first ones."""

    scales = (0.0, 2.0, 5.0)

    @property
    def guidance_scale(self):
        index = getattr(self.scheduler, "index", 0)
        return self.scales[min(index, len(self.scales) - 1)]


class Counting(diffusers.DDIMScheduler):
    def set_timesteps(self, *args, **kwargs):
        self.index = 0
        return super().set_timesteps(*args, **kwargs)

    def step(self, *args, **kwargs):
        self.index += 1
        return super().step(*args, **kwargs)


class ZeroFirst(Counting):
    """As CFG-Zero* does: nothing of the prediction is used in the first step."""

    def step(self, model_output, *args, **kwargs):
        return super().step(model_output * (self.index > 0), *args, **kwargs)


@called_with(height=32, width=32)
def ramp(scheduler=Counting):
    scheduler = scheduler(clip_sample=False, steps_offset=1)
    parts = sd15_parts() | dict(scheduler=scheduler, safety_checker=None)
    return Ramp(**parts, requires_safety_checker=False)


def ramped(scales, scheduler=Counting):
    pipe = build(ramp, scheduler=scheduler)
    pipe.scales = scales
    return pipe


SCALES = {
    "from 0": (0.0, 2.0, 5.0),
    "always 0": (0.0,),
    "weak": (0.3,),
    "one": (1.0,),
    "negative": (-2.0,),
    "as ever": (5.0,),
}


@pytest.mark.parametrize("scales", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize(
    "prompts",
    [PROMPTS[:1], PROMPTS[:1] * 2, PROMPTS[:2], [""]],
    ids=["one", "the same", "two", "empty"],
)
@pytest.mark.parametrize("negative", [False, True], ids=["", "negatives"])
def test_conditional_rows_whatever_the_guidance_does(scales, prompts, negative):
    """u, c in one batch, in every step."""
    pipe = ramped(scales)
    n = len(prompts)
    more = {"negative_prompt": ["ugly", "blurry"][:n]} if negative else {}
    options, again = (generate_options(n, num_inference_steps=3, **more) for _ in range(2))
    _, cache = HookedDiffusionModel.from_pipeline(pipe).run_with_cache(
        HOOK, prompts, rows="both", **options
    )
    seen = watch_by_hand(pipe, "unet", HOOK, prompts, again, pick=lambda output: output[0])
    by_hand = torch.stack([map_tokens(x) for x in seen], 1)
    assert torch.equal(cache["output_uncond"][HOOK], by_hand[:n])
    assert torch.equal(cache["output"][HOOK], by_hand[n:])


def test_a_first_step_without_guidance_or_prediction():
    pipe = ramped((0.0, 3.0), ZeroFirst)
    options = generate_options(1, num_inference_steps=3)
    hooked = HookedDiffusionModel.from_pipeline(pipe)
    _, cache = hooked.run_with_cache(HOOK, PROMPTS[:1], **options)
    seen = watch_by_hand(
        pipe,
        "unet",
        HOOK,
        PROMPTS[:1],
        generate_options(1, num_inference_steps=3),
        pick=lambda o: o[0],
    )
    assert torch.equal(cache["output"][HOOK][0], torch.stack([map_tokens(x)[1] for x in seen]))


@pytest.mark.parametrize("rows, changed", [("cond", 1), ("uncond", 0)])
@pytest.mark.parametrize("scheduler", [Counting, ZeroFirst])
def test_an_edit_meets_its_rows_when_guidance_begins_late(rows, changed, scheduler):
    pipe = ramped((0.0, 3.0), scheduler)
    before = []
    after = []
    hooked = HookedDiffusionModel.from_pipeline(pipe)
    options = generate_options(1)
    module = pipe.unet.get_submodule(HOOK)
    handles = [module.register_forward_hook(lambda m, i, o: before.append(o[0].clone()))]
    edits = {HOOK: Edit(lambda x: x + 1, rows=rows)}
    follow = pipe.unet.get_submodule("up_blocks.1.resnets.0").register_forward_pre_hook(
        lambda m, i: after.append(i[0].clone())
    )
    hooked.run_with_hooks(edits, PROMPTS[:1], **options)
    edited = after[-2:]
    after.clear()
    hooked(PROMPTS[:1], **generate_options(1))
    for handle in (*handles, follow):
        handle.remove()
    differs = [(a != b).flatten(1).any(1).tolist() for a, b in zip(edited, after)]
    assert differs[0] == [row == changed for row in range(2)]


def by_prompt_embeddings(pipe, prompts):
    embeds, negative = pipe.encode_prompt(prompts, "cpu", 1, True)
    return dict(prompt_embeds=embeds, negative_prompt_embeds=negative)


def test_rows_where_prompts_are_given_as_embeddings():
    pipe = ramped((0.0, 3.0))
    options = generate_options(1) | by_prompt_embeddings(pipe, PROMPTS[:1])
    _, cache = HookedDiffusionModel.from_pipeline(pipe).run_with_cache(HOOK, **options)
    seen = watch_by_hand(
        pipe,
        "unet",
        HOOK,
        None,
        options | {"generator": generate_options(1)["generator"]},
        pick=lambda o: o[0],
    )
    assert torch.equal(cache["output"][HOOK][0], torch.stack([map_tokens(x)[1] for x in seen]))


@pytest.fixture
def calls(monkeypatch):
    """A list that grows by one with every forward of a UNet."""
    forwards = []
    forward = diffusers.UNet2DConditionModel.forward

    @functools.wraps(forward)
    def counted(self, *args, **kwargs):
        forwards.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(diffusers.UNet2DConditionModel, "forward", counted)
    return forwards


def test_asking_costs_one_step_for_all_batches(calls):
    pipe = build(sd15)
    hooked = HookedDiffusionModel.from_pipeline(pipe)
    batches = (PROMPTS[:2], PROMPTS[1:], PROMPTS[:1])
    for prompts in batches:
        # so that layouts are known, and not looked for below
        hooked.layouts(HOOK, prompts, **generate_options(len(prompts)))
    counts = []
    for prompts in batches:
        calls.clear()
        hooked.run_with_cache(
            HOOK, prompts, **generate_options(len(prompts), num_inference_steps=3)
        )
        counts.append(len(calls))
    assert counts == [4, 3, 3]
    calls.clear()
    hooked.first_step(HOOK, PROMPTS[1:], **generate_options(2, num_inference_steps=4))
    hooked.run_with_cache(HOOK, PROMPTS[:2], **generate_options(2, num_inference_steps=4))
    assert len(calls) == 1 + 1 + 4  # as collect.py does
    for rows, expected in (("all", 1 + 1 + 5), ("all", 1 + 5), ("cond", 1 + 5)):
        calls.clear()
        hooked.run_with_hooks(
            {HOOK: Edit(lambda x: x, rows=rows)},
            PROMPTS[:1],
            **generate_options(1, num_inference_steps=5),
        )
        assert len(calls) == expected
    calls.clear()
    hooked.run_with_hooks(
        {HOOK: Edit(lambda x: x)}, PROMPTS[:1], **generate_options(1, num_inference_steps=3)
    )
    assert len(calls) == 4  # the plan's step, which is nothing new


@pytest.mark.parametrize("first", ["layouts", "an edit of all rows", "an edit that fails"])
def test_the_answer_is_not_lost(first):
    pipe = ramped((0.0,))
    hooked = HookedDiffusionModel.from_pipeline(pipe)
    name = {HOOK: Edit(lambda x: x, rows="all")}
    if first == "layouts":
        hooked.layouts(HOOK, PROMPTS[:1], **generate_options(1))
    elif first == "an edit of all rows":
        hooked.run_with_hooks(name, PROMPTS[:1], **generate_options(1))
    else:
        with pytest.raises(ValueError, match="must return"):
            hooked.run_with_hooks({HOOK: Edit(lambda x: x[:0])}, PROMPTS[:1], **generate_options(1))
    _, cache = hooked.run_with_cache(HOOK, PROMPTS[1:2], **generate_options(1))
    seen = watch_by_hand(
        pipe, "unet", HOOK, PROMPTS[1:2], generate_options(1), pick=lambda output: output[0]
    )
    assert torch.equal(cache["output"][HOOK][0], torch.stack([map_tokens(x)[1] for x in seen]))


def test_asking_leaves_no_trace(pipe):
    hooked = HookedDiffusionModel.from_pipeline(pipe)
    options = generate_options(2) | {"generator": None}
    torch.manual_seed(3)
    expected = hooked(PROMPTS[:2], **options).images
    torch.manual_seed(3)
    output, _ = hooked.run_with_cache(HOOK, PROMPTS[:2], **options)
    assert torch.equal(output.images, expected)
