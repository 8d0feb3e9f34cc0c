"""Sampling loops of the user's own: which rows are conditional is told by what depends on what."""

import diffusers
import pytest
import torch
from hooks_by_hand import map_tokens
from test_hook import HOOK, Denoiser, Euler
from tiny import PROMPTS, build, generate_options, sd15

from hook import HookedDiffusionModel

pytestmark = pytest.mark.slow


def own_loop(scales, order=None, passes="uc", swap_at=None, n=1, same_text=False, null_until=0):
    """Sample n images with a guided loop of the user's own, one step for each guidance scale.

    order: what the user says of the passes. passes: how they really lie in a forward, u and c.
    swap_at: the step in which they lie the other way round. same_text: all prompts are one.
    null_until: the step before which both passes have the unconditional text. Returns the rows that
    were kept as conditional, and the conditional rows by hand, both (n, steps, tokens, d).
    """
    torch.manual_seed(0)
    model = Denoiser()
    scheduler = Euler()
    by_hand = []
    text = {"u": torch.randn(n, 5), "c": torch.randn(n, 5)}
    if same_text:
        text["c"] = text["c"][:1].expand(n, 5)
    x = torch.randn(n, 3, 4, 5)
    hooked = HookedDiffusionModel(model, scheduler)
    with torch.no_grad(), hooked.cache("out", n, order=order) as cache:
        for step, scale in enumerate(scales):
            timestep = 9.0 - step
            names = passes[::-1] if step == swap_at else passes
            texts = [text["u" if step < null_until else name] for name in names]
            predictions = model(torch.cat([x, x]), timestep, torch.cat(texts)).chunk(2)
            prediction = dict(zip(names, predictions))
            by_hand.append(map_tokens(prediction["c"]))
            guided = prediction["u"] + scale * (prediction["c"] - prediction["u"])
            x = scheduler.step(guided, timestep, x)
    return cache["output"]["out"], torch.stack(by_hand, 1)


@pytest.mark.parametrize("scales", [(0.0, 0.0, 4.0, 4.0), (0.5, 1.0, 2.0), (4.0, 4.0), (4.0, 0.0)])
def test_later_steps_tell_what_the_first_does_not(scales):
    assert torch.equal(*own_loop(scales))


@pytest.mark.parametrize("scales", [(0.0, 0.0), (1.0,), (0.0, 0.5, 1.0)])
def test_a_loop_whose_guidance_never_tells_is_refused_unless_the_order_is_said(scales):
    with pytest.raises(ValueError, match=r'say order=\("uncond", "cond"\)'):
        own_loop(scales)
    assert torch.equal(*own_loop(scales, order=("uncond", "cond")))


@pytest.mark.parametrize(
    "scales, options",
    [((-3.0, 4.0), {}), ((0.0, 4.0), dict(n=2, same_text=True)), ((4.0, 4.0), dict(swap_at=1))],
)
def test_steps_that_disagree_are_refused(scales, options):
    """The second has one prompt with two negative ones: its unconditional rows vary, and the
    conditional ones do not."""
    with pytest.raises(ValueError, match="otherwise than an earlier step"):
        own_loop(scales, **options)


@pytest.mark.parametrize("passes", ["uc", "cu"])
@pytest.mark.parametrize("n", [1, 2])
def test_passes_that_are_equal_in_some_steps_are_told_by_the_others(n, passes):
    """Guidance in a limited interval: before it both passes have the unconditional text, and any
    label would do there."""
    kept, conditional = own_loop((5.0, 5.0, 5.0), n=n, passes=passes, null_until=1)
    assert torch.equal(kept, conditional)
    kept, conditional = own_loop((5.0, 5.0), n=n, passes=passes, null_until=2)  # in no step
    assert torch.allclose(kept, conditional, atol=1e-5)


def test_an_order_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="names 3 passes, and a step of this sampling has 2"):
        own_loop((4.0,), order=("cond", "other", "uncond"))
    with pytest.raises(ValueError, match="order: expected"):
        own_loop((4.0,), order="cond")


class Noise(torch.nn.Module):
    """Predicts the toy's noise. A loop of one's own may want it, whatever the toy predicts."""

    def __init__(self, pipe):
        super().__init__()
        self.unet = pipe.unet
        self.alphas = pipe.scheduler.alphas_cumprod

    def forward(self, sample, timestep, text):
        a = self.alphas[timestep]
        return a.sqrt() * self.unet(sample, timestep, text).sample + (1 - a).sqrt() * sample


@pytest.fixture(scope="module")
def toy():
    return HookedDiffusionModel.from_pretrained("toy").pipe


@pytest.mark.parametrize("num_steps", [1, 2, 10])
@pytest.mark.parametrize("scale", [1.2, 3.0, 7.5, 12.0])
@pytest.mark.parametrize("predicts", ["sample", "clipped sample", "v_prediction"])
def test_a_loop_that_turns_the_guided_noise_into_something_else(toy, predicts, scale, num_steps):
    """The scheduler's input holds the sample too, which resembles the noise in it."""
    model = Noise(toy)
    scheduler = diffusers.DDIMScheduler.from_config(
        toy.scheduler.config, prediction_type=predicts.split()[-1], clip_sample=False
    )
    scheduler.set_timesteps(num_steps)
    prompts, empty = toy.encode_prompt(["a red star", "a blue ring"], "cpu", 1, True)[:2]
    name = "unet.up_blocks.1.attentions.1"
    seen = []
    model.get_submodule(name).register_forward_hook(
        lambda module, args, output: seen.append(output[0])
    )
    x = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    hooked = HookedDiffusionModel(model, scheduler)
    with torch.no_grad(), hooked.cache(name, 2, rows="both") as cache:
        for t in scheduler.timesteps:
            u, c = model(torch.cat([x, x]), t, torch.cat([empty, prompts])).chunk(2)
            noise = u + scale * (c - u)
            a = scheduler.alphas_cumprod[t].clamp_min(1e-5)
            if predicts == "v_prediction":
                prediction = (noise - (1 - a).sqrt() * x) / a.sqrt()
            else:
                prediction = (x - (1 - a).sqrt() * noise) / a.sqrt()
            if predicts == "clipped sample":
                prediction = prediction.clamp(-1, 1)
            x = scheduler.step(prediction, t, x).prev_sample
    assert torch.equal(cache["output"][name], torch.stack([map_tokens(o[2:]) for o in seen], 1))
    assert torch.equal(
        cache["output_uncond"][name], torch.stack([map_tokens(o[:2]) for o in seen], 1)
    )


def called_before(warm_up, scales=(4.0, 4.0)):
    """A guided loop after a call of the denoiser that belongs to no step."""
    torch.manual_seed(0)
    model = Denoiser()
    scheduler = Euler()
    seen = []
    texts = {"uncond": torch.randn(2, 5), "cond": torch.randn(2, 5)}
    x = torch.randn(2, 3, 4, 5)
    hooked = HookedDiffusionModel(model, scheduler)
    with torch.no_grad(), hooked.cache("out", 2, rows="both") as cache:
        warm_up(model, x, texts)
        for i, scale in enumerate(scales):
            out = model(torch.cat([x, x]), 9.0 - i, torch.cat([texts["uncond"], texts["cond"]]))
            seen.append(out)
            u, c = out.chunk(2)
            x = scheduler.step(u + scale * (c - u), 9.0 - i, x)
    for key, rows in (("output", slice(2, 4)), ("output_uncond", slice(0, 2))):
        expected = torch.stack([map_tokens(out[rows]) for out in seen], 1)
        assert torch.equal(cache[key]["out"], expected)


@pytest.mark.parametrize("text", ["cond", "uncond"])
def test_a_call_that_warms_the_denoiser_up_is_no_pass(text):
    called_before(lambda model, x, texts: model(x, 500.0, texts[text]))
    called_before(lambda model, x, texts: model(x + 1, 9.0, 2 * texts[text]))
    called_before(lambda model, x, texts: model(0 * x, 9.0, 0 * texts[text]))
    called_before(lambda model, x, texts: model(torch.randn(4, 3, 4, 5), 9.0, torch.randn(4, 5)))


def test_a_warm_up_that_repeats_a_pass_is_refused_by_what_is_true():
    """The model output may then be made of either call."""
    with pytest.raises(ValueError, match="was called on 2 and 4 rows, .* such as a warm-up"):
        called_before(lambda model, x, texts: model(x, 9.0, texts["cond"]))


def test_another_pipeline_may_sample_with_the_denoiser_between_two_steps():
    pipe = build(sd15)
    other = diffusers.StableDiffusionPipeline(
        **{**pipe.components, "scheduler": diffusers.EulerDiscreteScheduler()}
    )
    other.set_progress_bar_config(disable=True)
    hooked = HookedDiffusionModel.from_pipeline(pipe)
    expected = hooked.run_with_cache(HOOK, PROMPTS[:2], rows="both", **generate_options(2))[1]

    def sample(pipe, step, timestep, tensors):
        if step == 0:
            other(PROMPTS[1:3], **generate_options(2))
        return tensors

    hooked = HookedDiffusionModel.from_pipeline(pipe)
    with hooked.cache(HOOK, 2, rows="both") as cache:
        pipe(PROMPTS[:2], callback_on_step_end=sample, **generate_options(2))
    _, by_prompts = hooked.run_with_cache(
        HOOK, PROMPTS[:2], rows="both", callback_on_step_end=sample, **generate_options(2)
    )
    for recorded in (cache, by_prompts):
        for key in ("output", "output_uncond"):
            assert torch.equal(recorded[key][HOOK], expected[key][HOOK])


@pytest.mark.parametrize("scale", [-2.0, 0.0, 1.0, 4.0])
def test_the_loop_that_comes_with_it_never_exchanges_the_passes(scale):
    """It guides with a scale above 1 only, and puts the unconditional rows first."""
    torch.manual_seed(0)
    model = Denoiser()
    seen = []
    text = {"cond": torch.randn(2, 5), "uncond": torch.randn(2, 5)}
    hooked = HookedDiffusionModel(
        model,
        Euler(),
        encode_prompt=lambda *_: (text["cond"], text["uncond"]),
        get_timesteps=lambda n, device: range(n, 0, -1),
        sample_shape=(3, 4, 5),
    )

    def keep_conditional(module, args, output):
        conditional = (args[2][:, None] == text["cond"]).all(-1).any(1)
        assert len(output) == (4 if scale > 1 else 2)
        seen.append(map_tokens(output[conditional]))

    model.register_forward_hook(keep_conditional)
    with hooked.cache("out", 2) as cache:
        hooked(["a", "b"], num_inference_steps=3, guidance_scale=scale)
    assert torch.equal(cache["output"]["out"], torch.stack(seen, 1))
